"""Sequences that go through a paged gpt_attention in two steps, and the same attention written plainly in float64.

A sequence is (cached, new, prompt): tokens of the first step, tokens of the second, and the prompt length, which fixes
its NTK alpha. Blocks are owned in random order, block 0 by none, and every slot that no token was written to is NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tensorrt_llm.kernels import StepShape

Sequence3 = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    """The attributes of the op."""

    num_heads: int = 2
    num_kv_heads: int = 2
    head_size: int = 8
    q_scaling: float = 1.0
    rotary_base: float = 10000.0
    rotary_dim: int = 8
    ntk_length: int = 0
    logn_length: int = 0

    @property
    def columns(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size


@dataclass
class PagedSteps:
    """Random qkv of unit size for all tokens, rounded to `dtype`. Contexts come first in `sequences`."""

    sequences: Sequence[Sequence3]
    setting: Setting
    dtype: torch.dtype = torch.float64
    tokens_per_block: int = 4
    qkv: list[torch.Tensor] = field(init=False)  # per sequence [cached + new, columns]

    def __post_init__(self) -> None:
        self.qkv = [
            torch.randn(cached + new, self.setting.columns, dtype=torch.float64).to(self.dtype)
            for cached, new, _ in self.sequences
        ]

    def run(self, attention: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The second step's output, computed in `dtype` (default: that of the inputs)."""
        dtype = dtype or self.dtype
        owned = [-(-(cached + new) // self.tokens_per_block) for cached, new, _ in self.sequences]
        ids = (torch.randperm(sum(owned)) + 1).split(owned)
        tables = torch.zeros(len(owned), max(owned), dtype=torch.int32)
        for row, blocks in zip(tables, ids, strict=True):
            row[: len(blocks)] = blocks
        shape = (sum(owned) + 1, 2, self.setting.num_kv_heads, self.tokens_per_block, self.setting.head_size)
        pool = torch.full(shape, math.nan, dtype=dtype)
        first = [index for index, (cached, _, _) in enumerate(self.sequences) if cached]
        if first:
            self._step(attention, pool, tables, [(index, 0, self.sequences[index][0]) for index in first], dtype)
        second = [(index, cached, cached + new) for index, (cached, new, _) in enumerate(self.sequences)]
        return self._step(attention, pool, tables, second, dtype)

    def _step(
        self,
        attention: Callable[..., torch.Tensor],
        pool: torch.Tensor,
        tables: torch.Tensor,
        rows: list[tuple[int, int, int]],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """One step of rows (sequence, first token, token after the last)."""
        lengths = [end - start for _, start, end in rows]
        contexts = [end - start for index, start, end in rows if end - start > 1 or start < self.sequences[index][2]]
        return attention(
            torch.cat([self.qkv[index][start:end] for index, start, end in rows]).to(dtype),
            pool,
            _ints([position for _, start, end in rows for position in range(start, end)]),
            _ints([sum(lengths[:count]) for count in range(len(rows) + 1)]),
            _ints([end for _, _, end in rows]),
            _ints([self.sequences[index][2] for index, _, _ in rows]),
            tables[[index for index, _, _ in rows]],
            step=StepShape(
                sum(lengths), len(rows), len(contexts), sum(contexts), max(lengths), max(end for _, _, end in rows)
            ),
            **vars(self.setting),
        )

    def plain(self) -> torch.Tensor:
        """The second step's output from the definition, in float64: no cache, no pages, a loop over tokens."""
        rows = []
        for (cached, _, prompt), qkv in zip(self.sequences, self.qkv, strict=True):
            rows.append(plain_attention(qkv.double().numpy(), prompt, self.setting)[cached:])
        return torch.from_numpy(np.concatenate(rows))


def plain_attention(qkv: np.ndarray, prompt: int, setting: Setting) -> np.ndarray:
    """qkv [tokens, columns] of one sequence -> [tokens, heads * head_size], by Qwen-1's definition."""
    heads, kv_heads, size = setting.num_heads, setting.num_kv_heads, setting.head_size
    base, dim = setting.rotary_base, setting.rotary_dim
    if setting.ntk_length:
        alpha = max(2 ** math.ceil(math.log2(prompt / setting.ntk_length) + 1) - 1, 1)
        base *= alpha ** (dim / (dim - 2))

    def turned(vector: np.ndarray, position: int) -> np.ndarray:
        """Dims j and j + dim / 2 as one complex number, times e^(i angle)."""
        angles = position * base ** (-2 * np.arange(dim // 2) / dim)
        pairs = (vector[: dim // 2] + 1j * vector[dim // 2 : dim]) * np.exp(1j * angles)
        return np.concatenate((pairs.real, pairs.imag, vector[dim:]))

    tokens = qkv.reshape(len(qkv), heads + 2 * kv_heads, size)
    result = np.empty((len(qkv), heads, size))
    for position in range(len(qkv)):
        for head in range(heads):
            kv_head = head * kv_heads // heads
            query = turned(tokens[position, head], position)
            if setting.logn_length and position + 1 > setting.logn_length:
                query = query * math.log(position + 1) / math.log(setting.logn_length)
            keys = np.array([turned(tokens[past, heads + kv_head], past) for past in range(position + 1)])
            scores = keys @ query / (setting.q_scaling * math.sqrt(size))
            weights = np.exp(scores - scores.max())
            values = tokens[: position + 1, heads + kv_heads + kv_head]
            result[position, head] = weights @ values / weights.sum()
    return result.reshape(len(qkv), heads * size)


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
