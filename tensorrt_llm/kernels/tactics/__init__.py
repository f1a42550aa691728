"""Which way a matmul is computed, by its shape and the number of tokens: candidates, heuristics, a table of timings.

One file for each family of ops says what its tactics are. Knows neither Triton nor how anything is timed.
"""

from .table import BUCKETS, MATMULS, Tactics, bucket_of, candidates, heuristic
from .tactic import LIBRARY, MatmulShape, Tactic

__all__ = [
    "BUCKETS",
    "LIBRARY",
    "MATMULS",
    "MatmulShape",
    "Tactic",
    "Tactics",
    "bucket_of",
    "candidates",
    "heuristic",
]
