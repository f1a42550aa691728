"""The reference against the definitions of the ops, written down a second time: everything else is measured by it."""

import math

import numpy as np
import pytest
import torch
from paged_steps import PagedSteps, Sequence3, Setting

from tensorrt_llm.kernels import StepShape, reference

# A whole prompt, the start of one, the end of one, one token of one; then decodes. Blocks of 4 tokens.
CONTEXTS: list[Sequence3] = [(0, 5, 5), (0, 3, 7), (4, 6, 10), (3, 1, 4), (0, 1, 1)]
DECODES: list[Sequence3] = [(4, 1, 4), (7, 1, 2), (8, 1, 3), (1, 1, 1)]


def assert_exact(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 7, 14])
def test_attention_of_a_mixed_step_is_the_definition(kv_heads: int) -> None:
    steps = PagedSteps(CONTEXTS + DECODES, Setting(num_heads=14, num_kv_heads=kv_heads))
    assert_exact(steps.run(reference.gpt_attention), steps.plain())


@pytest.mark.parametrize("size", [4, 6, 20])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_attention_rotates_any_head_size_and_base(size: int, base: float) -> None:
    steps = PagedSteps(CONTEXTS + DECODES, Setting(head_size=size, rotary_dim=size, rotary_base=base))
    assert_exact(steps.run(reference.gpt_attention), steps.plain())


def test_attention_leaves_dims_beyond_rotary_dim_alone() -> None:
    steps = PagedSteps(CONTEXTS + DECODES, Setting(head_size=10, rotary_dim=4, q_scaling=1.5))
    assert_exact(steps.run(reference.gpt_attention), steps.plain())


@pytest.mark.parametrize("rules", [{"ntk_length": 8}, {"logn_length": 8}, {"ntk_length": 8, "logn_length": 8}], ids=str)
@pytest.mark.parametrize("prompt", [1, 4, 7, 8, 9, 16, 17, 33])
def test_long_context_rules_are_the_definition_in_prefill_and_decode(prompt: int, rules: dict[str, int]) -> None:
    """Prompts around S, 2 S and 4 S; decodes of short prompts that have grown beyond S keep their alpha."""
    prefill, decodes = (0, prompt, prompt), [(prompt, 1, prompt), (prompt + 9, 1, prompt), (40, 1, prompt)]
    steps = PagedSteps([prefill, *decodes], Setting(**rules))
    assert_exact(steps.run(reference.gpt_attention), steps.plain())


@pytest.mark.parametrize("length", [*range(1, 70), 2047, 2048, 2049, 4096, 4097, 8192, 8193, 32768, 10**9])
@pytest.mark.parametrize("trained", [2, 8, 2048, 8192])
def test_alpha_is_the_formula(length: int, trained: int) -> None:
    wanted = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)
    assert reference.ntk_alpha(length, trained) == wanted


@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_rms_norm_is_the_definition(hidden: int) -> None:
    x, weight = torch.randn(5, hidden, dtype=torch.float64) * 30, torch.randn(hidden, dtype=torch.float64)
    rows = [row / math.sqrt(np.mean(row**2) + 1e-5) * weight.numpy() for row in x.numpy()]
    found = reference.rms_norm(x, weight, eps=1e-5, dtype="float32")
    torch.testing.assert_close(found, torch.tensor(np.array(rows)).float(), rtol=0, atol=0)


def test_rms_norm_of_float16_does_not_overflow_inside() -> None:
    x = torch.full((1, 8), 6e4, dtype=torch.float16)  # its square does not fit float16
    assert torch.equal(reference.rms_norm(x, torch.ones(8).half(), eps=1e-6, dtype="float16"), torch.ones(1, 8).half())


def test_add_rms_norm_is_the_sum_and_its_norm() -> None:
    x, y, weight = torch.randn(3, 8), torch.randn(3, 8).half(), torch.randn(8).half()
    total, normed = reference.add_rms_norm(x, y, weight, eps=1e-6, dtype="float16")
    assert torch.equal(total, x + y.float())
    assert torch.equal(normed, reference.rms_norm(total, weight, eps=1e-6, dtype="float16"))


def test_gated_mlp_is_silu_of_one_branch_times_the_other() -> None:
    x, fc, gate = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5), (7, 5), (7, 5)))
    a, b = x.numpy() @ fc.numpy().T, x.numpy() @ gate.numpy().T
    wanted = torch.from_numpy(a / (1 + np.exp(-a)) * b).float()
    torch.testing.assert_close(reference.gated_mlp(x, fc, gate, dtype="float32"), wanted, rtol=1e-6, atol=1e-7)


def test_operands_of_two_dtypes_are_summed_in_float32() -> None:
    total = reference.add(torch.tensor([[1e5]]), torch.tensor([[0.5]], dtype=torch.float16))
    assert total.dtype == torch.float32 and total.item() == 1e5 + 0.5


def test_gather_and_embedding_pick_rows() -> None:
    rows, ids = torch.randn(4, 3), torch.tensor([2, 0, 2], dtype=torch.int32)
    prompts = StepShape(4, 3, 3, 4, 2, 2)
    for op in (lambda: reference.gather_last_token(rows, ids, step=prompts), lambda: reference.embedding(ids, rows)):
        assert torch.equal(op(), rows[[2, 0, 2]])
    half = reference.embedding(ids, rows.half(), dtype="float32")
    assert half.dtype == torch.float32 and torch.equal(half, rows.half()[[2, 0, 2]].float())
