"""The norm, MLP, matmul and gather launchers against the reference in float64, on odd sizes and poisoned outputs."""

import inspect

import pytest
import torch
from engines_of_modes import engine_of_mode

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import StepShape, reference, reference_kernels
from tensorrt_llm.kernels.cuda import (
    add_rms_norm,
    cuda_kernels,
    embedding,
    gated_mlp,
    gather_last_token,
    matmul,
    rms_norm,
)
from tensorrt_llm.kernels.cuda.gated_mlp import prepare_gated_mlp, silu_mul
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.executor import made_in_splits

DTYPES = ("float32", "float16", "bfloat16")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def roundoff(dtype: str) -> float:
    """The largest relative error of writing a real number as `dtype`; Triton's interpreter cuts bfloat16 off."""
    is_cut = dtype == "bfloat16" and not torch.cuda.is_available()
    return torch.finfo(torch_dtype(dtype)).eps / (1 if is_cut else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 100), (5, 1024), (2, 3584)])
def test_rms_norm_is_rounded_once(device: torch.device, dtype: str, tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, hidden, device=device) * 3
    weight = torch.randn(hidden, device=device).to(torch_dtype(dtype))
    wanted = reference.rms_norm(x.double(), weight.double(), eps=1e-6, dtype="float32")
    got = rms_norm(x, weight, eps=1e-6, dtype=dtype)
    # One rounding to `dtype`; in float32 the sum of `hidden` squares and three products are inexact too.
    tolerance = roundoff(dtype) + roundoff("float32") * (8 + hidden**0.5)
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 100), (2, 2048)])
def test_add_rms_norm_keeps_the_sum_in_float32(device: torch.device, dtype: str, tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, hidden, device=device) * 1e5  # beyond float16, as residual streams of Qwen are
    y = torch.randn(tokens, hidden, device=device).to(torch_dtype(dtype))
    weight = torch.randn(hidden, device=device).to(torch_dtype(dtype))
    total, normed = add_rms_norm(x, y, weight, eps=1e-6, dtype=dtype)
    wanted = reference.rms_norm((x + y.float()).double(), weight.double(), eps=1e-6, dtype="float32")
    assert torch.equal(total, x + y.float())
    tolerance = roundoff(dtype) + roundoff("float32") * (8 + hidden**0.5)
    torch.testing.assert_close(normed.float(), wanted, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("splits", "tokens", "hidden"), [(1, 3, 100), (2, 5, 100), (3, 2, 2048), (6, 1, 516)])
def test_add_rms_norm_adds_the_splits_of_a_product_in_order(
    device: torch.device, dtype: str, splits: int, tokens: int, hidden: int
) -> None:
    x = torch.randn(tokens, hidden, device=device)
    y = torch.randn(splits, tokens, hidden, device=device)
    weight = torch.randn(hidden, device=device).to(torch_dtype(dtype))
    total, normed = add_rms_norm(x, y, weight, eps=1e-6, dtype=dtype)
    addend = y[0].clone()
    for split in y[1:]:
        addend += split
    assert torch.equal(total, x + addend), "to the bit"
    assert torch.equal(normed, rms_norm(total, weight, eps=1e-6, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (3, 100), (2, 1376)])
def test_silu_mul_is_rounded_once(device: torch.device, dtype: str, tokens: int, width: int) -> None:
    x = (torch.randn(tokens, 2 * width, device=device) * 4).to(torch_dtype(dtype))
    activated, linear = x.double()[:, 0::2], x.double()[:, 1::2]
    wanted = (activated * activated.sigmoid() * linear).float()
    got = silu_mul(x, dtype=dtype)
    # exp, sum, quotient and product are each off by a few units of float32.
    torch.testing.assert_close(got.float(), wanted, rtol=roundoff(dtype) + 32 * roundoff("float32"), atol=1e-7)


def test_silu_of_large_numbers_is_finite(device: torch.device) -> None:
    x = torch.tensor([[-6e4, 1.0, 6e4, 1.0]], device=device).half()
    assert silu_mul(x, dtype="float16").tolist() == [[0.0, 6e4]]


