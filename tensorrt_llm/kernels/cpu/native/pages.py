"""Weights in huge pages: a token reads every weight once, and with pages of 4 KiB it waits for their addresses too.

Reading with two threads reaches 24 GB/s from small pages and 35 from huge ones (2 virtual cores of an EPYC 7003, at the
best of eight streams). A weight of an engine file is a view of the page cache, whose pages are small, so it is copied
once; the page cache may then drop its own.
"""

import torch

from .compiled import advise_huge_pages

_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64


class WeightPages:
    """Memory that is taken in chunks and given piece by piece; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, weight: torch.Tensor) -> torch.Tensor:
        """The same tensor without gaps, in huge pages where the system has them."""
        num_bytes = weight.numel() * weight.element_size()
        if num_bytes > len(self._free):
            self._free = _new_chunk(max(num_bytes, _CHUNK_BYTES))
        place = self._free[:num_bytes].view(weight.dtype).view(weight.shape)
        self._free = self._free[-(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES :]
        return place.copy_(weight)


def _new_chunk(num_bytes: int) -> torch.Tensor:
    memory = torch.empty(num_bytes + _PAGE_BYTES, dtype=torch.uint8)
    chunk = memory[-memory.data_ptr() % _PAGE_BYTES :][:num_bytes]
    advise_huge_pages(chunk.data_ptr(), num_bytes)
    return chunk
