"""The choice: a tactic as it was timed, else the one that the heuristic of the op would take."""

from collections.abc import Mapping
from typing import Any

from . import dense, smooth_quant, weight_only
from .tactic import MatmulShape, Tactic

# The numbers of tokens that matmuls are timed at. What is best for one holds from beyond the number before it on, what
# is best for the last one holds without end.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_FAMILIES = {
    "matmul": dense,
    "gated_mlp": dense,
    "weight_only_quant_matmul": weight_only,
    "weight_only_gated_mlp": weight_only,
    "smooth_quant_gemm": smooth_quant,
    "smooth_quant_gated_mlp": smooth_quant,
}
MATMULS = frozenset(_FAMILIES)


def bucket_of(tokens: int) -> int:
    """The bucket whose tactics hold for a step of so many tokens, one or more."""
    return next((bucket for bucket in BUCKETS if bucket >= tokens), BUCKETS[-1])


def heuristic(shape: MatmulShape, tokens: int) -> Tactic:
    """The tactic without any timing."""
    return _FAMILIES[shape.op].heuristic(shape, tokens)


def candidates(shape: MatmulShape, tokens: int) -> list[Tactic]:
    """Tactics that compute the op rightly and are worth a timing; the heuristic's choice is the first."""
    return _FAMILIES[shape.op].candidates(shape, tokens)


class Tactics:
    """The choice for every matmul of an engine. Launchers ask at each call, so what was found once is remembered."""

    def __init__(self, timed: Mapping[tuple[MatmulShape, int], Tactic] | None = None) -> None:
        """`timed` holds the best of a shape and a bucket."""
        self._timed = timed or {}
        self._chosen: dict[tuple[Any, ...], Tactic] = {}

    def choose(self, *facts: Any) -> Tactic:
        """The tactic for the fields of a MatmulShape and a number of tokens. But for the first time, one look-up."""
        tactic = self._chosen.get(facts)
        if tactic is None:
            *fields, tokens = facts
            shape = MatmulShape(*fields)
            timed = self._timed.get((shape, bucket_of(tokens))) if tokens else None
            tactic = self._chosen[facts] = timed or heuristic(shape, tokens)
        return tactic
