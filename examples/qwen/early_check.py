"""Has the weights of a script's engine checked from its first moment on, beside the import of torch.

The import takes seconds of one core, and digests need others. Imports nothing slow. Says nothing of a wrong command
line or of an engine that cannot be opened: the script parses and opens again, and says it then.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tensorrt_llm.engine_file import EngineFile


def begin_check(argv: Sequence[str]) -> EngineFile | None:
    """The file of the engine that the flags `argv` name, its check begun; None where there is none to check."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--engine_dir", type=Path, nargs="?")
    engine_dir = parser.parse_known_args(argv)[0].engine_dir
    if engine_dir is None:
        return None
    try:
        file = EngineFile.of_folder(engine_dir)
        file.begin_check()
    except ValueError:
        return None
    return file
