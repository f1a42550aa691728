"""What each pass does to the printed graph, what it leaves alone, and that results stay what they were."""

import re
from typing import Any

import pytest
import torch
from engines_of_modes import engine_of_mode
from models_for_tests import describe_config, make_config

from tensorrt_llm import Network, Parameter, Tensor, net_guard
from tensorrt_llm.functional import (
    add,
    cast,
    embedding,
    gather_last_token_logits,
    gpt_attention,
    matmul,
    mul,
    rms_norm,
    silu,
)
from tensorrt_llm.kernels import StepShape, reference_kernels
from tensorrt_llm.passes import optimize
from tensorrt_llm.passes.fuse_add_rms_norm import fuse_add_rms_norm
from tensorrt_llm.passes.fuse_embedding_cast import fuse_embedding_cast
from tensorrt_llm.passes.fuse_gated_mlp import fuse_gated_mlp
from tensorrt_llm.passes.fuse_norm_quantize import fuse_norm_quantize
from tensorrt_llm.passes.gather_early import _ROW_BY_ROW, gather_early
from tensorrt_llm.passes.simplify import simplify
from tensorrt_llm.plan import Plan
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.quantization.functional import quantize_per_token
from tensorrt_llm.runtime.executor import Executor

NO_STEP = StepShape(3, 1, 1, 3, 3, 3)  # ops other than attention don't look at it


def lines(network: Network) -> list[str]:
    """The printed nodes and outputs, without dtypes, shapes and attributes."""
    text = re.sub(r": \w+\[[^\]]*\]", "", str(network))
    text = re.sub(r", \w+=[^,)]+", "", text)
    return [line for line in text.splitlines() if not line.startswith(("input ", "weight "))]


def weight(network: Network, name: str, *shape: int, dtype: str = "float32") -> Tensor:
    network.set_named_parameters([(name, Parameter(shape, dtype))])
    return network.named_parameters[name].value


