"""gpt_attention's launcher against the reference in float64: packed steps over a pool whose unwritten slots are NaN.

A sequence is written (cached, new, prompt): tokens in the pool before the step, tokens that the step brings, and the
prompt length that fixes its NTK alpha. Contexts come first, decodes (new == 1) after them.

An int8 pool is held to two claims: the step's keys and values come into it as the reference's do, and attention is
that over the vectors which its integers and scales stand for. Each can be checked closely where both together cannot:
a key a hair beside a half step may be rounded either way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.kernels import StepShape, reference
from tensorrt_llm.kernels.cuda import decode_one_head
from tensorrt_llm.kernels.cuda.attention import GptAttention

ON_GPU = torch.cuda.is_available()
gpt_attention = GptAttention(is_batch_invariant=False)
batch_invariant_gpt_attention = GptAttention(is_batch_invariant=True)
# Triton's interpreter divides with numpy, which warns where a GPU just gives infinity.
pytestmark = [pytest.mark.usefixtures("poisoned_outputs"), pytest.mark.filterwarnings("ignore:divide by zero")]


@dataclass(frozen=True)
class Case:
    """One step: the arguments of gpt_attention and the pool as it was before."""

    qkv: torch.Tensor
    pool: torch.Tensor
    position_ids: torch.Tensor
    query_starts: torch.Tensor
    sequence_length: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: torch.Tensor
    attributes: dict[str, Any]
    scales: torch.Tensor | None = None  # of an int8 pool

    def run(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, pool afterwards)."""
        output, written = self.step(attention)
        return output, written.pool

    def step(self, attention: Any) -> tuple[torch.Tensor, "Case"]:
        """(output, this case with the pool and scales afterwards)."""
        pool, scales = self.pool.clone(), None if self.scales is None else self.scales.clone()
        tables = (self.position_ids, self.query_starts, self.sequence_length, self.context_lengths, self.block_tables)
        output = attention(self.qkv, pool, *tables, scales, **self.attributes)
        return output, replace(self, pool=pool, scales=scales)

    def exact(self) -> torch.Tensor:
        """The reference's output in float64; it multiplies unwritten slots by zero, so these hold zeros for it."""
        exact = replace(self, qkv=self.qkv.double(), pool=self.pool.double().nan_to_num())
        return exact.run(reference.gpt_attention)[0]

    def widened(self) -> "Case":
        """The float64 case of the vectors that stand in a written int8 pool: its qkv holds those of the new tokens.

        A new key is turned back by its angles first, as attention will turn it again.
        """
        assert self.scales is not None
        heads, kv_heads, size = (self.attributes[name] for name in ("num_heads", "num_kv_heads", "head_size"))
        pool = self.pool.double() * self.scales.double().nan_to_num()[..., None]
        sequence = torch.repeat_interleave(self.query_starts.diff().long())
        positions, slots = self.position_ids.long(), self.position_ids.long() % pool.shape[3]
        blocks = self.block_tables[sequence, positions // pool.shape[3]].long()
        keys, values = pool[blocks, :, :, slots].unbind(1)  # [tokens, kv_heads, head_size]
        rope = {name: self.attributes[name] for name in ("rotary_base", "rotary_dim")}
        limit = self.attributes["ntk_length"]
        for token, prompt in enumerate(self.context_lengths[sequence].tolist()):
            one = slice(token, token + 1)
            alpha = reference.ntk_alpha(prompt, limit) if limit else 1
            angles = reference.rope_angles(positions[one], alpha=alpha, dtype=torch.float64, **rope)
            keys[one] = reference.rotate(keys[one], -angles)
        queries = self.qkv.double()[:, : heads * size]
        qkv = torch.cat((queries, keys.reshape(-1, kv_heads * size), values.reshape(-1, kv_heads * size)), dim=1)
        return replace(self, qkv=qkv, pool=pool, scales=None)

    def tolerance(self) -> float:
        """How far a right kernel may be off.

        In qkv's dtype are rounded: q and k, seen through scores of unit size (4 sigma), probabilities, output.
        In float32: a score's terms, the running sums, exp2. All of it scales with the largest value.
        """
        dtype = self.qkv.dtype
        is_cut = dtype == torch.bfloat16 and not ON_GPU  # Triton's interpreter rounds bfloat16 towards zero
        narrow, single = torch.finfo(dtype).eps / (1 if is_cut else 2), torch.finfo(torch.float32).eps / 2
        terms = self.attributes["head_size"] + self.attributes["step"].max_sequence_length
        return 5.0 * (6 * narrow + (16 + math.sqrt(terms)) * single)


def make_case(
    contexts: Sequence[tuple[int, int, int]],
    decodes: Sequence[tuple[int, int, int]],
    *,
    device: torch.device,
    heads: tuple[int, int] = (2, 2),
    head_size: int = 64,
    tokens_per_block: int = 16,
    dtype: torch.dtype = torch.float32,
    is_int8: bool = False,
    **attributes: Any,
) -> Case:
    """Random queries, keys and values of unit size; blocks are owned in random order, block 0 by none.

    Unwritten slots of an int8 pool are -128, which no value is rounded to, with NaN for a scale.
    """
    sequences = (*contexts, *decodes)
    num_heads, num_kv_heads = heads
    owned = [math.ceil((cached + new) / tokens_per_block) for cached, new, _ in sequences]
    ids = (torch.randperm(sum(owned)) + 1).split(owned)
    block_tables = torch.zeros(len(sequences), max(owned), dtype=torch.int32)
    pool = torch.full((sum(owned) + 1, 2, num_kv_heads, tokens_per_block, head_size), float("nan"), dtype=dtype)
    for row, blocks, (cached, _, _) in zip(block_tables, ids, sequences, strict=True):
        row[: len(blocks)] = blocks
        slots = torch.arange(cached)
        pool[blocks[slots // tokens_per_block], :, :, slots % tokens_per_block] = torch.randn(
            cached, 2, num_kv_heads, head_size
        ).to(dtype)
    scales = None
    if is_int8:
        integers, scales = reference.quantize_kv(pool.float().flatten(0, 2))
        is_written = scales.isfinite().view(pool.shape[:-1])
        scales = scales.view(pool.shape[:-1]).to(device)
        pool = torch.where(is_written[..., None], integers.view(pool.shape), -128)
    new = [new for _, new, _ in sequences]

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    totals = [cached + new for cached, new, _ in sequences]
    num_context_tokens = sum(new for _, new, _ in contexts)
    return Case(
        qkv=torch.randn(sum(new), (num_heads + 2 * num_kv_heads) * head_size, device=device).to(dtype),
        pool=pool.to(device),
        position_ids=ints([position for cached, new, _ in sequences for position in range(cached, cached + new)]),
        query_starts=ints([sum(new[:count]) for count in range(len(new) + 1)]),
        sequence_length=ints(totals),
        context_lengths=ints([prompt for _, _, prompt in sequences]),
        block_tables=block_tables.to(device),
        attributes=dict(
            step=StepShape(sum(new), len(new), len(contexts), num_context_tokens, max(new), max(totals)),
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
            **(dict(rotary_base=10000.0, rotary_dim=head_size, ntk_length=0, logn_length=0) | attributes),
        ),
        scales=scales,
    )  # fmt: skip


def assert_matches_reference(case: Case, attention: Any = gpt_attention) -> None:
    output, written = case.step(attention)
    wanted = (case if case.scales is None else written.widened()).exact()
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_size", "tokens_per_block"),
    [((3, 3), 80, 16), ((4, 2), 64, 16), ((4, 1), 128, 64), ((7, 1), 96, 24)],
)
def test_a_mixed_step_matches_the_reference(
    device: torch.device, heads: tuple[int, int], head_size: int, tokens_per_block: int, dtype: torch.dtype
) -> None:
    contexts = [(0, 1, 9), (21, 37, 58), (0, 3, 3)]  # the start of a prompt, the end of one, a whole one
    decodes = [(0, 1, 1), (127, 1, 9), (128, 1, 100), (290, 1, 290)]
    assert_matches_reference(
        make_case(
            contexts, decodes, device=device, heads=heads, head_size=head_size, tokens_per_block=tokens_per_block,
            dtype=dtype, q_scaling=1.25, ntk_length=32, logn_length=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_size", "tokens_per_block"), [((2, 2), 80, 16), ((7, 1), 96, 24)])
def test_a_mixed_step_over_int8_is_attention_over_what_the_pool_holds(
    device: torch.device, heads: tuple[int, int], head_size: int, tokens_per_block: int, dtype: torch.dtype
) -> None:
    contexts = [(0, 1, 9), (5, 37, 42), (0, 3, 3)]
    decodes = [(0, 1, 1), (260, 1, 9)]
    assert_matches_reference(
        make_case(
            contexts, decodes, device=device, heads=heads, head_size=head_size, tokens_per_block=tokens_per_block,
            dtype=dtype, is_int8=True, q_scaling=1.25, ntk_length=32, logn_length=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)])
def test_new_keys_and_values_become_the_integers_of_the_reference(
    device: torch.device, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    case = make_case(
        [(5, 14, 19), (0, 3, 3)], [(16, 1, 8), (40, 1, 8)], device=device, heads=heads, head_size=80, dtype=dtype,
        is_int8=True, ntk_length=16,
    )  # fmt: skip
    case.qkv[0] *= 1e-3  # a token of small keys and values has small scales: none of its digits is lost
    got = case.step(gpt_attention)[1]
    wanted = replace(case, qkv=case.qkv.double()).step(reference.gpt_attention)[1]
    assert got.scales is not None and wanted.scales is not None
    torch.testing.assert_close(got.scales, wanted.scales, rtol=1e-6, atol=0, equal_nan=True)
    difference = (got.pool.int() - wanted.pool.int()).abs()
    # float32 angles and products may move a key over a half step, values stay as they are.
    assert difference.max() <= 1 and difference.sum() <= 3 and difference[:, 1].sum() == 0


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)])
def test_small_values_in_int8_keep_their_digits(device: torch.device, heads: tuple[int, int]) -> None:
    """A scale of 1e-6 times a probability is no number of float16 that a dot could take."""
    case = make_case([(0, 40, 40)], [(290, 1, 5)], device=device, heads=heads, dtype=torch.float16, is_int8=True)
    assert case.scales is not None
    num_values = heads[1] * 64
    case.qkv[:, -num_values:] *= 1e-4
    case.scales[:, 1] *= 1e-4
    output, written = case.step(gpt_attention)
    torch.testing.assert_close(output.double(), written.widened().exact(), rtol=0, atol=1e-4 * case.tolerance())


