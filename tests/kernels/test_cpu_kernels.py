"""The CPU kernels, torch's and those in C, against the reference in float64, on odd sizes, in every precision."""

import inspect
import math
from typing import Any

import pytest
import torch
from cpu_tables import kernel, run
from paged_steps import PagedSteps, Sequence3, Setting

from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import kernels_for, reference, reference_kernels
from tensorrt_llm.kernels.cpu import cpu_kernels

pytestmark = pytest.mark.usefixtures("cpu_table")
DTYPES = ("float32", "float16", "bfloat16")
CONTEXTS: list[Sequence3] = [(0, 9, 9), (0, 3, 7), (21, 37, 58), (16, 16, 32), (3, 1, 4), (0, 1, 1)]
DECODES: list[Sequence3] = [(15, 1, 15), (16, 1, 9), (17, 1, 1), (130, 1, 40), (1, 1, 1)]


def roundoff(dtype: str) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(torch_dtype(dtype)).eps / 2


def normal(*shape: int, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(*shape).to(torch_dtype(dtype))


# Matmuls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 7, 3), (1, 513, 65), (2, 64, 64), (5, 129, 31), (33, 7, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_matmul_is_rounded_once(rows: int, inner: int, columns: int, dtype: str, has_bias: bool) -> None:
    x, weight = normal(rows, inner, dtype=dtype), normal(columns, inner, dtype=dtype)
    weights = (weight, normal(columns, dtype=dtype)) if has_bias else (weight,)
    found = run("matmul", x, weights=weights, dtype=dtype)
    wanted = reference.matmul(*(tensor.double() for tensor in (x, *weights)), dtype="float32")
    assert found.dtype == torch_dtype(dtype)
    # A float32 sum of `inner` unit products is off by sqrt(inner) terms' roundings of its size, sqrt(inner).
    torch.testing.assert_close(
        found.float(), wanted, rtol=1.01 * roundoff(dtype), atol=4 * (inner + 8) * roundoff("float32")
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_float32_all_the_way(rows: int, dtype: str) -> None:
    x, weight = normal(rows, 65, dtype=dtype), normal(97, 65, dtype=dtype)
    found = run("matmul", x, weights=(weight,), dtype="float32")
    wanted = reference.matmul(x.double(), weight.double(), dtype="float32")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 73 * roundoff("float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 7, 3), (1, 200, 33), (2, 64, 64), (7, 33, 129)])
def test_gated_mlp_matches_the_reference(rows: int, inner: int, width: int, dtype: str) -> None:
    scale = inner**-0.5  # branches of unit size
    x, fc, gate = normal(rows, inner, dtype=dtype), *(normal(width, inner) * scale for _ in range(2))
    fc, gate = fc.to(x.dtype), gate.to(x.dtype)
    found = run("gated_mlp", x, weights=(fc, gate), dtype=dtype)
    wanted = reference.gated_mlp(x.double(), fc.double(), gate.double(), dtype="float32")
    assert found.dtype == x.dtype
    # Branches may be rounded to the dtype before their product: each up to 5 in size, and silu's slope is below 1.1.
    tolerance = (1 + 2 * 1.1 * 5) * roundoff(dtype) + 8 * math.sqrt(inner) * roundoff("float32")
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=5 * tolerance)


# Norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 7), (5, 129), (2, 1024)])
def test_rms_norm_is_rounded_once(rows: int, hidden: int, stored: str, dtype: str) -> None:
    x, weight = normal(rows, hidden, dtype=stored) * 3, normal(hidden, dtype=dtype)
    found = run("rms_norm", x, weights=(weight,), eps=1e-6, dtype=dtype)
    wanted = reference.rms_norm(x.double(), weight.double(), eps=1e-6, dtype="float32")
    assert found.dtype == torch_dtype(dtype)
    tolerance = 1.01 * roundoff(dtype) + (8 + math.sqrt(hidden)) * roundoff("float32")
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_keeps_the_residual_in_float32(dtype: str) -> None:
    x, y, weight = normal(5, 129) * 1e5, normal(5, 129, dtype=dtype), normal(129, dtype=dtype)
    total, normed = run("add_rms_norm", x, y, weights=(weight,), eps=1e-6, dtype=dtype)
    assert torch.equal(total, x + y.float())
    wanted = reference.rms_norm(total.double(), weight.double(), eps=1e-6, dtype="float32")
    tolerance = 1.01 * roundoff(dtype) + 20 * roundoff("float32")
    torch.testing.assert_close(normed.float(), wanted, rtol=tolerance, atol=1e-7)


# Attention


def assert_attention_matches(steps: PagedSteps) -> None:
    """q, k, probabilities and result are rounded to the dtype; angles are off by roundings of the position."""
    found = steps.run(kernel("gpt_attention").run).double()
    wanted = steps.run(reference.gpt_attention, torch.float64)
    longest = max(cached + new for cached, new, _ in steps.sequences)
    single = roundoff("float32") * (16 + longest + math.sqrt(steps.setting.head_size))
    narrow = torch.finfo(steps.dtype).eps / 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=5 * (6 * narrow + single))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 20), (4, 2, 16), (7, 1, 24), (14, 2, 6)])
