"""What an engine promises to serve: batch, lengths, tokens per step. Plain numbers, readable without torch."""

from dataclasses import dataclass, fields

# Lengths are int32 on the device; a larger limit would be accepted here and break there.
LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """All counts: sequences, tokens, tokens, tokens, tokens."""

    max_batch_size: int  # sequences that run at the same time
    max_input_len: int  # tokens of one prompt
    max_output_len: int  # new tokens of one sequence
    max_num_tokens: int  # tokens of all sequences in one step
    tokens_per_block: int  # granularity of the paged KV cache

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{field.name} is {value!r}, expected an integer from 1 to {LARGEST_COUNT}")
        if self.max_seq_len > LARGEST_COUNT:
            raise ValueError(f"max_input_len + max_output_len is {self.max_seq_len}, expected at most {LARGEST_COUNT}")
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise ValueError(f"tokens_per_block is {self.tokens_per_block}, expected a power of two")
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens is {self.max_num_tokens} but a step of max_batch_size={self.max_batch_size} sequences "
                f"needs one token each; raise max_num_tokens or lower max_batch_size"
            )

    @property
    def max_seq_len(self) -> int:
        """Tokens of one sequence, prompt and output together."""
        return self.max_input_len + self.max_output_len

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_seq_len // self.tokens_per_block)
