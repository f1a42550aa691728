"""Room on a disk, asked for before anything is written there. Knows nothing of engines."""

import shutil
from pathlib import Path


def check_room(folder: Path, num_bytes: int, content: str) -> None:
    """A ValueError if `content`, to be written in `folder`, takes more than is free there; it may not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(f"{folder}: the {content} takes {gib(num_bytes)}, the disk has {gib(free)} free")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
