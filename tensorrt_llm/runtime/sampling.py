"""From logits to next tokens, on the device, for all sequences of a step at once.

    logits -> penalties -> bans -> the largest, for greedy sequences
                                -> temperature -> top-k -> top-p -> inverse CDF, for the others

A sequence draws one number per token from a generator of its own, and its candidates are ordered by logit, then by id.
So its text depends on its logits and its seed, but not on its batch, nor on the device. Sampling never waits for the
device: tokens come to the host in one copy, and are waited for when they are asked for. Does not decide when a sequence
ends, and changes nothing in a request but its generator's state.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from ..kernels import BROKEN, greedy_tokens_for
from .request import Request
from .transfers import Download, upload


class Sampled:
    """The tokens of one step. The device may still be at work on them."""

    def __init__(self, ids: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> None:
        """`tokens` are int32 [requests], BROKEN where there is none."""
        self.ids = ids  # the same, of the vocabulary even where a row is broken: the next step may read them
        self._has_log_probs = log_probs is not None
        # Float64 holds ids exactly, so both come in one copy.
        self._download = Download(tokens if log_probs is None else torch.stack((tokens.double(), log_probs.double())))

    @property
    def tokens(self) -> list[int]:
        """Waits for the step. BROKEN for a request that has no next token."""
        return self._numbers[0]

    @property
    def log_probs(self) -> list[float] | None:
        """Of the tokens, in the model's own distribution; None if no request wants them. Waits for the step."""
        return self._numbers[1]

    @cached_property
    def _numbers(self) -> tuple[list[int], list[float] | None]:
        numbers = self._download.wait()
        if not self._has_log_probs:
            return numbers, None
        tokens, log_probs = numbers
        return [int(token) for token in tokens], log_probs


