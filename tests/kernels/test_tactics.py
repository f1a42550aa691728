"""Tactics: what is chosen without timings and with them, and that every candidate computes the right thing."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from compiling.compile_model import compile_model
from models_for_tests import LIMITS, make_config

from tensorrt_llm.kernels.cuda import cuda_kernels, matmul
from tensorrt_llm.kernels.tactics import (
    BUCKETS,
    LIBRARY,
    MatmulShape,
    Tactic,
    Tactics,
    bucket_of,
    candidates,
    dense,
    heuristic,
    smooth_quant,
    weight_only,
)
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.plan import Plan, PlanNode, TensorSpec
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.stored_tactics import matmuls_of, specs_of
from tensorrt_llm.tuning.random_call import RandomCall, relative_error

HALF = torch.float16
# A layer of widths that no tile divides, with groups of 16 columns.
CONFIG = make_config(
    vocab_size=45, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_size=16, mlp_hidden_size=80
)
MODES: dict[str, tuple[QuantMode, dict[str, Any]]] = {
    "float": (QuantMode(0), {}),
    "int8": (QuantMode.use_weight_only(), {}),
    "int4_groups": (QuantMode.use_weight_only(True, per_group=True), {"group_size": 16, "zero": True}),
    "w8a8": (QuantMode.use_smooth_quant(per_token=True, per_channel=True), {}),
    "w8a8_static": (QuantMode.use_smooth_quant(), {}),
}
# Of all families, dtypes and formats, at the sizes of models from 0.5B to 72B.
SHAPES = [
    MatmulShape(op, rows, depth, dtype, **format)
    for rows, depth in ((1152, 896), (4096, 4096), (22016, 4096), (4096, 11008), (151936, 8192), (35, 129))
    for ops, dtypes, formats in (
        (("matmul", "gated_mlp"), (HALF, torch.bfloat16, torch.float32), [{}]),
        (
            ("weight_only_quant_matmul", "weight_only_gated_mlp"),
            (HALF, torch.float32),
            [{"bits": 8}, {"bits": 4}, {"bits": 4, "num_groups": max(depth // 128, 1), "has_zero": True}],
        ),
        (("smooth_quant_gemm", "smooth_quant_gated_mlp"), (torch.int8,), [{"bits": 8}]),
    )
    for op in ops
    for dtype in dtypes
    for format in formats
]


def plan_of(mode: str, dtype: str = "float16") -> Plan:
    quant_mode, layout = MODES[mode]
    return compile_model(quantize_model(QWenForCausalLM(CONFIG, dtype), quant_mode, **layout), LIMITS).plan


# The choice


def test_the_bucket_is_the_next_size_and_the_last_one_holds_without_end() -> None:
    assert [bucket_of(tokens) for tokens in (1, 2, 3, 33, 64, 1024, 1025, 10**6)] == [1, 2, 4, 64, 64, 1024, 1024, 1024]


def test_the_heuristics_choice_is_the_first_candidate_everywhere() -> None:
    for shape in SHAPES:
        for tokens in BUCKETS:
            found = candidates(shape, tokens)
            assert found[0] == heuristic(shape, tokens) and len(set(map(str, found))) == len(found) <= 16


def test_a_stream_is_a_candidate_for_one_token_only() -> None:
    for shape in SHAPES:
        ways = {tactic.way for tokens in BUCKETS[1:] for tactic in candidates(shape, tokens)}
        assert not ways & {"stream", "ring"}


def test_rings_are_candidates_for_float16_in_whole_planes() -> None:
    def rings(shape: MatmulShape) -> int:
        return sum(tactic.way == "ring" for tactic in candidates(shape, 1))

    down = MatmulShape("weight_only_quant_matmul", 4096, 11008, HALF, 4, 86)
    assert rings(down) >= 3 and rings(down._replace(bits=8, num_groups=1, has_zero=True)) >= 3
    assert not rings(down._replace(dtype=torch.bfloat16))
    assert not rings(down._replace(num_groups=344)), "planes of 32 integers"
    assert not rings(down._replace(rows=4104)), "scales are not copied 4 bytes at a time"


def test_warpgroups_are_candidates_for_many_tokens_in_16_bits_and_whole_planes() -> None:
    def warpgroups(shape: MatmulShape, tokens: int) -> int:
        return sum(tactic.way == "wgmma" for tactic in candidates(shape, tokens))

    down = MatmulShape("weight_only_quant_matmul", 4096, 11008, HALF, 4, 86)
    assert all(warpgroups(down, tokens) >= 3 for tokens in (128, 256, 512, 1024)) and not warpgroups(down, 64)
    assert warpgroups(down._replace(dtype=torch.bfloat16, num_groups=1), 256)
    assert not warpgroups(down._replace(dtype=torch.bfloat16), 256), "bfloat16 does not hold scales of float16"
    assert not warpgroups(down._replace(num_groups=344), 256), "planes of 32 integers"
    assert not warpgroups(down._replace(depth=11004, num_groups=1), 256), "rows of x do not begin at 16 bytes"


def test_warpgroups_take_plain_operands_of_many_tokens() -> None:
    def warpgroups(shape: MatmulShape, tokens: int) -> int:
        return sum(tactic.way == "wgmma" for tactic in candidates(shape, tokens))

    floats, integers = MatmulShape("matmul", 4096, 11008, HALF), MatmulShape("smooth_quant_gemm", 96, 64, torch.int8, 8)
    for shape in (floats, floats._replace(dtype=torch.bfloat16, op="gated_mlp"), integers):
        assert all(warpgroups(shape, tokens) >= 3 for tokens in (128, 256, 512, 1024)) and not warpgroups(shape, 64)
        assert heuristic(shape, 256) == candidates(shape, 256)[0]
        assert len(candidates(shape, 128)) <= 16
    assert not warpgroups(floats._replace(dtype=torch.float32), 256)
    assert not warpgroups(floats._replace(depth=11004), 256), "rows do not begin at 16 bytes"
    assert not warpgroups(integers._replace(depth=72), 256), "rows do not begin at 16 bytes"


def test_warpgroups_are_chosen_for_integers_and_for_the_gated_mlp_of_floats() -> None:
    integers = MatmulShape("smooth_quant_gemm", 12288, 4096, torch.int8, 8)
    assert [heuristic(integers, tokens).way == "wgmma" for tokens in (64, 65, 256, 4096)] == [False, True, True, True]
    assert heuristic(integers._replace(depth=4104), 256).way == "tiles"
    small = MatmulShape("smooth_quant_gemm", 896, 896, torch.int8, 8)
    assert Tactic("tiles", 64, 64, 256, 4, 4) in candidates(small, 128), "what was chosen there before is still timed"
    gated = MatmulShape("gated_mlp", 22016, 4096, HALF)
    assert [heuristic(gated, tokens).way for tokens in (65, 256, 257)] == ["wgmma", "wgmma", "library"]
    assert heuristic(gated._replace(op="matmul"), 256).way == "library"


def test_memory_bounds_a_product_before_its_tiles_do() -> None:
    """At 128 tokens both take what the weight takes to be read; the one whose programs are done earlier comes first."""
    gated = MatmulShape("gated_mlp", 22016, 4096, HALF)
    tactic = heuristic(gated, 128)
    assert (tactic.token_tile, tactic.row_tile) == (128, 192)


@pytest.mark.parametrize(("tokens", "rows", "depth"), [(256, 4096, 4096), (128, 4096, 11008), (217, 12288, 4096)])
def test_programs_of_warpgroups_run_all_at_once_where_splits_allow_it(tokens: int, rows: int, depth: int) -> None:
    tactic = heuristic(MatmulShape("weight_only_quant_matmul", rows, depth, HALF, 8), tokens)
    programs = -(-rows // tactic.row_tile) * -(-tokens // tactic.token_tile) * tactic.num_splits
    assert tactic.way == "wgmma" and 96 <= programs <= 132


def test_ring_tiles_are_chosen_for_few_tokens_and_fit_an_sm() -> None:
    int8 = MatmulShape("weight_only_quant_matmul", 4096, 11008, HALF, 8)
    int4 = int8._replace(bits=4, num_groups=86)
    integer = MatmulShape("smooth_quant_gemm", 4096, 11008, torch.int8, 8)
    for shape in (int8, int4, integer, MatmulShape("matmul", 4096, 11008, torch.bfloat16)):
        chosen = {tokens: heuristic(shape, tokens).way for tokens in BUCKETS}
        assert {chosen[tokens] for tokens in (2, 4, 8, 16)} == {"ring_tiles"}
        assert not {chosen[tokens] for tokens in (1, 64, 128)} & {"ring_tiles"}
        for tokens in BUCKETS:
            stages = [
                found.num_stages * (found.row_tile * shape.bits // 8 + found.token_tile * shape.dtype.itemsize)
                for found in candidates(shape, tokens)
                if found.way == "ring_tiles"
            ]
            assert all(columns * 256 <= 227 * 1024 for columns in stages) and bool(stages) == (1 < tokens <= 64)


def test_other_tiles_are_timed_beside_ring_tiles() -> None:
    int8 = MatmulShape("weight_only_quant_matmul", 4096, 11008, HALF, 8)
    integer = MatmulShape("smooth_quant_gemm", 4096, 11008, torch.int8, 8)
    families = ((int8, weight_only), (integer, smooth_quant), (MatmulShape("matmul", 4096, 11008, HALF), dense))
    for shape, family in families:
        assert all(family.tiles(shape, tokens) in candidates(shape, tokens) for tokens in (2, 8, 16, 32, 64))


def test_ring_tiles_are_left_out_where_rows_or_scales_cannot_be_copied() -> None:
    int4 = MatmulShape("weight_only_quant_matmul", 4096, 11008, HALF, 4, 86)
    for shape in (
        MatmulShape("matmul", 4096, 11004, HALF),  # not of 16 bytes
        MatmulShape("matmul", 4096, 11008, torch.float32),
        MatmulShape("smooth_quant_gemm", 4096, 11000, torch.int8, 8),
        int4._replace(has_zero=True),
        int4._replace(rows=4104),
        int4._replace(num_groups=344),  # planes of 32 integers
        int4._replace(dtype=torch.bfloat16),
    ):
        assert all(tactic.way != "ring_tiles" for tokens in BUCKETS for tactic in candidates(shape, tokens))


def test_a_gated_product_has_both_of_its_rows_in_a_tile() -> None:
    gated = [shape for shape in SHAPES if shape.is_gated]
    tactics = {tactic for shape in gated for tokens in BUCKETS for tactic in candidates(shape, tokens)}
    assert all(tactic.row_tile % 2 == 0 for tactic in tactics)


def test_what_was_timed_takes_the_place_of_the_heuristic_in_its_bucket_only() -> None:
    shape = MatmulShape("matmul", 64, 32, HALF)
    tactics = Tactics({(shape, 8): LIBRARY})
    chosen = {tokens: tactics.choose(*shape, tokens) for tokens in (0, 1, 4, 5, 8, 9)}
    assert [tokens for tokens, tactic in chosen.items() if tactic == LIBRARY] == [5, 8]
    assert all(chosen[tokens] == heuristic(shape, tokens) for tokens in (0, 1, 4, 9))


def test_another_shape_has_another_choice() -> None:
    shape = MatmulShape("matmul", 64, 32, HALF)
    tactics = Tactics({(shape, 8): LIBRARY})
    for other in (shape._replace(rows=65), shape._replace(op="gated_mlp"), shape._replace(dtype=torch.bfloat16)):
        assert tactics.choose(*other, 8) == heuristic(other, 8)


def test_a_name_says_what_is_launched() -> None:
    assert str(Tactic("tiles", 16, 64, 128, 5, 4)) == "tiles 16x64x128, 5 stages, 4 warps"
    assert str(Tactic("tiles", 8, 32, 0, 5, 2, 3)) == "tiles 8x32, 5 stages, 2 warps, 3 splits"
    assert str(Tactic("ring", 0, 16, 0, 6, 8, 0, 11)) == "ring 16, 6 stages, 8 warps, 11 tiles"
    assert str(LIBRARY) == "library"


def test_operands_that_no_kernel_takes_go_to_the_library() -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 16)[:, ::2]
    torch.testing.assert_close(matmul(x, weight, dtype="float32"), x @ weight.T)


# What the launchers ask, and what the candidates compute


class Asked(Tactics):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[tuple[Any, ...]] = []

    def choose(self, *facts: Any) -> Tactic:
        self.facts.append(facts)
        return super().choose(*facts)


@pytest.mark.parametrize("mode", MODES)
def test_launchers_ask_for_the_shapes_that_a_plan_is_said_to_have(device: torch.device, mode: str) -> None:
    plan = plan_of(mode)
    for shape, node in matmuls_of(plan).items():
        asked = Asked()
        kernel = cuda_kernels(tactics=asked)[node.op]
        call = RandomCall(node, specs_of(plan), frozenset(spec.name for spec in plan.weights), 3, device)
        call.run(kernel, 3, call.prepared(kernel))
        assert asked.facts == [(*shape, 3)]


def plan_of_one(op: str, rows: int, depth: int, dtype: str, bits: int = 8, group_size: int = 0) -> Plan:
    """A plan of one matmul, of `rows` each of fc and gate; with groups it has zero points, and a bias where it may."""
    groups = depth // group_size if group_size else 1
    if op.startswith("smooth_quant"):
        values = [TensorSpec("x", "int8", ("num_tokens", depth)), TensorSpec("x_scale", "float32", ("num_tokens", 1))]
        matrix = [("weight", "int8", (rows, depth)), ("scale", "float32", (rows,))]
        attrs: dict[str, Any] = {}
    elif op.startswith("weight_only"):
        values = [TensorSpec("x", dtype, ("num_tokens", depth))]
        stored = ("int8", depth) if bits == 8 else ("uint8", depth // 2)
        matrix = [("weight", stored[0], (rows, stored[1])), ("scale", "float32", (rows, groups))]
        matrix += [("zero", "int16", (rows, groups))] if group_size else []
        attrs = {"bits": bits, "has_zero": bool(group_size)}
    else:
        values = [TensorSpec("x", dtype, ("num_tokens", depth))]
        matrix, attrs = [("weight", dtype, (rows, depth))], {}
    copies = ("fc", "gate") if op.endswith("gated_mlp") else ("",)
    weights = [TensorSpec(copy + name, kind, shape) for copy in copies for name, kind, shape in matrix]
    if len(copies) == 1:
        weights.append(TensorSpec("bias", dtype, (rows,)))
    out = TensorSpec("out", dtype, ("num_tokens", rows))
    names = tuple(spec.name for spec in (*values, *weights))
    node = PlanNode(op, names, (out,), attrs | {"dtype": dtype})
    return Plan(tuple(values), tuple(weights), (node,), {"out": "out"}, {})


FORMATS: list[tuple[str, str, dict[str, int]]] = [
    *((op, dtype, {}) for op in ("matmul", "gated_mlp") for dtype in ("float16", "bfloat16", "float32")),
    *((op, "float16", {"bits": 8}) for op in ("weight_only_quant_matmul", "weight_only_gated_mlp")),
    *((op, "float16", {"bits": 4}) for op in ("weight_only_quant_matmul", "weight_only_gated_mlp")),
    ("weight_only_quant_matmul", "bfloat16", {"bits": 4, "group_size": 48}),
    ("weight_only_gated_mlp", "float16", {"bits": 4, "group_size": 16}),
    ("weight_only_gated_mlp", "float32", {"bits": 4, "group_size": 16}),
    *((op, "float16", {}) for op in ("smooth_quant_gemm", "smooth_quant_gated_mlp")),
]


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize(("op", "dtype", "format"), FORMATS)
def test_every_candidate_means_what_the_reference_means(
    device: torch.device, op: str, dtype: str, format: dict[str, int], tokens: int
) -> None:
    """On rows that no tile divides, columns of several blocks, and fewer tokens than the bucket has."""
    plan = plan_of_one(op, 5 if tokens == 1 else 35, 1056 if tokens == 1 else 336, dtype, **format)
    ((shape, node),) = matmuls_of(plan).items()
    call = RandomCall(node, specs_of(plan), frozenset(spec.name for spec in plan.weights), tokens, device)
    wanted, rows = call.wanted(), max(tokens - 3, 1)
    wrong = {}
    for tactic in candidates(shape, tokens):
        kernel = cuda_kernels(tactics=Tactics({(shape, tokens): tactic}))[op]
        error = relative_error(call.run(kernel, rows, call.prepared(kernel)), wanted[:rows])
        if not error <= call.tolerance:
            wrong[str(tactic)] = error
    assert not wrong
