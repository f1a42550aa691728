"""Engine files taken apart and put together again, with a right digest on whatever they hold."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGEST = b"0" * 64


@dataclass
class EngineParts:
    """The header as objects, metadata unpacked, and the weights' bytes."""

    entries: dict[str, Any]
    metadata: dict[str, Any]
    engine: Any
    digests: Any
    data: bytes

    @classmethod
    def read(cls, path: Path) -> "EngineParts":
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        engine, digests = json.loads(metadata.pop("engine")), json.loads(metadata.pop("weights_sha256"))
        return cls(entries, metadata, engine, digests, raw[8 + length :])

    def write(self, path: Path) -> Path:
        """The file as a builder with these parts would write it: its header's digest is right."""
        metadata = {
            **self.metadata,
            "engine": json.dumps(self.engine),
            "weights_sha256": json.dumps(self.digests),
        }
        if "header_sha256" in metadata:
            metadata["header_sha256"] = DIGEST.decode()
        header = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        digest = hashlib.sha256(header).hexdigest().encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header.replace(DIGEST, digest) + self.data)
        return path


def rewrite(path: Path, change: Callable[[EngineParts], object]) -> Path:
    """Edit an engine file in place."""
    parts = EngineParts.read(path)
    change(parts)
    return parts.write(path)
