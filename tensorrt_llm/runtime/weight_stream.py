"""Weights on their way from an engine file to a device, read ahead of whoever takes them.

    file --- reader threads ---> staging buffers --- copies, on a stream of their own ---> weights on the device

A weight of the mapping would be copied by one thread, page by page and through memory of the driver's: a few GB/s. Here
a GPU fetches one buffer by itself while threads fill others. What is read ahead is bounded, on the host by the buffers,
on the device in bytes, so that a weight can be packed anew and let go of before the last one is there. Knows no node
and no kernel.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import torch

from ..dtype import torch_dtype
from ..weight_file import WeightFile
from .transfers import staging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadAhead:
    """How much is under way at a time."""

    # A thread takes 6 to 13 GB/s out of the page cache (AMD EPYC), PCIe 5 takes 50 GB/s. The cores are shared with the
    # threads that check digests.
    num_readers: int = 8
    # A reader fills one buffer while the other is copied: 128 MiB in all. A copy of 8 MiB takes 0.2 ms, so that
    # launching it counts for little, and memory takes longer to pin the more it is.
    buffer_bytes: int = 8 << 20
    # 20 ms of copies: as long as the thread that takes weights may stay away without the copies coming to a halt.
    device_bytes: int = 1 << 30


@contextmanager
def read_ahead(
    weights: Mapping[str, torch.Tensor], order: Sequence[str], device: torch.device
) -> Iterator[Callable[[str], torch.Tensor]]:
    """Gives the weight of a name; the names are asked for in this order, each once.

    Weights that lie in a file are then on `device`. The others, and for the CPU those of a file too, are as they are.
    """
    if device.type == "cpu" or not isinstance(weights, WeightFile):
        yield weights.__getitem__
        return
    stream = WeightStream(weights, order, device)
    with stream.open():
        started = time.perf_counter()
        yield stream.take
    seconds = time.perf_counter() - started
    num_bytes = sum(weights.specs[name].num_bytes for name in order)
    logger.info(
        "weights: %.2f GB in %.2f s, %.1f GB/s, %.2f s of it waiting for the file",
        num_bytes / 1e9,
        seconds,
        num_bytes / 1e9 / seconds,
        stream.waited_seconds,
    )


class _Piece(NamedTuple):
    """Bytes of a weight that are read and copied at a time."""

    name: str
    begin: int
    num_bytes: int


@dataclass
class _Arriving:
    """A weight of which pieces are under way."""

    data: torch.Tensor  # uint8 on the device
    bytes_left: int
    copied: torch.cuda.Event | None = None


class WeightStream:
    """While it is open, threads read the weights of `order`, and `take` gives them in this order."""

    def __init__(
        self, weights: WeightFile, order: Sequence[str], device: torch.device, ahead: ReadAhead | None = None
    ) -> None:
        self.waited_seconds = 0.0  # in `take`
        self.bytes_ahead = 0  # on the device and not taken
        self._weights = weights
        self._device = device
        self._ahead = ahead or ReadAhead()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order = iter(order)
        self._pieces = _cut(weights, order, self._ahead.buffer_bytes)
        # What follows is of several threads, one at a time.
        self._changed = threading.Condition()
        self._next_piece = 0
        self._arriving: dict[str, _Arriving] = {}
        self._failure: BaseException | None = None
        self._is_closed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        count = min(self._ahead.num_readers, len(self._pieces))
        readers = [threading.Thread(target=self._read, name="weight reader", daemon=True) for _ in range(count)]
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            for reader in readers:
                reader.join()

    def take(self, name: str) -> torch.Tensor:
        """The next weight, for what the current stream is given from now on."""
        assert name == next(self._order), f"{name} is taken out of turn"
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._is_there(name))
            if self._failure:
                raise self._failure
            weight = self._arriving.pop(name)
            self.bytes_ahead -= len(weight.data)
            self._changed.notify_all()
        self.waited_seconds += time.perf_counter() - started
        if weight.copied:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(weight.copied)
            weight.data.record_stream(current)  # it is the memory of the other stream
        spec = self._weights.specs[name]
        return weight.data.view(torch_dtype(spec.dtype)).view([int(dim) for dim in spec.shape])

    def _is_there(self, name: str) -> bool:
        return name in self._arriving and not self._arriving[name].bytes_left

    def _read(self) -> None:
        """What a reader thread does until nothing is left."""
        try:
            with torch.cuda.stream(self._stream):
                size = max(piece.num_bytes for piece in self._pieces)
                for buffer in cycle([_Buffer(size, self._device) for _ in range(2)]):
                    piece = self._begin_piece()
                    if piece is None:
                        return
                    self._weights.file.read(piece.name, piece.begin, buffer.room(piece.num_bytes))
                    weight = self._arriving[piece.name]
                    buffer.copy_to(weight.data[piece.begin : piece.begin + piece.num_bytes])
                    self._end_piece(weight, piece)
                    del weight  # or a reader that waits would keep it alive after it was taken
        except BaseException as error:  # raised again in the thread that takes weights
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _begin_piece(self) -> _Piece | None:
        """The next piece as soon as there is room for its weight; None: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._has_room(self._pieces[self._next_piece]))
            if self._is_over:
                return None
            piece = self._pieces[self._next_piece]
            self._next_piece += 1
            if piece.begin == 0:
                num_bytes = self._weights.specs[piece.name].num_bytes
                data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                self._arriving[piece.name] = _Arriving(data, bytes_left=num_bytes)
                self.bytes_ahead += num_bytes
            return piece

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._failure is not None or self._next_piece == len(self._pieces)

    def _has_room(self, piece: _Piece) -> bool:
        """A weight larger than all the room has it for itself."""
        wanted = self.bytes_ahead + self._weights.specs[piece.name].num_bytes
        return piece.begin > 0 or self.bytes_ahead == 0 or wanted <= self._ahead.device_bytes

    def _end_piece(self, weight: _Arriving, piece: _Piece) -> None:
        with self._changed:
            weight.bytes_left -= piece.num_bytes
            if weight.bytes_left == 0:
                if self._stream:
                    # All pieces were given to the one stream by now: when it comes here, the weight is there.
                    weight.copied = torch.cuda.Event()
                    weight.copied.record(self._stream)
                self._changed.notify_all()


class _Buffer:
    """Staging memory for one copy after the other."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = staging(num_bytes, torch.uint8, device)
        # A thread that waits for a blocking event leaves its core to others.
        self._copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._used = 0

    def room(self, num_bytes: int) -> memoryview:
        """The first bytes, as soon as the last copy is through."""
        if self._copied:
            self._copied.synchronize()
        self._used = num_bytes
        return self._memory[:num_bytes].numpy().data

    def copy_to(self, target: torch.Tensor) -> None:
        target.copy_(self._memory[: self._used], non_blocking=True)
        if self._copied:
            self._copied.record()


def _cut(weights: WeightFile, order: Sequence[str], piece_bytes: int) -> list[_Piece]:
    return [
        _Piece(name, begin, min(piece_bytes, weights.specs[name].num_bytes - begin))
        for name in order
        for begin in range(0, weights.specs[name].num_bytes, piece_bytes)
    ]
