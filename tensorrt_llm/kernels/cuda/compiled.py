"""Compiled kernels: where Triton keeps them between two processes, and what it does before the first one.

Triton finds a compiled kernel by its source, its arguments, the GPU, and the versions of the compiler: what does not
fit any more is not found, and compiled again. Knows none of the kernels.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import logging
import os
import stat
import time
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

logger = logging.getLogger(__name__)

__all__ = ["TritonError", "keep_compiled_in", "run_first_kernel"]

_VARIABLE = "TRITON_CACHE_DIR"


def keep_compiled_in(folder: Path) -> None:
    """Have Triton keep in `folder` what it compiles, unless the user names a folder or this one is not for us to use.

    A process has one such folder: the first that is asked for. Triton itself remembers it, in its variable.
    """
    if _VARIABLE in os.environ:
        return
    reason = _why_not(folder)
    if reason:
        logger.info("%s: %s; compiled kernels are kept in %s", folder, reason, triton.knobs.cache.dir)
    else:
        triton.knobs.cache.dir = str(folder.absolute())


def _why_not(folder: Path) -> str | None:
    """Make the folder, or say why kernels cannot be kept there.

    It will hold machine code, which runs when it is found: nobody else may have put it there.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if not stat.S_ISDIR(facts.st_mode):
        return "is no folder"
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others can write there"
    return None if os.access(folder, os.W_OK) else "cannot be written"


@triton.jit
def _store_zero(out_ptr):
    tl.store(out_ptr, 0)


def run_first_kernel(device: torch.device) -> None:
    """A kernel that does nothing, for what Triton does before the first of a process, however well others are kept.

    It hashes its own libraries (0.6 s for 415 MB, AMD EPYC), asks ptxas for its version, and loads its driver.
    """
    started = time.perf_counter()
    with torch.cuda.device(device):
        _store_zero[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    logger.info("compiler ready in %.2f s", time.perf_counter() - started)