@pytest.mark.parametrize(
    ("dtype", "contexts"),
    [
        (torch.float16, [(0, 127), (0, 128), (0, 129), (62, 66), (63, 66), (64, 64), (128, 1)]),
        (torch.float32, [(0, 31), (0, 33), (14, 18), (15, 18), (16, 16), (33, 17)]),
    ],
    ids=str,
)
def test_prompts_around_tile_borders(device: torch.device, dtype: torch.dtype, contexts: list[tuple[int, int]]) -> None:
    cases = [(cached, new, cached + new) for cached, new in contexts]
    assert_matches_reference(make_case(cases, [], device=device, heads=(2, 1), dtype=dtype))


# Without a GPU the products are numpy's, whose bits depend on where a row stands.
@pytest.mark.gpu
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_prompt_has_the_same_bits_in_any_pieces(device: torch.device, dtype: torch.dtype, is_int8: bool) -> None:
    whole = make_case([(0, 150, 150)], [], device=device, heads=(2, 1), dtype=dtype, is_int8=is_int8)
    output, written = whole.step(gpt_attention)
    for start in (1, 63, 64, 70, 149):
        new = 150 - start
        rest = replace(
            whole, qkv=whole.qkv[start:].contiguous(), pool=written.pool, scales=written.scales,
            position_ids=whole.position_ids[start:], query_starts=torch.tensor([0, new], dtype=torch.int32).to(device),
            attributes=whole.attributes | {"step": StepShape(new, 1, 1, new, new, 150)},
        )  # fmt: skip
        assert torch.equal(rest.step(gpt_attention)[0], output[start:])


