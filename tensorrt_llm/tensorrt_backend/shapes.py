"""What an engine's inputs and outputs look like in a step, and the two optimization profiles that follow from it.

A prompt, or a piece of one, is a step of its own: one sequence of its exact length, so no token is padding. Decodes run
together, one token in each slot of the cache. So the profiles share no shape but one.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..engine import EngineConfig

# An address must lie at a multiple of 256 bytes, and prompts are given the address of their slot: with a multiple of 64
# places every slot begins at one, whatever the dtype and the head.
_CACHE_STEP = 64
# Logits of all tokens of a prompt, where they are asked for, come so many at a time: 156 MB of them with 152,000 ids.
_LOGITS_AT_ONCE = 256

Shape = tuple[int, ...]
PREFILL, DECODE = 0, 1  # the order in which profiles are added


class Range(NamedTuple):
    """The smallest, the most likely and the largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Shapes:
    """The sizes that a plan is built for."""

    num_slots: int  # sequences that have a cache
    cache_length: int  # places of a slot
    max_prefill_length: int  # tokens of a prompt in one step
    max_logits: int  # rows of logits of such a step

    @classmethod
    def of(cls, config: EngineConfig) -> "Shapes":
        limits = config.limits
        longest = min(limits.max_num_tokens, limits.max_input_len)
        return cls(
            num_slots=limits.max_batch_size,
            cache_length=-(-limits.max_seq_len // _CACHE_STEP) * _CACHE_STEP,
            max_prefill_length=longest,
            max_logits=min(longest, _LOGITS_AT_ONCE),
        )

    @classmethod
    def from_dict(cls, data: Any) -> "Shapes":
        names = set(asdict(cls(1, 1, 1, 1)))
        if not isinstance(data, dict) or set(data) != names or not all(type(x) is int and x > 0 for x in data.values()):
            raise ValueError(f"shapes are {data!r}, expected positive numbers {sorted(names)}")
        return cls(**data)

    def inputs(self, config: EngineConfig, batch_size: int, length: int, num_logits: int) -> dict[str, Shape]:
        """The shape of every input in a step of `batch_size` sequences with `length` new tokens each."""
        cache = (batch_size, config.num_kv_heads_per_rank, self.cache_length, config.head_size)
        shapes: dict[str, Shape] = {
            "input_ids": (batch_size, length),
            "position_ids": (batch_size, length),
            "last_token_ids": (num_logits,),
            "kv_write_indices": (batch_size,),
        }
        if config.use_dynamic_ntk and config.seq_length < self.cache_length:
            shapes["context_lengths"] = (batch_size,)
        for name in cache_names(config):
            shapes[f"past_{name}"] = cache
        return shapes

    def profiles(self, config: EngineConfig) -> list[dict[str, Range]]:
        """By PREFILL and DECODE, the range of every input."""
        steps = (
            ((1, 1, 1), (1, self.max_prefill_length, 1), (1, self.max_prefill_length, self.max_logits)),
            ((1, 1, 1), *((self.num_slots, 1, self.num_slots),) * 2),
        )
        return [
            {name: Range(*ranges) for name, ranges in _zipped([self.inputs(config, *step) for step in profile])}
            for profile in steps
        ]


def cache_names(config: EngineConfig) -> list[str]:
    """Without `past_` and `present_`, which are two names of one place."""
    return [f"{side}_{layer}" for layer in range(config.num_layers) for side in ("key", "value")]


def _zipped(shapes: list[dict[str, Shape]]) -> list[tuple[str, list[Shape]]]:
    return [(name, [each[name] for each in shapes]) for name in shapes[0]]
