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
