"""Times the candidates of an engine's matmuls on a GPU: cold, inside CUDA graphs, and only those that are right.

    cold_timing.py   how long an op takes when its weight lies in memory, not in the cache
    random_call.py   an op of a plan with operands that mean nothing
    candidates.py    every candidate of every matmul: compiled, checked, timed
    tune.py          the winners, kept beside the engine

Runs where engines are built; the runtime only reads what was found.
"""

from .candidates import Bench, Measured, measure_matmuls
from .cold_timing import time_in_turns
from .random_call import RandomCall
from .tune import Tuning, tune

__all__ = ["Bench", "Measured", "RandomCall", "Tuning", "measure_matmuls", "time_in_turns", "tune"]
