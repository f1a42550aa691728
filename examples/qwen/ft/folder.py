"""An FT folder: its config.ini and its tensors, written and read back. What lies where, layout.py says.

Opening reads config.ini alone; `check` proves that the files are there, whole, and of the right model; tensors are
mapped when they are read, so a loader holds what it uses.
"""

import ast
import configparser
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorrt_llm.dtype import PRECISIONS, torch_dtype
from tensorrt_llm.models.qwen.config import QWenConfig

from .layout import ALWAYS, KV_SCALE, SMOOTHED, UNQUANTIZED, UNSMOOTHED, FtFile, FtLayout

CONFIG_FILE = "config.ini"
CALIBRATION_FILE = "calibration_ids.npy"
_SECTION = "qwen"
_NAMES_PER_LIST = 8  # a longer list in an error is cut, with a count
_PIECE = 1 << 24  # elements that are cast and written at a time


@dataclass(frozen=True)
class FtFolder:
    """One <tp>-gpu folder: the model it is of, and how it was converted."""

    path: Path
    config: QWenConfig
    tp_size: int
    storage_dtype: str
    smoothquant: str | None = None  # alpha, or "auto"; None: there are no int8 weights
    has_unquantized: bool = True  # the weights of the checkpoint in storage_dtype
    has_kv_scale: bool = False

    @classmethod
    def open(cls, path: str | Path, tp_size: int) -> "FtFolder":
        """The folder `path`, or <tp_size>-gpu in it."""
        folder = _locate(Path(path), tp_size)
        file = folder / CONFIG_FILE
        settings = _read_ini(file)
        found = _setting(settings, "tensor_parallelism", file)
        if found != str(tp_size):
            raise ValueError(
                f"{file}: tensor_parallelism is {found}, expected {tp_size}, the number of tensor-parallel ranks; "
                f"convert with --tensor-parallelism {tp_size}"
            )
        storage_dtype = _setting(settings, "storage_dtype", file)
        if storage_dtype not in PRECISIONS:
            raise ValueError(f"{file}: storage_dtype is {storage_dtype!r}, expected one of {', '.join(PRECISIONS)}")
        smoothquant = _setting(settings, "smoothquant", file)
        return cls(
            folder,
            QWenConfig.from_dict({key: _literal(text) for key, text in settings.items()}, str(file)),
            tp_size,
            storage_dtype,
            None if smoothquant == "None" else smoothquant,
            # A folder without this key is the original converter's: its copies are smoothed and don't fit together.
            smoothquant == "None" or settings.get("keep_unquantized") == "True",
            settings.get("calibrate_kv_cache") == "True",
        )

    @cached_property
    def layout(self) -> FtLayout:
        return FtLayout(self.config, self.tp_size, self.storage_dtype)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the folder holds."""
        is_smoothed = self.smoothquant is not None
        held = {
            ALWAYS: True,
            UNQUANTIZED: self.has_unquantized,
            UNSMOOTHED: self.has_unquantized and is_smoothed,
            SMOOTHED: is_smoothed,
            KV_SCALE: self.has_kv_scale,
        }
        return tuple(part for part, is_held in held.items() if is_held)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.layout.files(self.parts))

    @property
    def calibration_ids(self) -> Path | None:
        """The file of the token ids that the folder was calibrated with."""
        file = self.path / CALIBRATION_FILE
        return file if file.is_file() else None

    def check(self, config: QWenConfig, parts: Collection[str]) -> None:
        """Prove that the folder is of this model and that the files of these parts are there and whole."""
        for field in fields(QWenConfig):
            found, expected = getattr(self.config, field.name), getattr(config, field.name)
            if found != expected:
                raise ValueError(
                    f"{self.path / CONFIG_FILE}: {field.name} is {found!r}, expected {expected!r} as the Hugging Face "
                    f"checkpoint has it: the folder was converted from another model"
                )
        missing, damaged = [], []
        for file in self.layout.files(parts):
            path = self.path / file.name
            if not path.is_file():
                missing.append(file.name)
            elif path.stat().st_size != file.num_bytes:
                damaged.append(
                    f"{file.name} has {path.stat().st_size} bytes, expected {file.num_bytes} of {file.dtype} "
                    f"{list(file.shape)}"
                )
        faults = [
            f"{len(names)} {what}: {_cut(names)}"
            for what, names in (("missing", missing), ("of wrong size", damaged))
            if names
        ]
        if faults:
            raise ValueError(f"{self.path}: {'; '.join(faults)}; run hf_qwen_convert.py again")

    def write(self, path: str, file: str, whole: torch.Tensor) -> None:
        """Write a whole tensor of the network, [out, in] or a vector, for all ranks."""
        parts = self.layout.split(path, file, whole)
        for target, part in zip(self.layout.files_of(path, file), parts, strict=True):
            self._write(target, part)

    def read(self, path: str, file: str) -> torch.Tensor:
        """The whole tensor, joined from all ranks. It may be mapped: don't write to it."""
        parts = [self._read(source) for source in self.layout.files_of(path, file)]
        return self.layout.join(path, file, parts)

    def read_of_rank(self, path: str, file: str, rank: int) -> torch.Tensor:
        """A rank's part of the tensor."""
        sources = self.layout.files_of(path, file)
        return self.layout.of_rank(path, file, self._read(sources[rank if "{r}" in file else 0]), rank)

    def _write(self, file: FtFile, part: torch.Tensor) -> None:
        assert tuple(part.shape) == file.shape, f"{file.name}: {tuple(part.shape)}, expected {file.shape}"
        rows_at_once = max(1, _PIECE // (part.numel() // part.shape[0]))
        with (self.path / file.name).open("xb") as stream:
            for piece in part.split(rows_at_once):
                stored = piece.to(torch_dtype(file.dtype)).cpu().contiguous()
                if stored.is_floating_point() and not stored.isfinite().all():
                    largest = torch.finfo(stored.dtype).max
                    raise ValueError(
                        f"{file.name}: holds {piece.float().abs().max().item():g}, which {file.dtype} cannot (at most "
                        f"{largest:g}); use --storage-type bfloat16 or float32"
                    )
                stream.write(stored.view(-1).view(torch.uint8).numpy().data)

    def _read(self, file: FtFile) -> torch.Tensor:
        # Copy on write: torch wants memory that it may write to, and the file must not change.
        data = np.memmap(self.path / file.name, dtype=np.uint8, mode="c")
        tensor = torch.from_numpy(data).view(torch_dtype(file.dtype)).view(file.shape)
        if file.is_scale:
            is_sound = tensor.isfinite() & (tensor > 0)
            if not is_sound.all():
                raise ValueError(
                    f"{self.path / file.name}: holds {tensor[~is_sound][0].item()}, expected finite scales above zero"
                )
        return tensor


def write_config(folder: FtFolder, hf_config: dict[str, Any], settings: dict[str, Any]) -> None:
    """config.ini: every attribute of the HF config and every setting, as Python prints them."""
    values = {key: value for key, value in hf_config.items() if key.isidentifier()}
    values |= settings
    values |= {"storage_dtype": folder.storage_dtype, "multi_query_mode": False}
    ini = _parser()
    ini[_SECTION] = {key: str(value) for key, value in values.items()}
    with (folder.path / CONFIG_FILE).open("w", encoding="utf-8") as stream:
        ini.write(stream)


def _read_ini(file: Path) -> dict[str, str]:
    ini = _parser()
    try:
        ini.read_string(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}), expected the config of an FT folder") from error
    except (configparser.Error, ValueError) as error:
        raise ValueError(f"{file}: not a readable ini file ({error})") from error
    if _SECTION not in ini:
        raise ValueError(f"{file}: has the sections {ini.sections()}, expected [{_SECTION}]")
    return dict(ini[_SECTION])


def _parser() -> configparser.ConfigParser:
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str  # type: ignore[assignment, method-assign]  # keys keep their case
    return ini


def _setting(settings: dict[str, str], key: str, file: Path) -> str:
    if key not in settings:
        raise ValueError(f"{file}: has no key {key}, expected one as hf_qwen_convert.py writes it")
    return settings[key]


def _literal(text: str) -> Any:
    """The value that Python printed as `text`; what is no literal is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _locate(path: Path, tp_size: int) -> Path:
    folder = path if path.name.endswith("-gpu") else path / f"{tp_size}-gpu"
    if not folder.is_dir():
        siblings = sorted(found.name for found in folder.parent.glob("*-gpu"))
        raise ValueError(
            f"{folder}: no such folder, expected what hf_qwen_convert.py --tensor-parallelism {tp_size} writes; "
            f"{folder.parent} has {', '.join(siblings) or 'no folder <tp>-gpu'}"
        )
    return folder


def _cut(names: list[str]) -> str:
    more = len(names) - _NAMES_PER_LIST
    return ", ".join(names[:_NAMES_PER_LIST]) + (f" and {more} more" if more > 0 else "")
