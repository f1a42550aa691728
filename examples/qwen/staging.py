"""Folders that appear whole or not at all: what is made is kept aside until it is finished."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging_dir(output_dir: Path) -> Iterator[Path]:
    """A folder inside the output folder that is gone afterwards, also when the build fails or is interrupted."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file, expected a folder or a name that is free")
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=output_dir) as staging:
            yield Path(staging)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def publish(staging: Path, output_dir: Path) -> None:
    """Move the finished files into place; config.json, which makes a folder an engine, comes last."""
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(output_dir / file.name)
