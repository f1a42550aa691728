"""Copies beside what the device works on: nothing is read too early, and nothing is given to others too early."""

import pytest
import torch

from tensorrt_llm.runtime.transfers import Download, staging, upload_ahead

SIZE = 1 << 20


def keep_busy() -> None:
    """Some milliseconds of work for the device."""
    x = torch.ones(4096, 4096, device="cuda")
    for _ in range(10):
        x = x @ x


def numbers(first: int) -> torch.Tensor:
    return torch.arange(first, first + SIZE, dtype=torch.int32)


@pytest.mark.gpu
def test_what_goes_up_is_there_when_work_behind_it_reads_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    keep_busy()
    copies = []
    for first in range(8):
        host = staging(SIZE, torch.int32, device)
        host.copy_(numbers(first))
        copies.append(upload_ahead(host, device) + 1)
        del host  # its memory, and that of the copy, are the next one's as soon as they may be
    for first, copy in enumerate(copies):
        assert torch.equal(copy.cpu(), numbers(first + 1))


@pytest.mark.gpu
def test_what_comes_down_is_what_work_in_front_of_it_made() -> None:
    keep_busy()
    downloads = []
    for first in range(8):
        made = numbers(first).cuda() + 1
        downloads.append(Download(made))
        del made
        torch.zeros(SIZE, dtype=torch.int32, device="cuda")  # takes its memory if that is given back too early
    for first, download in enumerate(downloads):
        assert download.wait() == numbers(first + 1).tolist()


def test_on_a_cpu_nothing_is_copied() -> None:
    host = torch.arange(3)
    assert upload_ahead(host, torch.device("cpu")) is host and Download(host).wait() == [0, 1, 2]