# One token, tiles of tensor cores, and more than they take; depths within and beyond one piece, whole and odd.
@pytest.mark.parametrize("tokens", [1, 2, 17, 33])
@pytest.mark.parametrize("depth", [96, 257, 4352])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp_equals_its_two_matmuls(device: torch.device, dtype: str, depth: int, tokens: int) -> None:
    width = 35
    x, fc, gate = (
        torch.randn(rows, depth, device=device).to(torch_dtype(dtype)) / depth**0.25 for rows in (tokens, width, width)
    )
    wanted = reference.gated_mlp(x.double(), fc.double(), gate.double(), dtype="float32")
    got = gated_mlp(x, *prepare_gated_mlp(fc, gate, dtype=dtype), dtype=dtype)
    # cuBLAS rounds both products to `dtype`, with values up to about 4; the result is rounded once more.
    tolerance = roundoff(dtype) * 16 + roundoff("float32") * depth
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3, 32, 33])
@pytest.mark.parametrize("depth", [64, 257, 4352])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(dtype, out) for dtype in DTYPES for out in (dtype, "float32")])
def test_matmul_accumulates_in_float32(
    device: torch.device, dtype: str, out_dtype: str, has_bias: bool, depth: int, tokens: int
) -> None:
    x = torch.randn(tokens, depth, device=device).to(torch_dtype(dtype))
    weight = torch.randn(33, depth, device=device).to(torch_dtype(dtype)) / depth**0.5
    bias = torch.randn(33, device=device).to(torch_dtype(dtype)) if has_bias else None
    wanted = reference.matmul(x.double(), weight.double(), None if bias is None else bias.double(), dtype="float32")
    got = matmul(x, weight, bias, dtype=out_dtype)
    assert got.dtype == torch_dtype(out_dtype)
    # Sums of `depth` products whose squares add up to about one; the result, at most about 6, is rounded once (twice
    # when a bias is added).
    tolerance = 2 * roundoff(out_dtype) + roundoff("float32") * 8 * depth**0.5
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance)


def test_a_matmul_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    """Of 17 to 32 tokens, which are multiplied in the same tiles."""
    x = torch.randn(32, 640, device=device).half()
    weight = torch.randn(70, 640, device=device).half()
    together = matmul(x, weight, dtype="float16")
    assert torch.equal(matmul(x[3:20].contiguous(), weight, dtype="float16"), together[3:20])


def test_a_matmul_without_a_direct_kernel_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    x, weight = torch.ones(2, 8, dtype=torch.float64), torch.ones(4, 8)
    with caplog.at_level("WARNING"):
        matmul(x, weight, dtype="float32")
        matmul(x, weight, dtype="float32")
    assert [record.message for record in caplog.records] == [
        "matmul torch.float64 x torch.float32 -> torch.float32 on cpu has no direct kernel: both are cast to float32"
    ]


def test_embedding_and_gather_take_int32_rows(device: torch.device) -> None:
    table, rows = torch.randn(11, 6, device=device), torch.tensor([10, 0, 3, 3], dtype=torch.int32, device=device)
    assert torch.equal(embedding(rows, table), table[rows.long()])
    wide = torch.randn(3, 2500, device=device).half()
    assert torch.equal(embedding(rows[1:2], wide), wide[:1])
    assert torch.equal(embedding(rows[1:2], wide, dtype="float32"), wide[:1].float())
    assert embedding(rows[:0], wide, dtype="float32").shape == (0, 2500)
    prompts, decodes = StepShape(11, 4, 4, 11, 5, 5), StepShape(3, 3, 0, 0, 1, 5)
    assert torch.equal(gather_last_token(table, rows, step=prompts), table[rows.long()])
    assert gather_last_token(wide, torch.arange(3, dtype=torch.int32, device=device), step=decodes) is wide


@pytest.mark.parametrize("op", sorted(cuda_kernels()))
def test_a_launcher_has_the_signature_of_its_reference(op: str) -> None:
    kernel = cuda_kernels()[op]
    launcher, meaning = (inspect.signature(function.run).parameters for function in (kernel, reference_kernels()[op]))
    if kernel.prepare is None:
        assert [(p.name, p.kind, p.default) for p in launcher.values()] == [
            (p.name, p.kind, p.default) for p in meaning.values()
        ]
    else:  # its weights are repacked into fewer operands
        keywords = [name for name, p in meaning.items() if p.kind is p.KEYWORD_ONLY]
        assert [name for name, p in launcher.items() if p.kind is p.KEYWORD_ONLY] == keywords
    if kernel.run_in_splits:
        assert inspect.signature(kernel.run_in_splits) == inspect.signature(kernel.run)


def test_products_of_floats_leave_splits_and_the_norm_behind_them_adds_them() -> None:
    kernels = cuda_kernels()
    assert {op for op in kernels if kernels[op].run_in_splits} == {"matmul", "weight_only_quant_matmul"}
    assert {op for op in kernels if kernels[op].adds_splits} == {"add_rms_norm"}


@pytest.mark.parametrize(
    ("mode", "may_be_split"),
    [
        (QuantMode(0), True),
        (QuantMode.use_weight_only(), True),
        (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), True),
        (QuantMode.use_smooth_quant(per_token=True, per_channel=True), False),
        (QuantMode.use_smooth_quant(), False),
    ],
)
def test_what_norms_add_may_come_in_splits_unless_it_is_int8_or_batch_invariant(
    mode: QuantMode, may_be_split: bool
) -> None:
    plan = engine_of_mode(mode, dtype="float16", group_size=32).plan
    added = {node.inputs[1] for node in plan.nodes if node.op.startswith("add_rms_norm")}
    assert len(added) == 4, "two for each layer"
    assert made_in_splits(plan, cuda_kernels()) == (added if may_be_split else set())
    assert made_in_splits(plan, cuda_kernels(batch_invariant=True)) == set()