@pytest.mark.parametrize("tokens_per_block", [1, 16])
def test_a_mixed_step_matches_the_reference(
    heads: int, kv_heads: int, size: int, tokens_per_block: int, dtype: str
) -> None:
    setting = Setting(heads, kv_heads, size, 1.25, rotary_dim=size, ntk_length=32, logn_length=32)
    assert_attention_matches(PagedSteps(CONTEXTS + DECODES, setting, torch_dtype(dtype), tokens_per_block))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [CONTEXTS, DECODES, CONTEXTS[:1], DECODES[:1]], ids=len)
def test_steps_of_one_kind_match_the_reference(sequences: list[Sequence3], dtype: str) -> None:
    assert_attention_matches(PagedSteps(sequences, Setting(), torch_dtype(dtype), 16))


@pytest.mark.parametrize("prompt", [15, 16, 17, 32, 33])
def test_long_context_rules_are_the_definition(prompt: int) -> None:
    """S = 16; in prefill, and in decodes right after it, after growing beyond S, and beyond 4 S."""
    decodes = [(prompt, 1, prompt), (prompt + 9, 1, prompt), (70, 1, prompt)]
    setting = Setting(ntk_length=16, logn_length=16)
    steps = PagedSteps([(0, prompt, prompt), *decodes], setting, torch.float32, 8)
    found = steps.run(kernel("gpt_attention").run).double()
    torch.testing.assert_close(found, steps.plain(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_step(dtype: str) -> None:
    """Bit for bit, whatever else is computed in the step and wherever its blocks lie."""
    steps = PagedSteps(CONTEXTS + DECODES, Setting(ntk_length=16, logn_length=16), torch_dtype(dtype), 16)
    together = steps.run(kernel("gpt_attention").run)
    starts = [0]
    for _, new, _ in steps.sequences:
        starts.append(starts[-1] + new)
    for index, sequence in enumerate(steps.sequences):
        alone = PagedSteps([sequence], steps.setting, steps.dtype, 16)
        alone.qkv[0] = steps.qkv[index]
        part = together[starts[index] : starts[index + 1]]
        assert torch.equal(alone.run(kernel("gpt_attention").run), part), sequence


# The table


def test_every_op_has_a_kernel_on_the_cpu() -> None:
    assert kernels_for(torch.device("cpu")).keys() == reference_kernels().keys()


@pytest.mark.parametrize("op", cpu_kernels())
def test_a_kernel_takes_the_attributes_of_its_reference(op: str) -> None:
    def attributes(function: Any) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}

    assert attributes(cpu_kernels()[op].run) == attributes(reference_kernels()[op].run)


def test_another_device_has_no_kernels() -> None:
    with pytest.raises(ValueError, match="no kernels for device meta, expected cpu or cuda"):
        kernels_for(torch.device("meta"))
