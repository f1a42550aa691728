"""Kernels in C, for processors with AVX2, FMA and F16C. `pip install .` builds them if there is a compiler.

For no more than these instructions: one token is bound by memory, and those suffice to reach it. How a result is summed
stands at the top of each C file; it depends neither on the batch nor on threads.
"""

import importlib.util
import logging

from ... import Kernel

logger = logging.getLogger(__name__)


def native_kernels() -> dict[str, Kernel]:
    """The table; empty, and the log says why, where they were not built or this processor cannot run them."""
    if importlib.util.find_spec(f"{__name__}.compiled") is None:
        logger.info("CPU kernels: torch's; the faster ones in C are not built, pip install . builds them with gcc")
        return {}
    from .table import kernels_of_processor  # imports what a bare checkout lacks

    return kernels_of_processor()
