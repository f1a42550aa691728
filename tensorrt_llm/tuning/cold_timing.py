"""How long an op takes as a step meets it: one of a chain in a CUDA graph, with its weight in memory and not in the L2.

A chain holds copies of one op, each with a weight of its own, that together are several times the L2. As in a step, a
kernel that may start early starts behind another one. What a chain does not show: what an op takes from kernels of
another kind beside it.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Op = Callable[[], object]

# The weights of a chain, in times of the L2: nothing is left of a copy when its turn comes again.
_TIMES_L2 = 3
# A weight of several times the L2 throws itself out, but for what the next op begins with.
_LEAST_COPIES, _MOST_COPIES = 2, 100
# The start of a graph takes microseconds: a chain goes through its copies until it has so many ops, or reads so much.
_LEAST_OPS, _MOST_BYTES = 20, 2 << 30
_CPU_COPIES = 2


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight, or whatever else an op reads from memory, a chain needs."""
    if device.type == "cpu":
        return _CPU_COPIES
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(_LEAST_COPIES, -(-_TIMES_L2 * l2_bytes // max(weight_bytes, 1))), _MOST_COPIES)


def chain_of(copies: Sequence[Op], weight_bytes: int) -> list[Op]:
    """The ops of a chain: all copies, once or again and again."""
    ops = min(_LEAST_OPS, _MOST_BYTES // max(weight_bytes, 1))
    return list(copies) * max(1, -(-ops // len(copies)))


def time_in_turns(chains: Sequence[Sequence[Op]], device: torch.device, rounds: int = 10) -> list[float]:
    """Seconds of an op of each chain, the median of `rounds`. The chains take turns: a clock that changes favours none.

    Every op has run once before, as a graph captures no compilation.
    """
    if device.type == "cpu":
        replays = [_run_all(chain) for chain in chains]
        seconds = [[_seconds_on_cpu(replay) for replay in replays] for _ in range(rounds)]
    else:
        seconds = _seconds_on_cuda(chains, rounds)
    columns = zip(*seconds, strict=True)
    return [statistics.median(column) / len(chain) for column, chain in zip(columns, chains, strict=True)]


def _run_all(chain: Sequence[Op]) -> Callable[[], None]:
    def run() -> None:
        for op in chain:
            op()

    return run


def _seconds_on_cpu(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _seconds_on_cuda(chains: Sequence[Sequence[Op]], rounds: int) -> list[list[float]]:
    """[round][chain]. One round more, which does not count, brings the graphs to the device."""
    graphs = [torch.cuda.CUDAGraph() for _ in chains]
    pool = torch.cuda.graph_pool_handle()  # the graphs run one after the other, and nobody reads what they make
    for graph, chain in zip(graphs, chains, strict=True):
        _run_all(chain)()  # with the copies of a weight: what an op makes once is made now, and not in the graph
        with torch.cuda.graph(graph, pool=pool):
            _run_all(chain)()
    events = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in chains]
        for _ in range(rounds + 1)
    ]
    for round_events in events:
        for graph, (start, end) in zip(graphs, round_events, strict=True):
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) * 1e-3 for start, end in round_events] for round_events in events[1:]]
