"""The CPU's two tables of kernels, so that tests run with each: torch's, and those in C over them."""

from typing import Any

import pytest
import torch

from tensorrt_llm.kernels import Kernel
from tensorrt_llm.kernels.cpu import torch_kernels
from tensorrt_llm.kernels.cpu.native import native_kernels

needs_native = pytest.mark.skipif(
    not native_kernels(), reason="the kernels in C are not built, or this processor lacks AVX2, FMA or F16C"
)
_table: dict[str, Kernel] = {}


@pytest.fixture(params=["torch", pytest.param("native", marks=needs_native)])
def cpu_table(request: pytest.FixtureRequest) -> str:
    """Runs a test with either table; gives its name."""
    _table.clear()
    _table.update(torch_kernels() | (native_kernels() if request.param == "native" else {}))
    return request.param


def kernel(op: str) -> Kernel:
    return _table[op]


def run(op: str, *operands: torch.Tensor, weights: tuple[torch.Tensor, ...] = (), **attributes: Any) -> Any:
    """A kernel of the test's table, its weights prepared as the executor prepares them."""
    chosen = kernel(op)
    prepared = chosen.prepare(*weights, **attributes) if chosen.prepare else weights
    return chosen.run(*operands, *prepared, **attributes)
