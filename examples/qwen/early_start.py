"""What a script that runs an engine may begin before torch is imported: the check of the weights, and the GPU's start.

The import takes seconds of one core. Digests need others, and a driver that makes a context needs next to none. Imports
nothing slow. Says nothing of a wrong command line, an engine that cannot be opened or a GPU that is not there: the
script comes to them again, and says it then.
"""

import ctypes
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from tensorrt_llm.engine_file import EngineFile


def begin_start(argv: Sequence[str]) -> EngineFile | None:
    """The file of the engine that the flags `argv` name, its check begun; None where there is none to check."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--engine_dir", type=Path, nargs="?")
    parser.add_argument("--device", nargs="?")
    args, _ = parser.parse_known_args(argv)
    if args.engine_dir is None:
        return None
    wake_gpu(args.device)
    try:
        file = EngineFile.of_folder(args.engine_dir)
        file.begin_check()
    except ValueError:
        return None
    return file


def wake_gpu(device: str | None) -> Thread | None:
    """A thread that has the driver make the context that torch will find; None where `device` is no GPU."""
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device or "cuda")
    if match is None:
        return None
    thread = Thread(target=_make_context, args=(int(match[1] or 0),), name="GPU start", daemon=True)
    thread.start()
    return thread


def _make_context(ordinal: int) -> None:
    """The primary context of a GPU, kept until the process ends. Each call lets go of the interpreter lock."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return  # no driver of NVIDIA's
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(gpu), ordinal) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
