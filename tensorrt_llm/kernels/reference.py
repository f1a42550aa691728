"""What every op means, in plain torch: the yardstick of all kernels, and the interpreter of a network.

Each function computes in the dtype of its float operands or wider (float32, or float64 when given float64) and rounds
once to the result's dtype. Runs on any device, at any speed. Knows no graph and no request.
"""

import math

import torch

from ..dtype import torch_dtype
from .step import StepShape

# Stands for the token of a row whose largest logit is not a finite number.
BROKEN = -1


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 when any operand has it, else float32: what sums and products are held in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def embedding(ids: torch.Tensor, weight: torch.Tensor, *, dtype: str | None = None) -> torch.Tensor:
    """ids int [T], weight [vocab, hidden] -> [T, hidden], in the weight's dtype or in another."""
    rows = weight[ids.long()]
    return rows if dtype is None else rows.to(torch_dtype(dtype))


def take_integers(
    memory: torch.Tensor, integers: torch.Tensor, num_tokens: int, sampled_ids: torch.Tensor | None, num_sampled: int
) -> None:
    """Fill memory with the integers of a step, all int32 [n]: ids of tokens, where each comes from, and others.

    integers[t] is the id of token t, unless integers[num_tokens + t] is a row of `sampled_ids`, below `num_sampled`.
    """
    memory.copy_(integers)
    if sampled_ids is not None and len(sampled_ids):
        ids, sources = integers[: 2 * num_tokens].split(num_tokens)
        sampled = sampled_ids.index_select(0, sources.clamp(max=len(sampled_ids) - 1))
        memory[:num_tokens] = torch.where(sources < num_sampled, sampled, ids)


def greedy_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [rows] twice: the ids of the largest logits [rows, vocab], and the same with BROKEN where that is so.

    Of equal logits the lowest id wins. The id of a broken row is some id of the vocabulary.
    """
    largest, ids = logits.max(dim=-1)
    return ids.int(), torch.where(largest.isfinite(), ids, BROKEN).int()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; x [T, hidden], weight [hidden]."""
    wide = x.to(compute_dtype(x, weight))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(wide.dtype)).to(torch_dtype(dtype))


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y in the residual's dtype, its rms_norm): x [T, hidden] is the residual stream, y what a layer adds."""
    residual = add(x, y)
    return residual, rms_norm(residual, weight, eps=eps, dtype=dtype)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: str) -> torch.Tensor:
    """x [T, k] times the transpose of weight [n, k], plus bias [n]."""
    wide = compute_dtype(x, weight)
    product = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        product = product + bias.to(wide)
    return product.to(torch_dtype(dtype))


def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Elementwise sum; operands of two dtypes give float32."""
    if left.dtype == right.dtype:
        return left + right
    wide = compute_dtype(left, right)
    return left.to(wide) + right.to(wide)


def mul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Elementwise product; operands of two dtypes give float32."""
    if left.dtype == right.dtype:
        return left * right
    wide = compute_dtype(left, right)
    return left.to(wide) * right.to(wide)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x)."""
    return torch.nn.functional.silu(x.to(compute_dtype(x))).to(x.dtype)


def cast(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return x.to(torch_dtype(dtype))


def gated_mlp(x: torch.Tensor, fc: torch.Tensor, gate: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """silu(x fc^T) * (x gate^T): x [T, k], fc and gate [n, k] -> [T, n], rounded once."""
    wide = compute_dtype(x, fc)
    activated = torch.nn.functional.silu(x.to(wide) @ fc.to(wide).T)
    return (activated * (x.to(wide) @ gate.to(wide).T)).to(torch_dtype(dtype))


def gather_last_token(x: torch.Tensor, last_token_ids: torch.Tensor, *, step: StepShape) -> torch.Tensor:
    """Rows of x [T, hidden] picked by last_token_ids int [N], counted from 0: in a step of decodes all, as they are."""
    return x[last_token_ids.long()] if step.num_contexts else x


def ntk_alpha(context_length: int, trained_length: int) -> int:
    """Qwen's RoPE stretch max(2^ceil(log2(L / S) + 1) - 1, 1), in integers: 1 up to S, 3 up to 2 S, 7 up to 4 S..."""
    power = 1
    while context_length > power * trained_length:
        power *= 2
    return 2 * power - 1


