"""Every op infers its result, and refuses operands that don't fit with a ValueError that names them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorrt_llm import Network, Tensor, net_guard
from tensorrt_llm.functional import (
    RotaryScalingType,
    add,
    allgather,
    allreduce,
    cast,
    embedding,
    gather_last_token_logits,
    gpt_attention,
    matmul,
    mul,
    rms_norm,
    silu,
)


@pytest.fixture(autouse=True)
def network() -> Iterator[Network]:
    with net_guard(Network()) as network:
        yield network


def x(*shape: int | str, dtype: str = "float16", name: str = "x") -> Tensor:
    return Tensor(name, dtype, shape)


def ids(dim: str | int = "num_tokens", name: str = "ids", dtype: str = "int32") -> Tensor:
    return Tensor(name, dtype, [dim])


def attend(**changes: Any) -> tuple[Tensor, Tensor]:
    """A gpt_attention with 4 heads of 8 that share 2 KV heads."""
    operands: dict[str, Any] = {
        "qkv": ("float16", ["num_tokens", 64]),
        "past_key_value": ("float16", ["num_blocks", 2, 2, 16, 8]),
        "position_ids": ("int32", ["num_tokens"]),
        "query_starts": ("int32", ["batch+1"]),
        "sequence_length": ("int32", ["batch"]),
        "context_lengths": ("int32", ["batch"]),
        "block_tables": ("int32", ["batch", "max_blocks"]),
    }
    settings: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_size_per_head": 8,
        "rotary_embedding_dim": 8,
    }
    tensors = {name: Tensor(name, *changes.pop(name, default)) for name, default in operands.items()}
    return gpt_attention(**tensors, **settings | changes)


@pytest.mark.parametrize(
    ("make", "dtype", "shape"),
    [
        (lambda: embedding(ids(), x(9, 4)), "float16", ("num_tokens", 4)),
        (lambda: rms_norm(x("n", 4, dtype="float32"), x(4, name="w")), "float16", ("n", 4)),
        (lambda: rms_norm(x("n", 4), x(4, name="w"), dtype="float32"), "float32", ("n", 4)),
        (lambda: matmul(x("n", 4), x(9, 4, name="w")), "float16", ("n", 9)),
        (lambda: matmul(x("n", 4), x(9, 4, name="w"), x(9, name="b"), "float32"), "float32", ("n", 9)),
        (lambda: add(x("n", 4), x("n", 4, name="y")), "float16", ("n", 4)),
        (lambda: add(x("n", 4), x("n", 4, name="y", dtype="float32")), "float32", ("n", 4)),
        (lambda: mul(x("n", 4), x("n", 4, name="y", dtype="bfloat16")), "float32", ("n", 4)),
        (lambda: x("n", 4) + x("n", 4, name="y"), "float16", ("n", 4)),
        (lambda: x("n", 4) * x("n", 4, name="y"), "float16", ("n", 4)),
        (lambda: silu(x("n", 4)), "float16", ("n", 4)),
        (lambda: cast(x("n", 4), "float32"), "float32", ("n", 4)),
        (lambda: gather_last_token_logits(x("n", 4), ids("m")), "float16", ("m", 4)),
        (lambda: attend()[0], "float16", ("num_tokens", 32)),
        (lambda: attend()[1], "float16", ("num_blocks", 2, 2, 16, 8)),
        (lambda: allreduce(x("n", 4), (0, 1)), "float16", ("n", 4)),
        (lambda: allgather(x("n", 4), (0, 1, 2), gather_dim=1), "float16", ("n", 12)),
    ],
)
def test_an_op_infers_dtype_and_shape(make: Callable[[], Tensor], dtype: str, shape: tuple[int | str, ...]) -> None:
    result = make()
    assert (result.dtype, result.shape) == (dtype, shape)


def test_a_cast_to_the_same_dtype_adds_no_node(network: Network) -> None:
    tensor = x("n", 4)
    assert cast(tensor, "float16") is tensor and not network.nodes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: embedding(ids(dtype="int64"), x(9, 4)), "embedding: ids: int64"),
        (lambda: embedding(x("n", "m", dtype="int32"), x(9, 4, name="w")), "embedding: x: int32"),
        (lambda: embedding(ids(), x(9)), "embedding: x: float16"),
        (lambda: rms_norm(x("n", 4), x(5, name="w")), r"rms_norm: w: float16\[5\] does not fit x: float16\[n, 4\]"),
        (lambda: rms_norm(x("n", dtype="float32"), x(5, name="w")), "rms_norm: x: .* is not a matrix"),
        (lambda: matmul(x("n", 4), x(9, 5, name="w")), r"matmul: w: float16\[9, 5\] should have 4 columns"),
        (
            lambda: matmul(x("n", 4), x(9, 4, name="w", dtype="float32")),
            "w: float32.* has another dtype than x: float16",
        ),
        (lambda: matmul(x("n", 4), x(9, 4, name="w"), x(8, name="b")), r"matmul: b: float16\[8\] does not fit w"),
        (lambda: matmul(x("n", 4, dtype="int32"), x(9, 4, name="w")), "matmul: x: int32.* not a matrix of floats"),
        (lambda: add(x("n", 4), x("n", 5, name="y")), r"add: x: float16\[n, 4\] and y: float16\[n, 5\] differ"),
        (lambda: mul(x("n", 4), x("m", 4, name="y")), r"mul: x: float16\[n, 4\] and y: float16\[m, 4\] differ"),
        (lambda: add(x("n", 4), x("n", 4, name="y", dtype="int32")), "add: x: .* and y: int32.* not both floats"),
        (lambda: silu(x("n", 4, dtype="int32")), "silu: x: int32"),
        (lambda: cast(x("n", 4), "float8"), "unknown dtype 'float8'"),
        (lambda: gather_last_token_logits(x("n", 4), ids(dtype="int64")), "gather_last_token_logits: ids: int64"),
        (lambda: gather_last_token_logits(x("n"), ids()), "gather_last_token_logits: x: "),
        (lambda: allgather(x("n", 4), (0, 1)), "allgather: dim 0 of x: .* is not known when building"),
        (lambda: attend(qkv=("float16", ["num_tokens", 65])), "gpt_attention: qkv: .* should have 64 columns"),
        (lambda: attend(num_kv_heads=3), "gpt_attention: qkv"),
        (lambda: attend(past_key_value=("float16", ["num_blocks", 2, 4, 16, 8])), "gpt_attention: past_key_value"),
        (lambda: attend(past_key_value=("float16", ["num_blocks", 16, 8])), "gpt_attention: past_key_value"),
        (lambda: attend(position_ids=("int32", ["batch"])), "gpt_attention: position_ids: .* does not fit qkv"),
        (lambda: attend(position_ids=("int64", ["num_tokens"])), "gpt_attention: position_ids"),
        (lambda: attend(query_starts=("float32", ["batch+1"])), "gpt_attention: query_starts"),
        (lambda: attend(sequence_length=("int64", ["batch"])), "gpt_attention: sequence_length"),
        (lambda: attend(context_lengths=("int32", ["batch", 1])), "gpt_attention: context_lengths"),
        (lambda: attend(block_tables=("int32", ["batch"])), "gpt_attention: block_tables"),
        (lambda: attend(block_tables=("int64", ["batch", "max_blocks"])), "gpt_attention: block_tables"),
        (lambda: attend(rotary_embedding_dim=7), "rotary_embedding_dim is 7, expected an even number from 4 to 8"),
        (lambda: attend(rotary_embedding_dim=10), "rotary_embedding_dim is 10"),
        (lambda: attend(rotary_embedding_scale_type=RotaryScalingType.linear), "linear RoPE scaling is not supported"),
        (lambda: attend(rotary_embedding_scale_type=RotaryScalingType.dynamic), "rotary_embedding_max_positions is 0"),
        (
            lambda: attend(use_logn_scaling=True, rotary_embedding_max_positions=1),
            "rotary_embedding_max_positions is 1",
        ),
    ],
)
def test_an_op_refuses_operands_that_do_not_fit(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_heads_must_share_kv_heads_evenly() -> None:
    with pytest.raises(ValueError, match="4 heads do not share 3 KV heads"):
        attend(num_kv_heads=3, qkv=("float16", ["num_tokens", 80]))


def test_dynamic_rope_and_logn_are_attributes_of_the_node(network: Network) -> None:
    attend(
        rotary_embedding_scale_type=RotaryScalingType.dynamic,
        rotary_embedding_max_positions=2048,
        use_logn_scaling=True,
    )
    attrs = network.nodes[0].attrs
    assert (attrs["ntk_length"], attrs["logn_length"]) == (2048, 2048)