class Sampler:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._history = _TokenHistory(device)
        self._greedy_tokens = greedy_tokens_for(device)

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], sampled_ids: torch.Tensor | None = None
    ) -> Sampled:
        """The next token of each request from its row of float32 logits [requests, vocab], which stay as they are.

        `sampled_ids` are those of the last step, if one of its tokens is pending.
        """
        is_plain = all(request.sampling.is_plain for request in requests)
        edited = logits if is_plain else self._ban(self._penalize(logits, requests, sampled_ids), requests)
        ids, tokens = self._greedy_tokens(edited)
        log_probs = None
        if not is_plain:
            ids = self._draw(edited, ids, requests)
            tokens = torch.where(tokens == BROKEN, BROKEN, ids)
            if any(request.sampling.gather_log_probs for request in requests):
                log_probs = logits.gather(1, ids[:, None].long())[:, 0] - logits.logsumexp(dim=-1)
        return Sampled(ids, tokens, log_probs)

    def _penalize(
        self, logits: torch.Tensor, requests: Sequence[Request], sampled_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Make tokens less likely that a sequence holds already: repetition, then frequency and presence penalty."""
        rows = [row for row, request in enumerate(requests) if request.sampling.has_penalties]
        if not rows:
            return logits
        penalized = [requests[row] for row in rows]
        settings = [
            (request.sampling.repetition_penalty, request.sampling.frequency_penalty, request.sampling.presence_penalty)
            for request in penalized
        ]
        repetition, frequency, presence = self._columns(settings, torch.float32)
        index = upload(rows, torch.int64, self._device)
        part = logits.index_select(0, index)
        # A token stands in `ids` as often as in its sequence. All its places hold the same new logit, so the order
        # in which scatter writes them does not matter; nor does it when counts, small whole numbers, are summed.
        ids, is_output = self._history.gather(penalized, sampled_ids)  # [rows, longest sequence]
        seen = part.gather(1, ids)
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        if any(request.sampling.has_output_penalties for request in penalized):
            counts = torch.zeros_like(part).scatter_add_(1, ids, is_output.float()).gather(1, ids)
            seen = seen - frequency * counts - presence * (counts > 0)
        return logits.index_copy(0, index, part.scatter_(1, ids, seen))

    def _ban(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """Make impossible what may not come next: bad words, and ends before min_length."""
        banned = [
            (row, token_id)
            for row, request in enumerate(requests)
            if request.sampling.has_bans
            for token_id in request.banned_ids()
        ]
        if not banned:
            return logits
        rows, ids = upload(banned, torch.int64, self._device).unbind(dim=1)
        return logits.index_put((rows, ids), logits.new_full((), -torch.inf))

    def _draw(self, logits: torch.Tensor, greedy_ids: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """int32 `greedy_ids`, with a drawn token for each request that is not greedy."""
        rows = [row for row, request in enumerate(requests) if not request.sampling.is_greedy]
        if not rows:
            return greedy_ids
        vocab_size = logits.shape[1]
        drawing = [requests[row] for row in rows]
        top_ks = [min(request.sampling.top_k or vocab_size, vocab_size) for request in drawing]
        settings = [
            (request.sampling.temperature, top_k, request.sampling.top_p or 1.0, request.random.random())
            for request, top_k in zip(drawing, top_ks, strict=True)
        ]
        temperature, top_k, top_p, uniform = self._columns(settings, torch.float64)
        index = upload(rows, torch.int64, self._device)
        candidates, ids = _rank(logits.index_select(0, index), max(top_ks))  # [rows, candidates]
        # Float64, so that sums over 150,000 probabilities are the same for any number of rows and on any device.
        scaled = (candidates.double() - candidates[:, :1].double()) / temperature
        scaled.masked_fill_(torch.arange(max(top_ks), device=self._device) >= top_k, -torch.inf)
        probs = scaled.softmax(dim=-1)
        mass = probs.cumsum(dim=-1)
        # Top-p keeps a candidate if those before it do not reach top_p, hence always the first one. A GPU adds in
        # parallel, so `mass` may fall by a rounding: that must neither keep nor choose what has no probability.
        last_kept = (((mass - probs < top_p) & (probs > 0)).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
        target = uniform * mass.gather(1, last_kept)
        position = torch.minimum((mass <= target).sum(dim=-1, keepdim=True), last_kept)
        return greedy_ids.index_copy(0, index, ids.gather(1, position)[:, 0].int())

    def _columns(self, rows: Sequence[tuple[float, ...]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Host numbers, a tuple per row, as one [rows, 1] tensor per column."""
        return upload(rows, dtype, self._device).unsqueeze(-1).unbind(dim=1)


def _rank(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row and their ids, in order. Of equal logits the lower id comes first."""
    vocab_size = logits.shape[1]
    if count == vocab_size:
        return logits.sort(dim=-1, descending=True, stable=True)
    # topk() leaves the order of equal logits open, so it gets keys that are never equal. The upper half of a key is the
    # float as an integer of the same order (a negative float's bits count backwards), the lower half takes the id away.
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) - torch.arange(vocab_size, device=logits.device)
    ids = (-keys.topk(count, dim=-1).values) & 0xFFFFFFFF
    return logits.gather(1, ids), ids


def no_next_token(broken: Sequence[Request], num_requests: int) -> ValueError:
    """What to raise when the tokens of these requests, of as many in their step, are BROKEN."""
    return ValueError(
        f"no next token for request {broken[0].id} ({len(broken)} of {num_requests} in this step): its largest logit "
        f"is not a finite number: the model overflows at this precision, its weights are broken, or every token is "
        f"banned"
    )


class _TokenHistory:
    """The tokens of penalised sequences on the device, a table row for each, so that a step adds only new ones."""

    def __init__(self, device: torch.device) -> None:
        self._table = torch.zeros((0, 0), dtype=torch.int64, device=device)
        self._slots: dict[int, int] = {}  # request id -> row of the table
        self._lengths: list[int] = []  # tokens in each row

    def gather(self, requests: list[Request], sampled_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [requests, longest], and which of them are output. Places past an end repeat the first prompt token."""
        self._assign_slots(requests)
        self._add_new_tokens(requests, sampled_ids)
        spans = [(self._slots[request.id], request.context_length, request.num_tokens) for request in requests]
        slots, starts, ends = upload(spans, torch.int64, self._table.device).unbind(dim=1)
        longest = max(length for _, _, length in spans)
        ids = self._table[:, :longest].index_select(0, slots)
        position = torch.arange(longest, device=ids.device)
        is_within = position < ends[:, None]
        return torch.where(is_within, ids, ids[:, :1]), is_within & (position >= starts[:, None])

    def _assign_slots(self, requests: list[Request]) -> None:
        num_slots, capacity = self._table.shape
        longest = max(request.num_tokens for request in requests)
        if len(requests) > num_slots or longest > capacity:
            # Powers of two, so that it rarely grows.
            num_slots = 1 << (max(num_slots, len(requests)) - 1).bit_length()
            capacity = 1 << (max(capacity, longest) - 1).bit_length()
            self._table = self._table.new_zeros((num_slots, capacity))
            self._slots = {}
            self._lengths = [0] * num_slots
        newcomers = [request.id for request in requests if request.id not in self._slots]
        if len(self._slots) + len(newcomers) > num_slots:
            # Who is not in this step is finished; or it was preempted, and is uploaded again when it returns.
            present = {request.id for request in requests}
            self._slots = {request_id: slot for request_id, slot in self._slots.items() if request_id in present}
        if newcomers:
            free_slots = set(range(num_slots)) - set(self._slots.values())
            for request_id in newcomers:
                slot = free_slots.pop()
                self._slots[request_id], self._lengths[slot] = slot, 0

    def _add_new_tokens(self, requests: list[Request], sampled_ids: torch.Tensor | None) -> None:
        capacity = self._table.shape[1]
        read: list[tuple[int, int]] = []  # places in the table, token ids
        pending: list[tuple[int, int]] = []  # places in the table, rows of sampled_ids
        for request in requests:
            slot, num_read = self._slots[request.id], len(request.token_ids)
            first = slot * capacity
            known = self._lengths[slot]
            read.extend(zip(range(first + known, first + num_read), request.token_ids[known:], strict=True))
            if request.num_pending:
                pending.append((first + num_read, request.sampled_row))
            self._lengths[slot] = request.num_tokens
        device = self._table.device
        if read:
            places, ids = upload(read, torch.int64, device).unbind(dim=1)
            self._table.view(-1)[places] = ids
        if pending:
            assert sampled_ids is not None, "a token is pending that no step has sampled"
            places, rows = upload(pending, torch.int64, device).unbind(dim=1)
            self._table.view(-1)[places] = sampled_ids[rows].long()