# With one query head per KV head, splits and tiles are those of few sequences, some, many, or a throng over int8, and
# for few and many there are others for short ones.
@pytest.mark.parametrize(
    "lengths",
    [[7, 8, 9, 31, 32, 33, 63, 64, 65, 128, 129, 256, 257, 512], [33, 257, 513, 528, 529, 2048, 2049]],
    ids=["", "long"],
)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(
    ("heads", "number"),
    [((2, 1), "few"), *(((1, 1), number) for number in ("few", "invariant", "some", "many", "throng"))],
)
def test_decodes_around_block_and_split_borders(
    device: torch.device,
    heads: tuple[int, int],
    is_int8: bool,
    number: str,
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds = {"some": ("SOME_VECTORS",), "many": ("MANY_VECTORS",), "throng": ("MANY_VECTORS", "THRONG_VECTORS")}
    for bound in bounds.get(number, ()):
        monkeypatch.setattr(decode_one_head, bound, 1)
    attention = batch_invariant_gpt_attention if number == "invariant" else gpt_attention
    borders = [(length - 1, 1, 1) for length in lengths]
    case = make_case([], borders, device=device, heads=heads, tokens_per_block=8, is_int8=is_int8)
    assert_matches_reference(case, attention)


@pytest.mark.parametrize(("heads", "cached"), [((1, 1), 5000), ((2, 1), 2500)])
def test_more_splits_than_are_combined_at_once(device: torch.device, heads: tuple[int, int], cached: int) -> None:
    decodes = [(3, 1, 1), (cached, 1, 1)]
    case = make_case([], decodes, device=device, heads=heads, head_size=16, tokens_per_block=64)
    case.pool[case.block_tables[1, -2], 0] *= 8  # the largest score is in the last splits: those before must shrink
    assert_matches_reference(case)


@pytest.mark.parametrize("rules", [{"ntk_length": 16}, {"logn_length": 16}], ids=str)
def test_long_context_rules_around_the_trained_length(device: torch.device, rules: dict[str, int]) -> None:
    lengths = [15, 16, 17, 32, 33]  # around S and 2 S, where alpha steps
    contexts = [(0, length, length) for length in lengths]
    decodes = [(length + 20, 1, length) for length in lengths]  # alpha stays that of the prompt
    assert_matches_reference(make_case(contexts, decodes, device=device, heads=(1, 1), **rules))


def test_alpha_steps_exactly_at_large_powers_of_two(device: torch.device) -> None:
    lengths = [2048 * 2**power + more for power in range(5) for more in (0, 1)]
    case = make_case([], [(40, 1, length) for length in lengths], device=device, heads=(1, 1), ntk_length=2048)
    assert_matches_reference(case)


def test_far_positions_turn_exactly(device: torch.device) -> None:
    """A float32 angle at position 10^6 would be off by 0.03."""
    case = make_case([], [(3, 1, 4)], device=device, heads=(1, 1), rotary_base=1e6)
    far = torch.full_like(case.position_ids, 1_000_000)
    position, blocks = int(far), torch.zeros(1, 1_000_000 // 16 + 1, dtype=torch.int32, device=device)
    _, pool = replace(case, position_ids=far, block_tables=blocks).run(gpt_attention)
    key = case.qkv[:, 64:128].view(1, 1, 64).double()
    angles = reference.rope_angles(far, rotary_base=1e6, rotary_dim=64, alpha=1, dtype=torch.float64)
    torch.testing.assert_close(
        pool[0, 0, 0, position % 16].double(), reference.rotate(key, angles)[0, 0], rtol=0, atol=4e-6
    )


@pytest.mark.parametrize("rotary_dim", [16, 40])
def test_dims_beyond_rotary_dim_stay(device: torch.device, rotary_dim: int) -> None:
    assert_matches_reference(make_case([(0, 5, 5)], [(9, 1, 3)], device=device, rotary_dim=rotary_dim))


@pytest.mark.parametrize("heads", [(2, 2), (3, 1)])
def test_only_the_slots_of_new_tokens_are_written(device: torch.device, heads: tuple[int, int]) -> None:
    case = make_case([(5, 14, 19), (0, 3, 3)], [(16, 1, 8), (40, 1, 8)], device=device, heads=heads, head_size=80)
    _, pool = case.run(gpt_attention)
    wanted = replace(case, qkv=case.qkv.double(), pool=case.pool.double()).run(reference.gpt_attention)[1]
    torch.testing.assert_close(pool.double(), wanted, rtol=0, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("attention", [gpt_attention, batch_invariant_gpt_attention], ids=["few", "invariant"])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_a_decode_does_not_depend_on_its_batch(
    device: torch.device, heads: tuple[int, int], is_int8: bool, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention is batch_invariant_gpt_attention:
        for bound in ("SOME_VECTORS", "MANY_VECTORS", "THRONG_VECTORS"):
            monkeypatch.setattr(decode_one_head, bound, 4)  # the batch is over the bound, one sequence is not
    case = make_case([(0, 9, 9)], [(99, 1, 5), (300, 1, 5), (150, 1, 5)], device=device, heads=heads, is_int8=is_int8)
    together = case.run(attention)[0]
    for row in (1, 2, 3):
        token, length = 8 + row, int(case.sequence_length[row])
        alone = replace(
            case,
            qkv=case.qkv[token : token + 1],
            position_ids=case.position_ids[token : token + 1],
            query_starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
            sequence_length=case.sequence_length[row : row + 1],
            context_lengths=case.context_lengths[row : row + 1],
            block_tables=case.block_tables[row : row + 1],
            attributes=case.attributes | {"step": StepShape(1, 1, 0, 0, 1, length)},
        )
        assert torch.equal(alone.run(attention)[0][0], together[token])


# A few sequences are cut in two ways: by whether the longest may have more than 512 tokens.
@pytest.mark.parametrize(("attention", "bound"), [(gpt_attention, 500), (batch_invariant_gpt_attention, 2000)])
def test_a_longer_bound_on_the_step_changes_no_bit(device: torch.device, attention: Any, bound: int) -> None:
    """The bound says for how many splits there are programs and memory."""
    case = make_case([], [(30, 1, 5), (100, 1, 5)], device=device)
    step = case.attributes["step"]._replace(max_sequence_length=bound)
    bounded = replace(case, attributes=case.attributes | {"step": step})
    assert torch.equal(case.run(attention)[0], bounded.run(attention)[0])


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_padding_rows_of_a_graph_change_nothing(device: torch.device, heads: tuple[int, int]) -> None:
    """A graph's spare rows are decodes at position 0 of the scratch block 0."""
    case = make_case([], [(30, 1, 5), (130, 1, 5)], device=device, heads=heads)
    zeros, ones = (torch.full((2,), value, dtype=torch.int32, device=device) for value in (0, 1))
    padded = replace(
        case,
        qkv=torch.cat((case.qkv, torch.randn_like(case.qkv))),
        position_ids=torch.cat((case.position_ids, zeros)),
        query_starts=torch.arange(5, dtype=torch.int32, device=device),
        sequence_length=torch.cat((case.sequence_length, ones)),
        context_lengths=torch.cat((case.context_lengths, ones)),
        block_tables=torch.cat((case.block_tables, torch.zeros_like(case.block_tables))),
        attributes=case.attributes | {"step": case.attributes["step"]._replace(num_tokens=4, batch_size=4)},
    )
    (output, pool), (wanted, wanted_pool) = padded.run(gpt_attention), case.run(gpt_attention)
    assert torch.equal(output[:2], wanted)
    assert torch.equal(pool[1:].nan_to_num(7.0), wanted_pool[1:].nan_to_num(7.0))


@pytest.mark.parametrize(("heads", "is_int8"), [((2, 2), False), ((4, 1), True)])
def test_padding_of_a_mixed_step_changes_nothing(device: torch.device, heads: tuple[int, int], is_int8: bool) -> None:
    """Two empty contexts and one of 19 tokens in the scratch block stand before the decodes, two more behind them."""
    case = make_case([(0, 20, 20), (16, 7, 40)], [(30, 1, 5), (130, 1, 5)], device=device, heads=heads, is_int8=is_int8)

    def widened(values: torch.Tensor, at: int, between: list[int], behind: list[int]) -> torch.Tensor:
        added = (torch.tensor(part, dtype=torch.int32, device=device) for part in (between, behind))
        return torch.cat((values[:at], next(added), values[at:], next(added)))

    noise = torch.randn(21, case.qkv.shape[1], device=device)
    tables = torch.zeros(5, case.block_tables.shape[1], dtype=torch.int32, device=device)
    step = StepShape(29 + 21, 9, num_contexts=5, num_context_tokens=46, max_query_length=46, max_sequence_length=144)
    padded = replace(
        case,
        qkv=torch.cat((case.qkv[:27], noise[:19], case.qkv[27:], noise[19:])),
        position_ids=widened(case.position_ids, 27, list(range(19)), [0, 0]),
        query_starts=torch.tensor([0, 20, 27, 27, 27, *range(46, 51)], dtype=torch.int32, device=device),
        sequence_length=widened(case.sequence_length, 2, [0, 0, 19], [1, 1]),
        context_lengths=widened(case.context_lengths, 2, [1, 1, 1], [1, 1]),
        block_tables=torch.cat((case.block_tables[:2], tables[:3], case.block_tables[2:], tables[3:])),
        attributes=case.attributes | {"step": step},
    )
    (output, pool), (wanted, wanted_pool) = padded.run(gpt_attention), case.run(gpt_attention)
    assert torch.equal(torch.cat((output[:27], output[46:48])), wanted) and wanted.isfinite().all()
    assert torch.equal(pool[1:].nan_to_num(7.0), wanted_pool[1:].nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("contexts", [[(0, 70, 70)], []], ids=["prefill", "decode"])
def test_blocks_beyond_two_billion_elements_are_reached(
    device: torch.device, contexts: list[tuple[int, int, int]], is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(
        contexts, [(99, 1, 5)], device=device, heads=(8, 8), head_size=128, dtype=torch.float16, is_int8=is_int8
    )
    blocks = 2**31 // case.pool[0].numel() + len(case.pool)
    monkeypatch.undo()
    shift, scales = blocks - len(case.pool), case.scales
    far = replace(
        case,
        pool=torch.cat((case.pool.new_zeros(shift, *case.pool.shape[1:]), case.pool)),
        scales=scales if scales is None else torch.cat((scales.new_zeros(shift, *scales.shape[1:]), scales)),
        block_tables=case.block_tables + shift,
    )
    assert torch.equal(far.run(gpt_attention)[0], case.run(gpt_attention)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_a_captured_step_replays_on_new_inputs(
    device: torch.device, heads: tuple[int, int], is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    settings = dict(device=device, heads=heads, dtype=torch.float16, is_int8=is_int8)
    first, second = (
        make_case([], [(length, 1, 5) for length in lengths], **settings) for lengths in ((300, 40), (70, 280))
    )
    bound = {"step": first.attributes["step"]._replace(max_sequence_length=512)}
    names = ["qkv", "pool", "position_ids", "query_starts", "sequence_length", "context_lengths", "block_tables"]
    names += ["scales"] if is_int8 else []
    first, second = (replace(case, attributes=case.attributes | bound) for case in (first, second))
    static = {name: getattr(first, name).clone() for name in names}
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    static["block_tables"] = torch.zeros(2, width, dtype=torch.int32, device=device)
    for name in {"pool", "scales"} & set(names):
        longest = max(getattr(first, name), getattr(second, name), key=len)
        static[name] = torch.zeros_like(longest)
    gpt_attention(*static.values(), **first.attributes)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = gpt_attention(*static.values(), **first.attributes)
    for case in (first, second):
        for name in names:
            new = getattr(case, name)
            static[name][tuple(slice(size) for size in new.shape)] = new
        graph.replay()
        assert torch.equal(output, case.run(gpt_attention)[0])
