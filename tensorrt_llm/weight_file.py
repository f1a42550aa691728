"""The weights that lie in an engine file, as tensors.

A weight is mapped into memory, which costs no copy; whoever wants it elsewhere reads its bytes from its place
(engine_file.py). Knows no header, plan or device.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence

import torch

from .dtype import torch_dtype
from .engine_file import EngineFile
from .plan import TensorSpec


class WeightFile(Mapping[str, torch.Tensor]):
    """Weights by name, in the order of the file."""

    def __init__(self, file: EngineFile, specs: Sequence[TensorSpec]) -> None:
        self.file = file
        self.specs = {spec.name: spec for spec in specs}
        # A private mapping may be written to by torch without reaching the file.
        self._mapping = memoryview(mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_COPY))

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        begin, num_bytes = self.file.place(name)
        flat = torch.frombuffer(self._mapping[begin : begin + num_bytes], dtype=torch_dtype(spec.dtype))
        return flat.view([int(dim) for dim in spec.shape])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