def rope_angles(
    position_ids: torch.Tensor, *, rotary_base: float, rotary_dim: int, alpha: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rotation angles [T, rotary_dim / 2]: position * base'^(-2 j / d) with base' = base * alpha^(d / (d - 2))."""
    base = rotary_base * alpha ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=position_ids.device) / rotary_dim
    return position_ids.to(dtype)[:, None] * base**-exponents


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """NeoX rotation of the first 2 * angles.shape[1] dims of x [T, heads, head_size]; the others stay."""
    half = angles.shape[1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def logn_scale(position_ids: torch.Tensor, trained_length: int, dtype: torch.dtype) -> torch.Tensor:
    """max(1, log_S(i)) for the position i counted from 1, [T]."""
    return (torch.log(position_ids.to(dtype) + 1) / math.log(trained_length)).clamp(min=1)


def smoothed(x: torch.Tensor, smoother: torch.Tensor | None) -> torch.Tensor:
    """x / smoother in float32, as x times the inverse: a kernel inverts the smoother once, and divides nothing."""
    return x.float() if smoother is None else x.float() * (1 / smoother)


def quantize_per_token(x: torch.Tensor, smoother: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q = round(x / smoother * (127 / amax)), amax the largest magnitude of a row: int8 [T, k], amax / 127 [T, 1].

    Half steps go to the even integer. A row of (next to) nothing becomes zeros.
    """
    smooth = smoothed(x, smoother)
    amax = smooth.abs().amax(-1, keepdim=True)
    steps_per_unit = torch.where(amax > 1e-30, 127 / amax, torch.zeros_like(amax))
    return (smooth * steps_per_unit).round().to(torch.int8), amax / 127


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values [T, heads, head_size] -> int8, and float32 [T, heads], a scale for each token and head.

    No calibration, and an outlier spoils its own token and head only.
    """
    q, scale = quantize_per_token(x.flatten(0, 1))
    return q.view(x.shape), scale.view(x.shape[:2])


def gpt_attention(
    qkv: torch.Tensor,
    past_key_value: torch.Tensor,
    position_ids: torch.Tensor,
    query_starts: torch.Tensor,
    sequence_length: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    key_value_scales: torch.Tensor | None = None,
    *,
    step: StepShape,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_scaling: float = 1.0,
    rotary_base: float,
    rotary_dim: int,
    ntk_length: int,
    logn_length: int,
) -> torch.Tensor:
    """RoPE, KV write, causal attention, sequence by sequence; see functional.gpt_attention for shapes and rules.

    Zero for ntk_length or logn_length turns that rule off. The score matrix of one sequence is materialised.
    """
    del step  # everything it says stands in the tensors too, and this function may read those
    wide = compute_dtype(qkv)
    q, k, v = (
        qkv.to(wide)
        .view(-1, num_heads + 2 * num_kv_heads, head_size)
        .split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    )
    block_size = past_key_value.shape[3]
    context = torch.empty(qkv.shape[0], num_heads * head_size, dtype=qkv.dtype, device=qkv.device)
    starts = query_starts.tolist()
    for index, (total, prompt) in enumerate(zip(sequence_length.tolist(), context_lengths.tolist(), strict=True)):
        tokens = slice(starts[index], starts[index + 1])
        positions = position_ids[tokens]
        alpha = ntk_alpha(prompt, ntk_length) if ntk_length else 1
        angles = rope_angles(positions, rotary_base=rotary_base, rotary_dim=rotary_dim, alpha=alpha, dtype=wide)
        query = rotate(q[tokens], angles)
        if logn_length:
            query = query * logn_scale(positions, logn_length, wide)[:, None, None]

        blocks = block_tables[index].long()
        block, offset = blocks[positions // block_size], positions.long() % block_size
        for side, vectors in enumerate((rotate(k[tokens], angles), v[tokens])):
            if key_value_scales is not None:
                vectors, key_value_scales[block, side, :, offset] = quantize_kv(vectors)
            past_key_value[block, side, :, offset] = vectors.to(past_key_value.dtype)

        # [blocks, 2, kv_heads, block_size, head_size] -> [kv_heads, total, head_size]
        blocks = blocks[: -(-total // block_size)]
        cached = past_key_value[blocks].to(wide)
        if key_value_scales is not None:
            cached = cached * key_value_scales[blocks].to(wide)[..., None]
        keys, values = (
            cached[:, side].transpose(0, 1).reshape(num_kv_heads, -1, head_size)[:, :total] for side in (0, 1)
        )
        group = num_heads // num_kv_heads
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) / (q_scaling * math.sqrt(head_size))
        is_future = torch.arange(total, device=qkv.device)[None] > positions[:, None]
        probabilities = scores.masked_fill(is_future, -math.inf).softmax(-1)
        # [heads, tokens, head_size] -> [tokens, heads * head_size]
        context[tokens] = (probabilities @ values).transpose(0, 1).flatten(1).to(qkv.dtype)
    return context
