"""Command lines of the example scripts: flags made from a dataclass, and user errors as one line with an exit code.

Knows no flag by name; each script's dataclass is the one place that states its flags and defaults.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import torch

Args = TypeVar("Args")

# The original's level names, which are TensorRT's.
_LOG_LEVELS = {
    "internal_error": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": logging.DEBUG,
}


def flag(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    optional_value: bool = False,
) -> Any:
    """A dataclass field that is a flag; without a default the flag is required.

    A bool is a switch, a list takes several values, `optional_value` lets a flag stand alone or with a value.
    """
    metadata = {"help": help, "choices": choices, "aliases": aliases, "optional_value": optional_value}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def log_level_flag(default: str) -> Any:
    return flag(default, help="how much to log on stderr", choices=tuple(_LOG_LEVELS))


class ArgumentError(ValueError):
    """Bad arguments that the parser cannot see; they end the process with code 2, as those that it sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and code 2; argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(cls: type[Args], description: str | None, argv: Sequence[str] | None = None) -> Args:
    """An instance of `cls` from the command line; argparse ends the process with code 2 on bad arguments."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(cls):  # type: ignore[arg-type]  # Args is a dataclass
        names = [f"--{item.name}", *item.metadata["aliases"]]
        parser.add_argument(*names, dest=item.name, **_options(item))
    return cls(**vars(parser.parse_args(argv)))


def _options(item: Any) -> dict[str, Any]:
    is_required = item.default is MISSING and item.default_factory is MISSING
    default = None if is_required else (item.default if item.default is not MISSING else item.default_factory())
    help_text = item.metadata["help"].replace("%", "%%")
    if not is_required and default not in (None, False, []):
        help_text += f" (default: {default})"
    options: dict[str, Any] = {"help": help_text, "default": default}
    if item.type is bool:
        return options | {"action": "store_true"}
    value_type, takes_several = _value_type(item.type)
    options |= {"type": value_type, "required": is_required}
    if item.metadata["choices"]:
        options["choices"] = item.metadata["choices"]
    if takes_several:
        options["nargs"] = "+"
    elif item.metadata["optional_value"]:
        options |= {"nargs": "?", "const": default}
    return options


def _value_type(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """The type of one value, and whether the flag takes several: int | None -> int, list[str] -> str, several."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True
    if isinstance(annotation, UnionType):
        (inner,) = (member for member in get_args(annotation) if member is not type(None))
        return _value_type(inner)
    return annotation, False


def run_script(main: Callable[[Args], int | None], cls: type[Args], description: str | None) -> None:
    """Parse, run `main`, exit: what main returns (None is 0), 2 for bad arguments, 1 with one line for user errors."""
    args = parse(cls, description)
    name = Path(sys.argv[0]).name
    level = _LOG_LEVELS[getattr(args, "log_level", "warning")]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        sys.exit(main(args) or 0)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        print(f"{name}: error: the device has too little memory for this engine: {first_line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(1)
