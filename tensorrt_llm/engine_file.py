"""The file of an engine as bytes: its header, where each weight lies, and whether all is as it was written.

An engine file is a valid safetensors file [1]: u64 header length, JSON header, tensors. Weights lie there in one
canonical layout ([out, in] for matrices); kernels make their own layouts at load. The header's metadata holds

    format, format_version   what this is
    engine                   JSON: the config (model facts, mapping, limits) and the plan
    weights_sha256           JSON: weight name -> SHA-256 over the SHA-256 of its pieces, by weight_digests.py
    header_sha256            SHA-256 of the header with this digest written as zeros

so a flipped bit anywhere is found, and found before anything is used. No code, no pickle. Imports no torch: a script
may have the weights checked while it imports torch. What is in the config and the plan is engine.py's.

[1] https://github.com/huggingface/safetensors, section "Format".
"""

import hashlib
import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from .weight_digests import DigestCheck

FORMAT = "tensorrt_llm.engine"
FORMAT_VERSION = "4"

ZERO_DIGEST = "0" * 64
# The plan of an 80-layer model takes 0.5 MB; a length beyond this is a lie, not a header.
_MAX_HEADER_BYTES = 64 << 20


class EngineFile:
    """An engine file that is open, its header read. A ValueError names the file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            if not path.is_file():
                raise ValueError("no such engine file")
            # One open file: what is mapped and what is read stay the same if another takes its name.
            self.descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)
            self.num_bytes = os.fstat(self.descriptor).st_size
            # Tensors as safetensors describes them, by name, and where in the file their bytes begin.
            self.tensors, self.data_start = _read_header(self.descriptor, self.num_bytes)
            self.metadata: dict[str, Any] = self.tensors.pop("__metadata__")
        self._check: DigestCheck | None = None
        self._is_checked = False

    @classmethod
    def of_folder(cls, engine_dir: Path, rank: int = 0) -> "EngineFile":
        """The file of `rank` in a folder that build.py wrote."""
        return cls(engine_path(engine_dir, read_builder_config(engine_dir), rank))

    def metadata_object(self, key: str) -> dict[str, Any]:
        """An object that lies in the metadata as JSON."""
        try:
            value = json.loads(self.metadata.get(key, ""))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata {key} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"metadata {key} is {type(value).__name__}, expected an object")
        return value

    @property
    def header_sha256(self) -> str:
        return str(self.metadata["header_sha256"])

    def place(self, name: str) -> tuple[int, int]:
        """Where in the file a weight begins, and its bytes."""
        entry = self.tensors[name]
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        match offsets:
            case [int(begin), int(end)] if 0 <= begin <= end <= self.num_bytes - self.data_start:
                return self.data_start + begin, end - begin
        raise ValueError(f"{self.path}: tensor {name} is {shortened(entry)}, expected data_offsets within the file")

    def read(self, name: str, begin: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a weight from its byte `begin` on, on any thread."""
        place = self.place(name)[0] + begin
        while into:
            try:
                count = os.preadv(self.descriptor, [into], place)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be read at byte {place}: {error.strerror}") from error
            if not count:
                raise ValueError(f"{self.path}: ends at byte {place}, within weight {name}: the file was truncated")
            place, into = place + count, into[count:]

    def begin_check(self) -> None:
        """Have other threads make the digests of the weights from now on, unless they do or did."""
        if self._is_checked or self._check:
            return
        sizes = {name: self.place(name)[1] for name in self.tensors}
        if sum(sizes.values()) != self.num_bytes - self.data_start:
            raise ValueError(f"{self.path}: its tensors do not fill it: truncated or of another engine")
        self._check = DigestCheck(self.read, sizes)

    def check(self) -> None:
        """Compare all weights with their digests, once."""
        with self.checking():
            pass

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Check on other threads while the body runs, and wait for them at its end; once, a second time is nothing.

        When the file is not as written, that is the error, also where the body failed over it.
        """
        self.begin_check()
        check = self._check
        try:
            yield
        except Exception:
            self._finish(check)
            raise
        except BaseException:
            self._stop(check)
            raise
        self._finish(check)

    def _finish(self, check: DigestCheck | None) -> None:
        """Compare what `check` made; None: all was compared before. Several threads may wait for one check."""
        if check is None:
            return
        try:
            digests = check.finish()
            expected = self.metadata_object("weights_sha256")
            for name, found in digests.items():
                if found != expected.get(name):
                    raise ValueError(
                        f"{self.path}: weight {name} has SHA-256 {found}, expected {expected.get(name)}: "
                        f"the file was altered or damaged"
                    )
        finally:
            self._stop(check)
        self._is_checked = True

    def _stop(self, check: DigestCheck | None) -> None:
        if check:
            check.stop()
        self._check = None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is wrong with a file is a ValueError that begins with its name."""
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def engine_path(engine_dir: Path, builder_config: Mapping[str, Any], rank: int) -> Path:
    """The engine file of `rank` in a folder, by what its config.json says."""
    tp, pp = builder_config["tensor_parallel"], builder_config["pipeline_parallel"]
    middle = f"tp{tp}_pp{pp}" if pp > 1 else f"tp{tp}"
    return engine_dir / f"{builder_config['name']}_{builder_config['precision']}_{middle}_rank{rank}.engine"


def read_builder_config(engine_dir: Path) -> dict[str, Any]:
    """The builder_config of an engine folder, with the keys that lead to its files."""
    path = engine_dir / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); is {path.parent} a folder that build.py wrote?"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path}: not JSON ({error})") from error
    section = data.get("builder_config") if isinstance(data, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path}: has no object builder_config")
    for key, kind in (("name", str), ("precision", str), ("tensor_parallel", int), ("pipeline_parallel", int)):
        if not isinstance(section.get(key), kind):
            found = shortened(section.get(key))
            raise ValueError(f"{path}: builder_config.{key} is {found}, expected {kind.__name__}")
    for key in ("name", "precision"):
        if not section[key].isidentifier():
            raise ValueError(f"{path}: builder_config.{key} is {shortened(section[key])}, expected a plain name")
    return section


def _read_header(descriptor: int, file_size: int) -> tuple[dict[str, Any], int]:
    """The JSON header, its own digest checked, and where the data begins."""
    with open(descriptor, "rb", closefd=False) as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"file has {file_size} bytes, too few for an engine")
        (length,) = struct.unpack("<Q", prefix)
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_size - 8):
            raise ValueError(f"header length is {length}, expected 2 to {min(_MAX_HEADER_BYTES, file_size - 8)}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header is not JSON ({error})") from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else None
        raise ValueError(f"format is {found!r}, expected {FORMAT!r}: not an engine of this project")
    if metadata.get("format_version") != FORMAT_VERSION:
        found = metadata.get("format_version")
        raise ValueError(f"format_version is {found!r}, this version reads {FORMAT_VERSION!r}; rebuild the engine")
    digest = metadata.get("header_sha256")
    if not isinstance(digest, str) or len(digest) != 64 or raw.count(digest.encode()) != 1:
        raise ValueError(f"header_sha256 is {digest!r}, expected one SHA-256 in hex")
    computed = hashlib.sha256(raw.replace(digest.encode(), ZERO_DIGEST.encode())).hexdigest()
    if computed != digest:
        raise ValueError(f"header has SHA-256 {computed}, expected {digest}: the file was altered or damaged")
    header["__metadata__"] = metadata
    return header, 8 + length