def evaluate(network: Network) -> dict[str, torch.Tensor]:
    """Outputs and marks by the reference kernels in float32, for inputs and weights that the names decide."""

    def values(name: str, shape: tuple[int | str, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn([3 if isinstance(dim, str) else dim for dim in shape], generator=generator)

    plan = network.to_plan()
    weights = {spec.name: values(spec.name, spec.shape) for spec in plan.weights}
    executor = Executor(plan, weights, reference_kernels(), torch.device("cpu"))
    inputs = {spec.name: values(spec.name, spec.shape) for spec in plan.inputs}
    made = executor.run(inputs, NO_STEP, keep=set(plan.marks.values()))
    return {
        **{name: made[tensor] for name, tensor in plan.marks.items()},
        **{name: made[name] for name in plan.outputs},
    }


def assert_same_results(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture
def network() -> Network:
    return Network()


# The whole list on a model of one layer


HEAD = [
    "vocab_embedding.embedding/1 = embedding(input_ids, vocab_embedding.weight)",
    "layers.0.ln_1.rms_norm/1 = rms_norm(vocab_embedding.embedding/1, layers.0.ln_1.weight)",
    "layers.0.attention.qkv.matmul/1 = matmul(layers.0.ln_1.rms_norm/1, layers.0.attention.qkv.weight, "
    "layers.0.attention.qkv.bias)",
    "layers.0.attention.gpt_attention/1 = gpt_attention(layers.0.attention.qkv.matmul/1, past_key_value_0, "
    "position_ids, query_starts, sequence_length, context_lengths, block_tables)",
    "layers.0.attention.dense.matmul/1 = matmul(layers.0.attention.gpt_attention/1, layers.0.attention.dense.weight)",
]
TAIL = [
    "lm_head.matmul/1 = matmul(ln_f.rms_norm/1, lm_head.weight)",
    "output logits = lm_head.matmul/1",
]


def test_a_layer_is_described_op_by_op() -> None:
    assert lines(describe_config(make_config())) == [
        *HEAD,
        "layers.0.add/1 = add(vocab_embedding.embedding/1, layers.0.attention.dense.matmul/1)",
        "layers.0.ln_2.rms_norm/1 = rms_norm(layers.0.add/1, layers.0.ln_2.weight)",
        "layers.0.mlp.fc.matmul/1 = matmul(layers.0.ln_2.rms_norm/1, layers.0.mlp.fc.weight)",
        "layers.0.mlp.silu/1 = silu(layers.0.mlp.fc.matmul/1)",
        "layers.0.mlp.gate.matmul/1 = matmul(layers.0.ln_2.rms_norm/1, layers.0.mlp.gate.weight)",
        "layers.0.mlp.mul/1 = mul(layers.0.mlp.silu/1, layers.0.mlp.gate.matmul/1)",
        "layers.0.mlp.proj.matmul/1 = matmul(layers.0.mlp.mul/1, layers.0.mlp.proj.weight)",
        "layers.0.add/2 = add(layers.0.add/1, layers.0.mlp.proj.matmul/1)",
        "gather_last_token/1 = gather_last_token(layers.0.add/2, last_token_ids)",
        "ln_f.rms_norm/1 = rms_norm(gather_last_token/1, ln_f.weight)",
        *TAIL,
    ]


def test_an_optimized_layer_has_fused_nodes() -> None:
    assert lines(describe_config(make_config(), optimized=True)) == [
        *HEAD[:-1],
        "layers.0.attention.dense.gather_last_token/1 = gather_last_token(layers.0.attention.gpt_attention/1, "
        "last_token_ids)",
        "layers.0.attention.dense.matmul/1 = matmul(layers.0.attention.dense.gather_last_token/1, "
        "layers.0.attention.dense.weight)",
        "layers.0.gather_last_token/1 = gather_last_token(vocab_embedding.embedding/1, last_token_ids)",
        "layers.0.add_rms_norm/1, layers.0.add_rms_norm/2 = add_rms_norm(layers.0.gather_last_token/1, "
        "layers.0.attention.dense.matmul/1, layers.0.ln_2.weight)",
        "layers.0.mlp.gated_mlp/1 = gated_mlp(layers.0.add_rms_norm/2, layers.0.mlp.fc.weight, "
        "layers.0.mlp.gate.weight)",
        "layers.0.mlp.proj.matmul/1 = matmul(layers.0.mlp.gated_mlp/1, layers.0.mlp.proj.weight)",
        "layers.0.add_rms_norm/3, layers.0.add_rms_norm/4 = add_rms_norm(layers.0.add_rms_norm/1, "
        "layers.0.mlp.proj.matmul/1, ln_f.weight)",
        "lm_head.matmul/1 = matmul(layers.0.add_rms_norm/4, lm_head.weight)",
        "output logits = lm_head.matmul/1",
    ]


def test_norms_between_layers_are_fused_too() -> None:
    """All but the first norm, which follows the embedding, and the last, which follows the gather."""
    network = describe_config(make_config(num_hidden_layers=3))
    assert fuse_add_rms_norm(network) == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_precision_is_fused(dtype: str) -> None:
    ops = [node.op for node in describe_config(make_config(), dtype, optimized=True).nodes]
    assert ops.count("gated_mlp") == 1 and ops.count("add_rms_norm") == 2 and "cast" not in ops


def test_marks_survive_all_passes() -> None:
    plain, optimized = (describe_config(make_config(num_hidden_layers=2), optimized=flag) for flag in (False, True))
    assert (
        list(optimized.marks)
        == list(plain.marks)
        == [
            "embedding",
            *(f"layers.{layer}.{name}" for layer in range(2) for name in ("attention", "mlp", "output")),
            "logits",
        ]
    )


def test_a_second_run_of_all_passes_finds_nothing() -> None:
    network = describe_config(make_config(num_hidden_layers=2), optimized=True)
    before = str(network)
    optimize(network)
    assert str(network) == before


def test_a_pass_that_breaks_the_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_everything(network: Network) -> int:
        network.nodes.clear()
        return 1

    monkeypatch.setattr("tensorrt_llm.passes.PASSES", (drop_everything,))
    with pytest.raises(AssertionError, match="pass drop_everything broke the network"):
        optimize(describe_config(make_config()))


# fuse_embedding_cast


def test_an_embedding_is_made_in_the_dtype_that_it_is_cast_to(network: Network) -> None:
    with net_guard(network):
        ids = Tensor("ids", "int32", ["num_tokens"])
        rows = embedding(ids, weight(network, "table", 11, 4, dtype="float16"))
        rows.mark_output("narrow")
        cast(embedding(ids, weight(network, "other", 11, 4, dtype="float16")), "float32").mark_output("wide")
    assert fuse_embedding_cast(network) == 1
    assert lines(network) == [
        "embedding/1 = embedding(ids, table)",
        "embedding/3 = embedding(ids, other)",
        "output narrow = embedding/1",
        "output wide = embedding/3",
    ]
    assert [node.outputs[0].dtype for node in network.nodes] == ["float16", "float32"]


def test_a_mark_on_a_cast_embedding_shows_the_wider_one(network: Network) -> None:
    with net_guard(network):
        rows = embedding(Tensor("ids", "int32", ["num_tokens"]), weight(network, "table", 11, 4, dtype="float16"))
        network.mark("seen", rows)
        cast(rows, "float32").mark_output("wide")
    assert fuse_embedding_cast(network) == 1
    network.verify()
    assert network.marks["seen"] is network.outputs["wide"]


def test_an_embedding_that_is_an_output_keeps_its_dtype(network: Network) -> None:
    with net_guard(network):
        rows = embedding(Tensor("ids", "int32", ["num_tokens"]), weight(network, "table", 11, 4, dtype="float16"))
        rows.mark_output("narrow")
        cast(rows, "float32").mark_output("wide")
    assert fuse_embedding_cast(network) == 0


def test_an_embedding_with_another_reader_stays_as_it_is(network: Network) -> None:
    with net_guard(network):
        rows = embedding(Tensor("ids", "int32", ["num_tokens"]), weight(network, "table", 11, 4, dtype="float16"))
        cast(rows, "float32").mark_output("wide")
        silu(rows).mark_output("other")
    assert fuse_embedding_cast(network) == 0


# gather_early


def describe_end(network: Network) -> dict[str, Tensor]:
    """Some rows of x + norm(x) W, for x the sum of two inputs; and its parts, inside net_guard."""
    left, right = (Tensor(name, "float32", ["num_tokens", 4]) for name in ("left", "right"))
    x = add(left, right)
    normed = rms_norm(x, weight(network, "scale", 4), eps=1e-6)
    product = matmul(normed, weight(network, "w", 4, 4))
    total = add(x, product)
    silu(gather_last_token_logits(total, Tensor("last", "int32", ["num_logits"]))).mark_output("y")
    return {"x": x, "normed": normed, "product": product, "total": total}


def run_end(network: Network, last: list[int]) -> dict[str, torch.Tensor]:
    plan = network.to_plan()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        spec.name: torch.randn([5 if isinstance(dim, str) else dim for dim in spec.shape], generator=generator)
        for spec in (*plan.weights, *plan.inputs)
    } | {"last": torch.tensor(last, dtype=torch.int32)}
    step = StepShape(5, len(last), 1, 5 - len(last) + 1, 5, 5)
    return Executor(plan, tensors, reference_kernels(), torch.device("cpu")).run(
        {spec.name: tensors[spec.name] for spec in plan.inputs}, step, keep=set(plan.marks.values())
    )


def test_what_nobody_else_reads_is_computed_for_the_rows_that_are_wanted(network: Network) -> None:
    with net_guard(network):
        describe_end(network)
    before = run_end(network, [4, 1])
    assert gather_early(network) == 4
    network.verify()
    assert lines(network) == [
        "gather_last_token/2 = gather_last_token(left, last)",
        "gather_last_token/3 = gather_last_token(right, last)",
        "add/1 = add(gather_last_token/2, gather_last_token/3)",
        "rms_norm/1 = rms_norm(add/1, scale)",
        "matmul/1 = matmul(rms_norm/1, w)",
        "add/2 = add(add/1, matmul/1)",
        "silu/1 = silu(add/2)",
        "output y = silu/1",
    ]
    shapes = {node.op: {made.shape for made in node.outputs} for node in network.nodes}
    assert shapes == dict.fromkeys(shapes, {("num_logits", 4)})
    torch.testing.assert_close(run_end(network, [4, 1])["y"], before["y"], rtol=1e-6, atol=1e-6)
    assert gather_early(network) == 0


@pytest.mark.parametrize("seen", ["x", "normed", "product"])
def test_what_another_node_reads_keeps_all_rows(network: Network, seen: str) -> None:
    with net_guard(network):
        parts = describe_end(network)
        silu(parts[seen]).mark_output("z")
    before = run_end(network, [0, 3])
    # The last sum always moves, and what comes between the tensor that is read and it.
    assert gather_early(network) == {"x": 3, "normed": 2, "product": 1}[seen]
    assert parts[seen].shape == ("num_tokens", 4) and parts["total"].shape == ("num_logits", 4)
    after = run_end(network, [0, 3])
    for name in "yz":
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seen", "count"), [("x", 3), ("total", 0)])
def test_outputs_keep_all_rows(network: Network, seen: str, count: int) -> None:
    with net_guard(network):
        describe_end(network)[seen].mark_output("z")
    assert gather_early(network) == count
    assert network.outputs["z"].shape == ("num_tokens", 4)


def test_a_mark_shows_the_rows_that_are_computed(network: Network) -> None:
    with net_guard(network):
        network.mark("seen", describe_end(network)["product"])
    before = run_end(network, [2, 4])
    assert gather_early(network) == 4
    (name,) = network.to_plan().marks.values()
    torch.testing.assert_close(run_end(network, [2, 4])[name], before[name][[2, 4]], rtol=1e-6, atol=1e-6)


def test_weights_and_what_is_made_of_them_have_no_rows_to_gather(network: Network) -> None:
    with net_guard(network):
        wide = cast(weight(network, "w", 4, 4, dtype="float16"), "float32")
        product = matmul(Tensor("x", "float32", ["num_tokens", 4]), wide)
        gather_last_token_logits(product, Tensor("last", "int32", ["num_logits"])).mark_output("y")
    assert gather_early(network) == 1
    assert lines(network) == [
        "cast/1 = cast(w)",
        "gather_last_token/2 = gather_last_token(x, last)",
        "matmul/1 = matmul(gather_last_token/2, cast/1)",
        "output y = matmul/1",
    ]
    assert wide.shape == (4, 4)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_of_a_model_the_last_layer_is_computed_for_the_rows_that_are_wanted(num_layers: int) -> None:
    assert_last_layer_is_of_wanted_rows(describe_config(make_config(num_hidden_layers=num_layers), optimized=True))


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        (QuantMode.use_weight_only(), {"quantize_lm_head": True}),
        (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), {"group_size": 32, "pre_quant_scale": True}),
        (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), {"group_size": 32, "act_order": True}),
        (QuantMode.use_smooth_quant(), {}),
        (QuantMode.use_smooth_quant(per_token=True, per_channel=True), {}),
    ],
    ids=str,
)
def test_so_it_is_in_every_quantized_format(mode: QuantMode, layout: dict[str, Any]) -> None:
    assert_last_layer_is_of_wanted_rows(engine_of_mode(mode, dtype="float16", **layout).plan)


