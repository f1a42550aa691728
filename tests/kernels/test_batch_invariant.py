"""Batch-invariant matmuls: right, and each row with the same bits alone, in small steps and in large ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import kernels_for, reference_kernels
from tensorrt_llm.kernels.cuda.batch_invariant import batch_invariant_kernels
from tensorrt_llm.quantization.quantize import quantize_weight

DTYPES = ("float32", "float16", "bfloat16")
DEPTH, ROWS = 320, 70
MATMULS = sorted(set(batch_invariant_kernels()) - {"gpt_attention"})
OPS = [(op, bits) for op in MATMULS for bits in ((4, 8) if "weight_only" in op else (16,))]


def weights_of(op: str, dtype: str, device: torch.device, bits: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Operands of `op` after x, of size 1 / sqrt(DEPTH), and its attributes."""
    matrices = [torch.randn(ROWS, DEPTH, device=device) / DEPTH**0.5 for _ in range(2 if "gated" in op else 1)]
    if op in ("matmul", "gated_mlp"):
        return tuple(matrix.to(torch_dtype(dtype)) for matrix in matrices), dict(dtype=dtype)
    quantized = [quantize_weight(matrix, bits, 64) for matrix in matrices]
    zero = torch.ones_like(quantized[0].scale, dtype=torch.int16)
    operands = tuple(tensor for weight in quantized for tensor in (weight.weight, weight.scale, zero))
    return operands, dict(bits=bits, has_zero=True, dtype=dtype)


def multiplier(op: str, weights: tuple[torch.Tensor, ...], attributes: dict[str, Any]) -> Callable[..., torch.Tensor]:
    kernel = batch_invariant_kernels()[op]
    prepared = kernel.prepare(*weights, **attributes) if kernel.prepare else weights
    return lambda x: kernel.run(x, *prepared, **attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "bits"), OPS)
def test_a_row_has_the_same_bits_in_any_step(device: torch.device, op: str, bits: int, dtype: str) -> None:
    multiply = multiplier(op, *weights_of(op, dtype, device, bits))
    x = torch.randn(131, DEPTH, device=device).to(torch_dtype(dtype))
    together = multiply(x)
    for rows in (slice(0, 1), slice(70, 71), slice(60, 68), slice(1, 66)):
        assert torch.equal(multiply(x[rows].contiguous()), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "bits"), OPS)
def test_it_means_what_the_reference_means(device: torch.device, op: str, bits: int, dtype: str) -> None:
    weights, attributes = weights_of(op, dtype, device, bits)
    x = torch.randn(67, DEPTH, device=device).to(torch_dtype(dtype))
    wanted = reference_kernels()[op].run(
        x.double(), *(weight.double() if op in ("matmul", "gated_mlp") else weight for weight in weights),
        **attributes | {"dtype": "float32"},
    )  # fmt: skip
    got = multiplier(op, weights, attributes)(x)
    # Values up to about 16, rounded once (cut off by Triton's interpreter in bfloat16), after sums of DEPTH products.
    tolerance = torch.finfo(torch_dtype(dtype)).eps + torch.finfo(torch.float32).eps * 8 * DEPTH**0.5
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def test_the_cpu_says_that_it_does_not_hold_it(caplog: pytest.LogCaptureFixture) -> None:
    kernels_for(torch.device("cpu"), batch_invariant=True)
    assert "on CUDA only" in caplog.text
