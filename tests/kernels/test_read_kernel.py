"""The kernel that measures the read rate reads every element: its sums are those of torch."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs triton")

from benchmarking.read_kernel import LAUNCHES, Launch, sum_blocks


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_block_is_summed(device: torch.device, launch: Launch) -> None:
    # Small integers, whose sums float32 holds exactly in any order.
    x = torch.randint(-50, 50, (3 * launch.block,), device=device).float()
    assert torch.equal(sum_blocks(x, launch), x.view(3, -1).sum(1))
