"""From logits to next tokens, on the device, for all sequences of a step at once.

    logits -> penalties -> bans -> the largest, for greedy sequences
                                -> temperature -> top-k -> top-p -> inverse CDF, for the others

A sequence draws one number per token from a generator of its own, and its candidates are ordered by logit, then by id.
So its text depends on its logits and its seed, but not on its batch, nor on the device. What the host needs of a step
comes in one copy. Does not decide when a sequence ends, and changes nothing in a request but its generator's state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .request import Request

# Stands for the token of a row whose largest logit is not a finite number.
_BROKEN = -1


class Sampled(NamedTuple):
    tokens: list[int]
    log_probs: list[float] | None  # of these tokens in the model's own distribution; None if no request wants them


class Sampler:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._history = _TokenHistory(device)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> Sampled:
        """The next token of each request from its row of float32 logits [requests, vocab], which stay as they are."""
        if not requests:
            return Sampled([], None)
        is_plain = all(request.sampling.is_plain for request in requests)
        edited = logits if is_plain else self._ban(self._penalize(logits, requests), requests)
        largest, ids = edited.max(dim=-1)
        if not is_plain:
            ids = self._draw(edited, ids, requests)
        ids = torch.where(largest.isfinite(), ids, _BROKEN)
        if is_plain or not any(request.sampling.gather_log_probs for request in requests):
            sampled = Sampled(ids.tolist(), None)
        else:
            sampled = _with_log_probs(ids, logits)
        _check_finite(sampled.tokens, requests)
        return sampled

    def _penalize(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
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
        index = _upload(rows, torch.int64, self._device)
        part = logits.index_select(0, index)
        # A token stands in `ids` as often as in its sequence. All its places hold the same new logit, so the order
        # in which scatter writes them does not matter; nor does it when counts, small whole numbers, are summed.
        ids, is_output = self._history.gather(penalized)  # [rows, longest sequence]
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
        rows, ids = _upload(banned, torch.int64, self._device).unbind(dim=1)
        return logits.index_put((rows, ids), logits.new_full((), -torch.inf))

    def _draw(self, logits: torch.Tensor, greedy_ids: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """`greedy_ids`, with a drawn token for each request that is not greedy."""
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
        index = _upload(rows, torch.int64, self._device)
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
        return greedy_ids.index_copy(0, index, ids.gather(1, position)[:, 0])

    def _columns(self, rows: Sequence[tuple[float, ...]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Host numbers, a tuple per row, as one [rows, 1] tensor per column."""
        return _upload(rows, dtype, self._device).unsqueeze(-1).unbind(dim=1)


def _upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers on the device, without waiting for it: it is busy with the step, and sampling queues up behind."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


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


def _with_log_probs(ids: torch.Tensor, logits: torch.Tensor) -> Sampled:
    chosen = logits.gather(1, ids.clamp(min=0)[:, None])[:, 0]
    log_probs = chosen - logits.logsumexp(dim=-1)
    # Float64 holds ids exactly, so both come in one copy.
    tokens, values = torch.stack((ids.double(), log_probs.double())).tolist()
    return Sampled([int(token) for token in tokens], values)


def _check_finite(tokens: list[int], requests: Sequence[Request]) -> None:
    if _BROKEN in tokens:
        broken = [request.id for request, token in zip(requests, tokens, strict=True) if token == _BROKEN]
        raise ValueError(
            f"no next token for request {broken[0]} ({len(broken)} of {len(requests)} in this step): its largest logit "
            f"is not a finite number: the model overflows at this precision, its weights are broken, or every token is "
            f"banned"
        )


class _TokenHistory:
    """The tokens of penalised sequences on the device, a table row for each, so that a step uploads only new ones."""

    def __init__(self, device: torch.device) -> None:
        self._table = torch.zeros((0, 0), dtype=torch.int64, device=device)
        self._slots: dict[int, int] = {}  # request id -> row of the table
        self._lengths: list[int] = []  # tokens in each row

    def gather(self, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [requests, longest], and which of them are output. Places past an end repeat the first prompt token."""
        self._assign_slots(requests)
        self._upload_new_tokens(requests)
        spans = [(self._slots[request.id], request.context_length, len(request.token_ids)) for request in requests]
        slots, starts, ends = _upload(spans, torch.int64, self._table.device).unbind(dim=1)
        longest = max(length for _, _, length in spans)
        ids = self._table[:, :longest].index_select(0, slots)
        position = torch.arange(longest, device=ids.device)
        is_within = position < ends[:, None]
        return torch.where(is_within, ids, ids[:, :1]), is_within & (position >= starts[:, None])

    def _assign_slots(self, requests: list[Request]) -> None:
        num_slots, capacity = self._table.shape
        longest = max(len(request.token_ids) for request in requests)
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

    def _upload_new_tokens(self, requests: list[Request]) -> None:
        capacity = self._table.shape[1]
        places: list[int] = []
        tokens: list[int] = []
        for request in requests:
            slot, length = self._slots[request.id], len(request.token_ids)
            known = self._lengths[slot]
            places.extend(range(slot * capacity + known, slot * capacity + length))
            tokens.extend(request.token_ids[known:])
            self._lengths[slot] = length
        where, what = _upload((places, tokens), torch.int64, self._table.device).unbind()
        self._table.view(-1)[where] = what
