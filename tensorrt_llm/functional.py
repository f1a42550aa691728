"""The ops of a network: each checks its operands, infers its result and adds one node.

What an op means is written once, in kernels/reference.py, under the same name. Knows no kernel and no device.
"""

from enum import IntEnum

from .dtype import is_floating, wider
from .network import Tensor


class RotaryScalingType(IntEnum):
    """How the RoPE base grows with the length; `dynamic` is Qwen's stepwise NTK (see gpt_attention)."""

    none = 0
    linear = 1
    dynamic = 2


def _check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}")


def _check_matrix(op: str, x: Tensor, columns: object = None) -> None:
    _check(len(x.shape) == 2 and is_floating(x.dtype), op, f"{x!r} is not a matrix of floats")
    _check(columns is None or x.shape[1] == columns, op, f"{x!r} should have {columns} columns")


def _check_index(op: str, ids: Tensor) -> None:
    _check(len(ids.shape) == 1 and ids.dtype == "int32", op, f"{ids!r} is not a vector of int32")


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, hidden] picked by `input` int32 [num_tokens]."""
    _check_index("embedding", input)
    _check_matrix("embedding", weight)
    return input.network.add("embedding", input, weight, outputs=[(weight.dtype, (input.shape[0], weight.shape[1]))])[0]


def rms_norm(input: Tensor, weight: Tensor, eps: float = 1e-6, dtype: str | None = None) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the last dim, in `dtype` (default: the weight's)."""
    _check_matrix("rms_norm", input)
    _check(weight.shape == (input.shape[1],), "rms_norm", f"{weight!r} does not fit {input!r}")
    dtype = dtype or weight.dtype
    return input.network.add("rms_norm", input, weight, outputs=[(dtype, input.shape)], eps=eps, dtype=dtype)[0]


def matmul(input: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: str | None = None) -> Tensor:
    """input [m, k] times the transpose of weight [n, k], plus bias [n], rounded once to `dtype`, by default input's."""
    _check_matrix("matmul", input)
    _check_matrix("matmul", weight, columns=input.shape[1])
    _check(weight.dtype == input.dtype, "matmul", f"{weight!r} has another dtype than {input!r}")
    _check(bias is None or bias.shape == (weight.shape[0],), "matmul", f"{bias!r} does not fit {weight!r}")
    operands = (input, weight) if bias is None else (input, weight, bias)
    dtype = dtype or input.dtype
    return input.network.add("matmul", *operands, outputs=[(dtype, (input.shape[0], weight.shape[0]))], dtype=dtype)[0]