def assert_last_layer_is_of_wanted_rows(network: Network | Plan) -> None:
    nodes = list(network.nodes)
    behind = 1 + max(index for index, node in enumerate(nodes) if node.op == "gpt_attention")
    before, after = (
        {made.shape[0] for node in part for made in node.outputs} for part in (nodes[:behind], nodes[behind:])
    )
    assert "num_logits" not in before and "num_tokens" not in after


def test_every_op_is_row_by_row_or_known_not_to_be() -> None:
    """Whoever adds an op says here which it is."""
    others = {"embedding", "gather_last_token", "gpt_attention"}
    made_by_later_passes = {"add_rms_norm", "add_rms_norm_quantize", "rms_norm_quantize"}
    assert _ROW_BY_ROW - {"allreduce"} == set(reference_kernels()) - others - made_by_later_passes


# simplify


def test_simplify_merges_what_is_computed_twice(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        mul(silu(x), silu(x)).mark_output("y")
    before = evaluate(network)
    assert simplify(network) == 1
    assert lines(network) == ["silu/1 = silu(x)", "mul/1 = mul(silu/1, silu/1)", "output y = mul/1"]
    assert_same_results(before, evaluate(network))


def test_simplify_merges_whole_chains_of_repeats(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        add(silu(silu(x)), silu(silu(x))).mark_output("y")
    assert simplify(network) == 2
    assert lines(network) == [
        "silu/1 = silu(x)",
        "silu/2 = silu(silu/1)",
        "add/1 = add(silu/2, silu/2)",
        "output y = add/1",
    ]


def test_simplify_keeps_nodes_that_differ_in_an_attribute(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        scale = weight(network, "w", 4)
        add(rms_norm(x, scale, 1e-6), rms_norm(x, scale, 1e-5)).mark_output("y")
    assert simplify(network) == 0


def test_simplify_drops_what_nothing_reads(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        silu(matmul(x, weight(network, "unused", 4, 4)))
        silu(x).mark_output("y")
    assert simplify(network) == 2
    assert (lines(network), list(network.weights)) == (["silu/2 = silu(x)", "output y = silu/2"], [])


def test_simplify_keeps_what_only_a_mark_reads(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        network.mark("seen", silu(x))
        add(x, x).mark_output("y")
    assert simplify(network) == 0


def test_simplify_keeps_both_of_two_equal_attentions(network: Network) -> None:
    """An attention writes the cache; who says that the second one is not needed?"""
    with net_guard(network):
        qkv = Tensor("qkv", "float32", ["num_tokens", 12])
        pool = Tensor("pool", "float32", ["num_blocks", 2, 1, 16, 4])
        ids = [Tensor(name, "int32", [dim]) for name, dim in zip("abcd", ("num_tokens", "b+1", "b", "b"), strict=True)]
        tables = Tensor("tables", "int32", ["b", "max_blocks"])
        contexts = [
            gpt_attention(
                qkv, pool, *ids, tables, num_heads=1, num_kv_heads=1, hidden_size_per_head=4, rotary_embedding_dim=4
            )[0]
            for _ in range(2)
        ]
        add(*contexts).mark_output("y")
    assert simplify(network) == 0


# fuse_gated_mlp


def gated(network: Network, *, swap: bool = False) -> dict[str, Tensor]:
    """silu(x a) * (x b) and its parts, inside net_guard."""
    x = Tensor("x", "float32", ["num_tokens", 4])
    a = matmul(x, weight(network, "a", 6, 4))
    activated = silu(a)
    b = matmul(x, weight(network, "b", 6, 4))
    product = mul(b, activated) if swap else mul(activated, b)
    product.mark_output("y")
    return {"x": x, "a": a, "activated": activated, "b": b, "product": product}


@pytest.mark.parametrize("swap", [False, True])
def test_a_gated_mlp_is_fused_in_either_order(network: Network, swap: bool) -> None:
    with net_guard(network):
        gated(network, swap=swap)
    before = evaluate(network)
    assert fuse_gated_mlp(network) == 1
    network.verify()
    assert lines(network) == ["gated_mlp/1 = gated_mlp(x, a, b)", "output y = gated_mlp/1"]
    assert_same_results(before, evaluate(network))


@pytest.mark.parametrize("inner", ["a", "activated", "b"])
def test_a_gated_mlp_with_a_marked_inner_value_stays(network: Network, inner: str) -> None:
    with net_guard(network):
        network.mark("seen", gated(network)[inner])
    assert fuse_gated_mlp(network) == 0


@pytest.mark.parametrize("inner", ["a", "activated", "b"])
def test_a_gated_mlp_whose_inner_value_is_used_elsewhere_stays(network: Network, inner: str) -> None:
    with net_guard(network):
        silu(gated(network)[inner]).mark_output("z")
    assert fuse_gated_mlp(network) == 0


def test_branches_of_different_inputs_are_not_fused(network: Network) -> None:
    with net_guard(network):
        x, z = (Tensor(name, "float32", ["num_tokens", 4]) for name in "xz")
        mul(silu(matmul(x, weight(network, "a", 6, 4))), matmul(z, weight(network, "b", 6, 4))).mark_output("y")
    assert fuse_gated_mlp(network) == 0


def test_a_branch_with_a_bias_is_not_fused(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        activated = silu(matmul(x, weight(network, "a", 6, 4), weight(network, "bias", 6)))
        mul(activated, matmul(x, weight(network, "b", 6, 4))).mark_output("y")
    assert fuse_gated_mlp(network) == 0


def test_a_product_without_silu_is_not_fused(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        mul(matmul(x, weight(network, "a", 6, 4)), matmul(x, weight(network, "b", 6, 4))).mark_output("y")
    assert fuse_gated_mlp(network) == 0


def test_silu_on_both_branches_is_not_fused(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        mul(silu(matmul(x, weight(network, "a", 6, 4))), silu(matmul(x, weight(network, "b", 6, 4)))).mark_output("y")
    assert fuse_gated_mlp(network) == 0


def test_a_branch_of_another_dtype_is_not_fused(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float16", ["num_tokens", 4])
        a, b = (weight(network, name, 6, 4, dtype="float16") for name in "ab")
        mul(silu(matmul(x, a, dtype="float32")), matmul(x, b, dtype="float32")).mark_output("y")
    assert fuse_gated_mlp(network) == 0


# fuse_add_rms_norm


def test_a_sum_that_others_read_too_is_fused_with_its_norm(network: Network) -> None:
    with net_guard(network):
        x, y = (Tensor(name, "float32", ["num_tokens", 4]) for name in "xy")
        total = add(x, y)
        network.mark("seen", total)
        rms_norm(total, weight(network, "w", 4)).mark_output("normed")
        silu(total).mark_output("other")
    before = evaluate(network)
    assert fuse_add_rms_norm(network) == 1
    network.verify()
    assert lines(network) == [
        "add_rms_norm/1, add_rms_norm/2 = add_rms_norm(x, y, w)",
        "silu/1 = silu(add_rms_norm/1)",
        "output normed = add_rms_norm/2",
        "output other = silu/1",
    ]
    assert_same_results(before, evaluate(network))


def test_the_float32_operand_is_the_residual(network: Network) -> None:
    with net_guard(network):
        narrow, wide = (Tensor(name, dtype, ["num_tokens", 4]) for name, dtype in (("n", "float16"), ("w", "float32")))
        rms_norm(add(narrow, wide), weight(network, "g", 4)).mark_output("y")
    fuse_add_rms_norm(network)
    assert lines(network)[0] == "add_rms_norm/1, add_rms_norm/2 = add_rms_norm(w, n, g)"


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "bfloat16")])
def test_a_sum_without_a_float32_operand_is_not_fused(network: Network, dtypes: tuple[str, str]) -> None:
    with net_guard(network):
        x, y = (Tensor(name, dtype, ["num_tokens", 4]) for name, dtype in zip("xy", dtypes, strict=True))
        rms_norm(add(x, y), weight(network, "w", 4)).mark_output("z")
    assert fuse_add_rms_norm(network) == 0


def test_of_two_norms_of_one_sum_the_first_is_fused(network: Network) -> None:
    with net_guard(network):
        x, y = (Tensor(name, "float32", ["num_tokens", 4]) for name in "xy")
        total = add(x, y)
        for name in ("v", "w"):
            rms_norm(total, weight(network, name, 4)).mark_output(f"normed by {name}")
    before = evaluate(network)
    assert fuse_add_rms_norm(network) == 1
    network.verify()
    assert_same_results(before, evaluate(network))


def test_a_norm_of_an_input_is_not_fused(network: Network) -> None:
    with net_guard(network):
        x = Tensor("x", "float32", ["num_tokens", 4])
        rms_norm(x, weight(network, "w", 4)).mark_output("y")
    assert fuse_add_rms_norm(network) == 0


# fuse_norm_quantize


@pytest.mark.parametrize("has_smoother", [False, True])
@pytest.mark.parametrize("has_addend", [False, True])
def test_a_norm_is_fused_with_its_quantization(network: Network, has_addend: bool, has_smoother: bool) -> None:
    with net_guard(network):
        x, y = (Tensor(name, "float32", ["num_tokens", 4]) for name in "xy")
        smoother = weight(network, "s", 4) if has_smoother else None
        total = add(x, y) if has_addend else x
        quantized, scale = quantize_per_token(rms_norm(total, weight(network, "w", 4)), smoother)
        quantized.mark_output("q")
        scale.mark_output("scale")
        silu(total).mark_output("other")
    fuse_add_rms_norm(network)
    before = evaluate(network)
    assert fuse_norm_quantize(network) == 1
    network.verify()
    fused = "add_rms_norm_quantize" if has_addend else "rms_norm_quantize"
    assert [node.op for node in network.nodes] == [fused, "silu"]
    assert_same_results(before, evaluate(network))


def test_a_norm_that_others_read_too_is_not_fused_with_its_quantization(network: Network) -> None:
    with net_guard(network):
        normed = rms_norm(Tensor("x", "float32", ["num_tokens", 4]), weight(network, "w", 4))
        for name, tensor in zip(("q", "scale"), quantize_per_token(normed), strict=True):
            tensor.mark_output(name)
        silu(normed).mark_output("other")
    assert fuse_norm_quantize(network) == 0


def test_a_quantized_residual_is_not_taken_for_its_norm(network: Network) -> None:
    with net_guard(network):
        x, y = (Tensor(name, "float32", ["num_tokens", 4]) for name in "xy")
        total = add(x, y)
        rms_norm(total, weight(network, "w", 4)).mark_output("normed")
        for name, tensor in zip(("q", "scale"), quantize_per_token(total), strict=True):
            tensor.mark_output(name)
    fuse_add_rms_norm(network)
    assert fuse_norm_quantize(network) == 0
