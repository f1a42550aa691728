"""gpt_attention on the GPU: RoPE and KV write, then one kernel for the contexts and one for the decodes of a step.

Contexts come first among the sequences and among the tokens, so both kernels write their own rows of one output. Where
every query head has its own keys and values, the kernel of the decodes does all of it for them. The kernels do not know
each other; the formulas stand in rope_kv.py, prefill_attention.py, decode_one_head.py and decode_grouped_heads.py.
"""

import torch

from ..step import StepShape
from .decode_grouped_heads import decode_grouped_heads
from .decode_one_head import decode_one_head
from .kv_pool import check_scales
from .prefill_attention import prefill_attention
from .rope_kv import RopeRules, rope_kv
from .splits import Arrivals


class GptAttention:
    """The op of a session: its steps come one after the other."""

    def __init__(self, *, is_batch_invariant: bool) -> None:
        self._is_batch_invariant = is_batch_invariant
        self._arrivals = Arrivals()
        self._turns: dict[tuple[RopeRules, torch.device], torch.Tensor] = {}

    def __call__(
        self,
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
        """Attention of the step's tokens over all cached ones, [tokens, heads * head_size]; the pool gains K and V."""
        check_scales(past_key_value, key_value_scales)
        is_grouped = num_heads != num_kv_heads
        rules = RopeRules(rotary_base, rotary_dim, ntk_length, logn_length)
        turns = self._turns.get((rules, qkv.device))
        if turns is None:
            turns = self._turns[rules, qkv.device] = rules.turns(qkv.device)
        q = rope_kv(
            qkv if is_grouped else qkv[: step.num_context_tokens], past_key_value, position_ids, query_starts,
            context_lengths, block_tables, key_value_scales, step=step, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_size=head_size, rules=rules, turns=turns,
        )  # fmt: skip
        out = torch.empty((len(qkv), num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
        if step.num_contexts:
            prefill_attention(
                q, past_key_value, query_starts, sequence_length, block_tables, key_value_scales, out, step=step,
                q_scaling=q_scaling,
            )  # fmt: skip
        if step.batch_size == step.num_contexts:
            return out.flatten(1)
        if is_grouped:
            decode_grouped_heads(
                q, past_key_value, sequence_length, block_tables, key_value_scales, out, step=step, q_scaling=q_scaling
            )  # fmt: skip
        else:
            decode_one_head(
                qkv, past_key_value, position_ids, context_lengths, sequence_length, block_tables, key_value_scales,
                out, step=step, q_scaling=q_scaling, rules=rules, turns=turns, arrivals=self._arrivals,
                is_batch_invariant=self._is_batch_invariant,
            )  # fmt: skip
        return out.flatten(1)
