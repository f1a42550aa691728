"""Graphs replay what was captured, and share the memory of their results."""

import pytest
import torch

from tensorrt_llm.runtime.cuda_graph import CudaGraphPool

SIZE = 16 << 20  # 64 MiB of float32


@pytest.mark.gpu
def test_a_replay_follows_what_lies_at_the_address_and_results_belong_to_nobody() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = CudaGraphPool(device)
    number = torch.ones((), device=device)
    functions = [lambda n=n: torch.full((SIZE,), float(n), device=device) * number for n in range(1, 5)]
    for function in functions:
        function()
    before = torch.cuda.memory_allocated()
    graphs = [pool.capture(function) for function in functions]
    assert torch.cuda.memory_allocated() - before < 4 * SIZE
    for value in (2.0, 3.0):
        number.fill_(value)
        for factor, graph in enumerate(graphs, start=1):
            graph.replay()
            assert torch.equal(graph.result, torch.full((SIZE,), factor * value, device=device))


@pytest.mark.gpu
def test_pieces_are_replayed_in_order_and_share_what_they_made() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = CudaGraphPool(device)
    number = torch.ones(SIZE, device=device)

    def in_pieces() -> torch.Tensor:
        total, others = number + 1, []
        for _ in range(2):
            pool.cut()
            others.append(total * 3)  # what an earlier piece made is kept while it is needed
            total = total + others[0]
        return total

    graph = pool.capture(in_pieces)
    other = pool.capture(lambda: number * 5)
    for value in (2.0, 3.0):
        number.fill_(value)
        graph.replay()
        assert torch.equal(graph.result, torch.full((SIZE,), 7 * (value + 1), device=device))
        other.replay()
        assert torch.equal(other.result, torch.full((SIZE,), 5 * value, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("num_cuts", [0, 1, 2])
def test_a_capture_that_fails_leaves_the_pool_usable(num_cuts: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = CudaGraphPool(device)

    def fail() -> torch.Tensor:
        for _ in range(num_cuts):
            torch.ones(SIZE, device=device)
            pool.cut()
        torch.ones(SIZE, device=device)
        raise RuntimeError("no result")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no result"):
            pool.capture(fail)
    graph = pool.capture(lambda: torch.ones(3, device=device))
    graph.replay()
    assert graph.result.tolist() == [1, 1, 1]


@pytest.mark.gpu
def test_a_capture_without_memory_is_tried_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    errors = [torch.OutOfMemoryError("none left")]

    def run() -> torch.Tensor:
        if errors:
            raise errors.pop()
        return torch.ones(3, device=device)

    graph = CudaGraphPool(device).capture(run)
    graph.replay()
    assert graph.result.tolist() == [1, 1, 1]
