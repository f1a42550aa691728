"""Engines in folders: which there are, and what a table calls each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorrt_llm import Engine, EngineConfig
from tensorrt_llm.inspect import group_sizes
from tensorrt_llm.runtime.engine_folder import AnyEngine, open_engine


@dataclass(frozen=True)
class EngineFolder:
    path: Path
    name: str  # no other of the folders together with it has it
    config: EngineConfig


def find_engines(folders: Sequence[Path]) -> list[EngineFolder]:
    """The engines in `folders` in their order; a folder that holds engines below itself stands for these, sorted.

    Each is opened, so that a damaged one is found before others have worked for hours, and let go of again.
    """
    paths = list(dict.fromkeys(path for folder in folders for path in _expand(folder)))
    engines = [open_engine(path) for path in paths]
    names = _unique([_what_it_is(engine) for engine in engines], paths)
    return [EngineFolder(*facts) for facts in zip(paths, names, (engine.config for engine in engines), strict=True)]


def _expand(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--engine_dir {folder}: no such folder, expected one that build.py wrote, or that holds some")
    if _is_engine(folder):
        return [folder]
    found = sorted(file.parent for file in folder.rglob("config.json") if _is_engine(file.parent))
    if not found:
        raise ValueError(
            f"--engine_dir {folder}: found no engine in it or below, expected config.json beside an .engine or "
            f".plan file, as build.py writes them"
        )
    return found


def _is_engine(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((*folder.glob("*.engine"), *folder.glob("*.plan")))


def _what_it_is(engine: AnyEngine) -> str:
    """As "float16 W4A16 g128, INT8 KV"."""
    config = engine.config
    words = [
        "" if isinstance(engine, Engine) else "TensorRT",
        config.precision,
        config.quant_algo,
        *(f"g{size}" for size in group_sizes(engine.plan)),
    ]
    return " ".join(filter(None, words)) + (", INT8 KV" if config.kv_dtype == "int8" else "")


def _unique(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Equal names get the names of their folders, and where these are equal too, their paths."""
    result = list(names)
    for labels in ([path.name for path in paths], [str(path) for path in paths]):
        result = [
            f"{name} ({label})" if result.count(current) > 1 else current
            for name, label, current in zip(names, labels, result, strict=True)
        ]
    return result
