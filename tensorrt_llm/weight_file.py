"""The weights that lie in an engine file: where each begins, the bytes there, and whether they are those written.

A weight is mapped into memory, which costs no copy, or read from its place by whoever wants it elsewhere. Every weight
has a SHA-256; all are checked together, on threads. Knows no header, plan or device.
"""

import hashlib
import logging
import mmap
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from .dtype import torch_dtype
from .plan import TensorSpec

logger = logging.getLogger(__name__)

# Digests are made of pieces that stay in a core's cache between being read and being hashed. One thread and a file in
# the page cache: 1.5 GB/s, 1.7 GB/s of the mapping, whose bytes are not copied (AMD EPYC, SHA extensions). But a file
# that is cut or cannot be read is an error here, and a signal that ends the process there.
_DIGEST_PIECE_BYTES = 1 << 20


class WeightFile(Mapping[str, torch.Tensor]):
    """Weights by name, in the order of the file. A ValueError names the file and what is wrong with it."""

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], offsets: Mapping[str, int], digests: Mapping[str, str]
    ) -> None:
        """`offsets` count from the beginning of the file."""
        self.path = path
        self.specs = {spec.name: spec for spec in specs}
        self._offsets = offsets
        self._digests = digests
        self._is_checked = False
        # One open file: what is mapped and what is read stay the same if another takes its name.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        # A private mapping may be written to by torch without reaching the file.
        self._mapping = memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY))

    def __getitem__(self, name: str) -> torch.Tensor:
        spec, begin = self.specs[name], self._offsets[name]
        flat = torch.frombuffer(self._mapping[begin : begin + spec.num_bytes], dtype=torch_dtype(spec.dtype))
        return flat.view([int(dim) for dim in spec.shape])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def read(self, name: str, begin: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a weight from its byte `begin` on, on any thread."""
        place = self._offsets[name] + begin
        while into:
            try:
                count = os.preadv(self._descriptor, [into], place)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be read at byte {place}: {error.strerror}") from error
            if not count:
                raise ValueError(f"{self.path}: ends at byte {place}, within weight {name}: the file was truncated")
            place, into = place + count, into[count:]

    def check(self) -> None:
        """Compare all weights with their digests, once."""
        with self.checking():
            pass

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Check on other threads while the body runs, and wait for them at its end; once, a second time is nothing.

        When the file is not as written, that is the error, also where the body failed over it.
        """
        if self._is_checked:
            yield
            return
        started = time.perf_counter()
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            # A digest is one thread's work: the longest ones first. hashlib lets go of the interpreter lock.
            longest_first = sorted(self.specs, key=lambda name: -self.specs[name].num_bytes)
            digests = {name: pool.submit(self._digest, name) for name in longest_first}
            try:
                yield
            except Exception:
                self._compare(digests)
                raise
            body_ended = time.perf_counter()
            self._compare(digests)
        finally:
            pool.shutdown(cancel_futures=True)
        self._is_checked = True
        logger.info(
            "every weight has its SHA-256: %.2f GB in %.2f s, the last %.2f s of it waited for",
            sum(spec.num_bytes for spec in self.specs.values()) / 1e9,
            time.perf_counter() - started,
            time.perf_counter() - body_ended,
        )

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        num_bytes = self.specs[name].num_bytes
        piece = memoryview(bytearray(min(_DIGEST_PIECE_BYTES, num_bytes)))
        for begin in range(0, num_bytes, len(piece)):
            part = piece[: num_bytes - begin]
            self.read(name, begin, part)
            digest.update(part)
        return digest.hexdigest()

    def _compare(self, digests: Mapping[str, Future[str]]) -> None:
        for name in self.specs:
            found, expected = digests[name].result(), self._digests[name]
            if found != expected:
                raise ValueError(
                    f"{self.path}: weight {name} has SHA-256 {found}, expected {expected}: "
                    f"the file was altered or damaged"
                )
