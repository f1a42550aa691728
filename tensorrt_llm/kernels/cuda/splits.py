"""What the splits of a context left, put together, and who comes last: shared by kernels that divide their work.

    out = sum_s 2^lse[s] partial[s] / sum_s 2^lse[s]        partial[s] the normalised result of split s

in the order of the splits, in float32. Knows neither keys nor values.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from ..tactics import Tactics
from ..tactics.tactic import next_power_of_2

# A running maximum starts below every score, yet finite: -inf minus -inf would be NaN in an all-masked row.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def weigh_splits(
    partial_ptr, lse_ptr, first_row, used_splits, HEAD_SIZE: tl.constexpr, DIM_TILE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The splits that stand in the rows from first_row on."""
    dims = tl.arange(0, DIM_TILE)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([DIM_TILE], tl.float32)
    for first in range(0, used_splits, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        used = splits < used_splits
        lse = tl.load(lse_ptr + first_row + splits, mask=used, other=float("-inf"))
        mask = used[:, None] & (dims < HEAD_SIZE)[None, :]
        partial = tl.load(partial_ptr + (first_row + splits)[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        decay, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        total = total * decay + tl.sum(weight, axis=0)
        result = result * decay + tl.sum(partial * weight[:, None], axis=0)
        top = new_top
    return result / total


def room_for_splits(out: torch.Tensor, decodes: int, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial, lse) for the splits of `decodes` rows of out [tokens, heads, head_size]; one split writes to `out`."""
    if num_splits == 1:
        return out, out  # never read or written as what they are called
    num_heads, head_size = out.shape[1:]
    partial = torch.empty((decodes, num_heads, num_splits, head_size), dtype=torch.float32, device=out.device)
    return partial, torch.empty((decodes, num_heads, num_splits), dtype=torch.float32, device=out.device)


class Arrivals:
    """Zeros on a device, where the programs of a launch count each other, and leave zeros behind.

    For launches that come one after the other. A captured graph keeps the address, so no zeros are ever let go.
    """

    def __init__(self) -> None:
        self._zeros: dict[tuple[torch.device, int], torch.Tensor] = {}

    def of(self, count: int, device: torch.device) -> torch.Tensor:
        """At least `count` of them, int32."""
        size = max(1024, next_power_of_2(count))
        if (device, size) not in self._zeros:
            self._zeros[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._zeros[device, size]


_arrivals: WeakKeyDictionary[Tactics, Arrivals] = WeakKeyDictionary()


def arrivals_of(tactics: Tactics) -> Arrivals:
    """Those of all matmuls that `tactics` choose: a session has tactics of its own, and multiplies one at a time."""
    return _arrivals.setdefault(tactics, Arrivals())
