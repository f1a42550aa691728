"""Stand-ins for the engine and the tokenizer, so that the runtime is tested on the CPU in milliseconds.

`FakeSession` is a tiny language model in float64 whose logits depend on every token of a sequence. It reads earlier
tokens from a cache of its own, through the blocks of each row, and so finds any mistake in who owns which block.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch

from tensorrt_llm.limits import Limits
from tensorrt_llm.runtime.batch import Batch, Row

VOCAB_SIZE = 61
LIMITS = Limits(max_batch_size=4, max_input_len=32, max_output_len=32, max_num_tokens=16, tokens_per_block=4)


def check_step(batch: Batch, limits: Limits, num_blocks: int) -> None:
    """What every step promises to the session."""
    assert 0 < batch.num_tokens <= limits.max_num_tokens
    assert len(batch.rows) <= limits.max_batch_size
    assert [row.is_context for row in batch.rows] == sorted((row.is_context for row in batch.rows), reverse=True)
    owned = [block for row in batch.rows for block in row.request.blocks]
    assert len(owned) == len(set(owned)), "a block has two owners"
    assert all(0 < block < num_blocks for block in owned), "scratch block 0 or a block that does not exist"
    for row in batch.rows:
        assert row.length > 0
        assert row.start + row.length <= row.request.num_tokens
        assert row.token_ids or row.length == 1, "a pending token comes with others"
        assert row.start + row.length <= len(row.request.blocks) * limits.tokens_per_block


class FakeSession:
    runs_ahead = False

    def __init__(
        self,
        limits: Limits = LIMITS,
        num_blocks: int = 1000,
        next_token: Callable[[list[int]], int] | None = None,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        """`next_token` scripts the model: it names the token that follows a sequence, with logit 1 against 0."""
        self.config = SimpleNamespace(vocab_size=vocab_size, limits=limits, batch_invariant=False)
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        self.num_pending_read = 0  # input tokens that came from the sampled ids
        self.batches: list[Batch] = []
        self._next_token = next_token
        self._last_logits = torch.empty(0, vocab_size)
        self._cache = torch.full((num_blocks, limits.tokens_per_block), -1)
        generator = torch.Generator().manual_seed(0)
        self._embedding = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64)
        self._head = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64)

    def run(self, batch: Batch, sampled_ids: torch.Tensor | None = None) -> torch.Tensor:
        check_step(batch, self.config.limits, self.num_blocks)
        self.batches.append(batch)
        self._last_logits.fill_(torch.nan)  # they were valid until this run
        for row in batch.rows:
            self._write(row, sampled_ids)
        logits = [
            self.logits_after(self._cached(row)[: row.start + row.length - row.num_logits + 1 + index])
            for row in batch.rows
            for index in range(row.num_logits)
        ]
        # Rows of a wider tensor, as a real head has padding beyond the vocabulary.
        self._last_logits = torch.full((len(logits), self.config.vocab_size + 3), torch.inf)
        self._last_logits[:, : self.config.vocab_size] = torch.stack(logits) if logits else 0
        return self._last_logits[:, : self.config.vocab_size]

    def logits_after(self, token_ids: list[int]) -> torch.Tensor:
        if self._next_token:
            logits = torch.zeros(self.config.vocab_size)
            logits[self._next_token(token_ids)] = 1.0
            return logits
        age = torch.arange(len(token_ids), 0, -1, dtype=torch.float64)
        state = (self._embedding[token_ids] * torch.cos(age)[:, None]).sum(0)
        return (self._head @ torch.tanh(state)).float()

    def _write(self, row: Row, sampled_ids: torch.Tensor | None) -> None:
        token_ids = row.token_ids
        if not token_ids:
            assert sampled_ids is not None, "a token is pending that no step has sampled"
            token_ids = [int(sampled_ids[row.request.sampled_row])]
            self.num_pending_read += 1
        for position, token in enumerate(token_ids, start=row.start):
            block, offset = divmod(position, self.config.limits.tokens_per_block)
            self._cache[row.request.blocks[block], offset] = token

    def _cached(self, row: Row) -> list[int]:
        return self._cache[row.request.blocks].flatten().tolist()


class FakeTokenizer:
    """Token i is the bytes `pieces[i]`; ids below `num_special` are special."""

    def __init__(self, pieces: Iterable[bytes], num_special: int = 3) -> None:
        self._pieces = list(pieces)
        self._num_special = num_special
        self.vocab_size = len(self._pieces)
        self.eod_id, self.im_start_id, self.im_end_id = 0, 1, 2
        self.stop_ids = (2, 1, 0)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id < self._num_special else self._pieces[token_id]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