def add(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise sum, in the wider dtype."""
    return _elementwise("add", left, right)


def mul(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise product, in the wider dtype."""
    return _elementwise("mul", left, right)


def _elementwise(op: str, left: Tensor, right: Tensor) -> Tensor:
    _check(left.shape == right.shape, op, f"{left!r} and {right!r} differ in shape")
    _check(is_floating(left.dtype) and is_floating(right.dtype), op, f"{left!r} and {right!r} are not both floats")
    return left.network.add(op, left, right, outputs=[(wider(left.dtype, right.dtype), left.shape)])[0]


def silu(input: Tensor) -> Tensor:
    """input * sigmoid(input), in its dtype."""
    _check(is_floating(input.dtype), "silu", f"{input!r} is not of a floating dtype")
    return input.network.add("silu", input, outputs=[(input.dtype, input.shape)])[0]


def cast(input: Tensor, dtype: str) -> Tensor:
    """The same values in `dtype`; a cast to the tensor's own dtype adds nothing."""
    if dtype == input.dtype:
        return input
    return input.network.add("cast", input, outputs=[(dtype, input.shape)], dtype=dtype)[0]


def gather_last_token_logits(hidden_states: Tensor, last_token_ids: Tensor) -> Tensor:
    """Rows of `hidden_states` [num_tokens, hidden] picked by `last_token_ids` int32 [num_logits], counted from 0."""
    _check_matrix("gather_last_token_logits", hidden_states)
    _check_index("gather_last_token_logits", last_token_ids)
    return hidden_states.network.add(
        "gather_last_token",
        hidden_states,
        last_token_ids,
        outputs=[(hidden_states.dtype, (last_token_ids.shape[0], hidden_states.shape[1]))],
    )[0]


def gpt_attention(
    qkv: Tensor,
    past_key_value: Tensor,
    position_ids: Tensor,
    query_starts: Tensor,
    sequence_length: Tensor,
    context_lengths: Tensor,
    block_tables: Tensor,
    key_value_scales: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    hidden_size_per_head: int,
    q_scaling: float = 1.0,
    rotary_embedding_dim: int,
    rotary_embedding_base: float = 10000.0,
    rotary_embedding_scale_type: RotaryScalingType = RotaryScalingType.none,
    rotary_embedding_max_positions: int = 0,
    use_logn_scaling: bool = False,
) -> tuple[Tensor, Tensor]:
    """RoPE, KV-cache write and causal attention of packed sequences, in one op: (context, past_key_value).

    qkv is [num_tokens, (num_heads + 2 num_kv_heads) hidden_size_per_head], Q then K then V; context is
    [num_tokens, num_heads hidden_size_per_head]. past_key_value [num_blocks, 2, num_kv_heads, tokens_per_block,
    hidden_size_per_head] is written in place, so the second result is the first operand (0.7.1's present_key_value).
    An int8 pool needs key_value_scales float32 [num_blocks, 2, num_kv_heads, tokens_per_block]: keys (after RoPE) and
    values are quantized as they come, with a scale for each token and head, its largest magnitude / 127.

    RotaryScalingType.dynamic is Qwen's rule: for a prompt of L tokens and a model trained on
    S = rotary_embedding_max_positions, alpha = max(2^ceil(log2(L/S) + 1) - 1, 1) multiplies the base as
    alpha^(d/(d-2)), for the whole life of the sequence. With use_logn_scaling q at position i (from 1) is multiplied
    by max(1, log_S i). Source of both: modeling_qwen.py of the Qwen-1 checkpoints.
    """
    num_tokens = qkv.shape[0]
    _check_matrix("gpt_attention", qkv, columns=(num_heads + 2 * num_kv_heads) * hidden_size_per_head)
    _check(num_heads % num_kv_heads == 0, "gpt_attention", f"{num_heads} heads do not share {num_kv_heads} KV heads")
    pool_dims = past_key_value.shape[1:3] + past_key_value.shape[4:]
    _check(
        pool_dims == (2, num_kv_heads, hidden_size_per_head),
        "gpt_attention",
        f"{past_key_value!r} is not [num_blocks, 2, {num_kv_heads}, tokens_per_block, {hidden_size_per_head}]",
    )
    _check(
        (past_key_value.dtype == "int8") == (key_value_scales is not None),
        "gpt_attention",
        f"{past_key_value!r} does not go with scales {key_value_scales!r}: an int8 pool has them, others don't",
    )
    _check(
        key_value_scales is None
        or (key_value_scales.shape == past_key_value.shape[:-1] and key_value_scales.dtype == "float32"),
        "gpt_attention",
        f"{key_value_scales!r} is not float32 of the shape of {past_key_value!r} without its last dim",
    )
    for vector in (position_ids, query_starts, sequence_length, context_lengths):
        _check_index("gpt_attention", vector)
    _check(
        len(block_tables.shape) == 2 and block_tables.dtype == "int32",
        "gpt_attention",
        f"{block_tables!r} is not a matrix of int32",
    )
    _check(position_ids.shape == (num_tokens,), "gpt_attention", f"{position_ids!r} does not fit {qkv!r}")
    _check(
        rotary_embedding_dim % 2 == 0 and 2 < rotary_embedding_dim <= hidden_size_per_head,
        "gpt_attention",
        f"rotary_embedding_dim is {rotary_embedding_dim}, expected an even number from 4 to {hidden_size_per_head}",
    )
    _check(
        rotary_embedding_scale_type != RotaryScalingType.linear,
        "gpt_attention",
        "linear RoPE scaling is not supported, expected none or dynamic",
    )
    is_dynamic = rotary_embedding_scale_type == RotaryScalingType.dynamic
    _check(
        rotary_embedding_max_positions > 1 or not (is_dynamic or use_logn_scaling),
        "gpt_attention",
        f"rotary_embedding_max_positions is {rotary_embedding_max_positions}, expected the trained length",
    )
    (context,) = qkv.network.add(
        "gpt_attention",
        qkv,
        past_key_value,
        position_ids,
        query_starts,
        sequence_length,
        context_lengths,
        block_tables,
        *(() if key_value_scales is None else (key_value_scales,)),
        outputs=[(qkv.dtype, (num_tokens, num_heads * hidden_size_per_head))],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=hidden_size_per_head,
        q_scaling=q_scaling,
        rotary_base=rotary_embedding_base,
        rotary_dim=rotary_embedding_dim,
        ntk_length=rotary_embedding_max_positions if is_dynamic else 0,
        logn_length=rotary_embedding_max_positions if use_logn_scaling else 0,
    )
    return context, past_key_value


def allreduce(tensor: Tensor, group: tuple[int, ...]) -> Tensor:
    """The sum of `tensor` over the ranks of `group`."""
    return tensor.network.add("allreduce", tensor, outputs=[(tensor.dtype, tensor.shape)], group=list(group))[0]


def allgather(tensor: Tensor, group: tuple[int, ...], gather_dim: int = 0) -> Tensor:
    """The tensors of all ranks of `group`, joined along `gather_dim`."""
    dim = tensor.shape[gather_dim]
    _check(isinstance(dim, int), "allgather", f"dim {gather_dim} of {tensor!r} is not known when building")
    shape = list(tensor.shape)
    shape[gather_dim] = int(dim) * len(group)
    return tensor.network.add(
        "allgather", tensor, outputs=[(tensor.dtype, tuple(shape))], group=list(group), gather_dim=gather_dim
    )[0]
