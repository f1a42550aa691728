"""The SHA-256 of a weight in an engine file, made of pieces, so that many threads make it.

    digest of a weight = SHA-256( SHA-256(piece 0) || SHA-256(piece 1) || ... )

A piece is 16 MiB of the weight's bytes, the last one what is left; the inner digests are 32 raw bytes each, the outer
one is written in hex. A weight of one piece has the SHA-256 of its SHA-256, one without bytes that of nothing. Imports
no torch, so that weights can be checked while torch is imported; knows no file.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

logger = logging.getLogger(__name__)

# Part of the format. A thread needs the interpreter lock twice for a piece, once to read it and once to hash it: beside
# an import of torch, which hardly lets go of the lock, a thread made 0.45 GB/s of 16 MiB at a time, and 0.19 GB/s of
# 1 MiB. Alone it is as fast with either (two cores of an AMD EPYC, SHA extensions, file in the page cache).
PIECE_BYTES = 16 << 20


def num_threads() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def piece_begins(num_bytes: int) -> range:
    return range(0, num_bytes, PIECE_BYTES)


def pieces_of(data: memoryview) -> Iterator[memoryview]:
    """Of bytes in memory."""
    return (data[begin : begin + PIECE_BYTES] for begin in piece_begins(len(data)))


def piece_digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


def weight_digest(piece_digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(piece_digests)).hexdigest()


class DigestCheck:
    """Threads that make digests from now on; `finish` helps them and says which weight is not as written.

    `read(name, begin, into)` gives bytes of a weight, on any thread.
    """

    def __init__(self, read: Callable[[str, int, memoryview], None], sizes: Mapping[str, int]) -> None:
        self._read = read
        self._sizes = sizes
        self._pieces = [(name, begin) for name, size in sizes.items() for begin in piece_begins(size)]
        self._started = time.perf_counter()
        # What follows is of several threads, one at a time.
        self._lock = threading.Lock()
        self._pieces_left = iter(self._pieces)
        self._digests: dict[tuple[str, int], bytes] = {}
        self._failure: BaseException | None = None
        self._ended = self._started
        # One fewer than there are cores, for the thread that goes on. Daemons: a process may end before they do.
        count = min(num_threads() - 1, len(self._pieces))
        self._threads = [threading.Thread(target=self._work, name="weight digest", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> dict[str, str]:
        """The digest of every weight, once all are there; what a read failed over is raised here."""
        waits_from = time.perf_counter()
        self._work()
        for thread in self._threads:
            thread.join()
        if self._failure:
            raise self._failure
        logger.info(
            "every weight has a SHA-256: %.2f GB in %.2f s, %.2f s of it waited for",
            sum(self._sizes.values()) / 1e9,
            self._ended - self._started,
            max(0.0, self._ended - waits_from),
        )
        return {
            name: weight_digest(self._digests[name, begin] for begin in piece_begins(size))
            for name, size in self._sizes.items()
        }

    def stop(self) -> None:
        """Begin no further piece."""
        with self._lock:
            self._pieces_left = iter(())

    def _work(self) -> None:
        """What each thread does until no piece is left."""
        buffer: memoryview | None = None
        try:
            while piece := self._next_piece():
                name, begin = piece
                buffer = buffer or memoryview(bytearray(min(PIECE_BYTES, max(self._sizes.values()))))
                part = buffer[: self._sizes[name] - begin]
                self._read(name, begin, part)
                digest = piece_digest(part)
                with self._lock:
                    self._digests[piece] = digest
                    self._ended = time.perf_counter()
        except BaseException as error:  # raised again by `finish`
            self.stop()
            self._failure = self._failure or error

    def _next_piece(self) -> tuple[str, int] | None:
        with self._lock:
            return next(self._pieces_left, None)
