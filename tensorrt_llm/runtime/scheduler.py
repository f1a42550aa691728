"""Which sequences a step computes, and how much of each.

Sequences run in the order of their arrival. A step holds the next token of every running sequence, the longest first,
and as many prompt tokens as the budget allows, or, while others cannot enter yet, as fill whole tiles of tokens; a long
prompt is cut into chunks over several steps. A sequence enters when there is a place in the batch and there are blocks
for all its tokens, and takes further blocks as it grows. When none is left, the youngest running sequence gives all of
its blocks back and waits in front of the queue; later it is computed again from its prompt and its output, so it loses
time but no token. Where nothing may be preempted, a sequence enters only when there are blocks for all that it may
become. A step may be chosen while tokens of the one before it are pending; if they could change the choice for good, it
has to wait for them. Knows no tensors, no text, and not why a sequence ends.
"""

from collections import deque
from itertools import islice

from ..limits import Limits
from .batch import Batch, Row
from .kv_cache import BlockAllocator
from .request import FinishReason, Request, State
from .step_sizes import prompt_tokens_in_whole_tiles

# Prompts wait to fill a tile while no more than one place in this many is theirs, and for no more steps than this.
_DECODES_FOR_A_PLACE, _MOST_STEPS_HELD = 64, 16


class Scheduler:
    def __init__(self, limits: Limits, allocator: BlockAllocator, *, preempts: bool = True) -> None:
        self.limits = limits
        self.allocator = allocator
        self.preempts = preempts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by arrival, the youngest last
        self._steps_held = 0  # in which prompts waited to fill a tile

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def check_fits(self, request: Request) -> None:
        """Raise a ValueError if the whole cache could not hold the request."""
        needed = self._blocks_at_most(request)
        if needed > self.allocator.capacity:
            raise ValueError(
                f"a prompt of {request.context_length} tokens with max_new_tokens {request.sampling.max_new_tokens} "
                f"needs {needed} KV blocks of {self.limits.tokens_per_block} tokens, but the cache has "
                f"{self.allocator.capacity}; give the session more KV cache or ask for fewer tokens"
            )

    def submit(self, request: Request) -> None:
        """Put a request that fits at the end of the queue."""
        self.check_fits(request)
        request.max_blocks = self._blocks_at_most(request)
        self.waiting.append(request)

    def next_batch(self) -> Batch | None:
        """Choose the rows of the next step. No rows: there is nothing to compute. None: read what is pending first."""
        if not self._grow_running():
            return None
        contexts: list[Row] = []
        decodes: list[Row] = []
        unfinished: list[Request] = []
        for request in self.running:
            start, end = request.num_cached, request.num_tokens
            if request.has_sampled_all:
                continue  # its last token is pending
            if end - start > 1:
                unfinished.append(request)
            else:
                rows = contexts if start < request.context_length else decodes
                rows.append(Row(request, start, 1, 1))
        num_rows = len(contexts) + len(decodes) + len(unfinished)
        newcomers = self._admissible(self.limits.max_batch_size - num_rows)
        budget = self._prompt_budget(len(contexts), len(decodes), unfinished, newcomers)
        for request in unfinished:
            budget -= _add_chunk(contexts, request, budget)
        for request in newcomers:
            if budget > 0:
                self._admit(request)
                budget -= _add_chunk(contexts, request, budget)
        # Attention of the longest begins first, so that the last programs of a GPU to run are short ones.
        decodes.sort(key=lambda row: -row.start)
        return Batch(tuple(contexts + decodes))

    def launch(self, batch: Batch) -> None:
        """Record that the device was given `batch`: a token of each receiver is pending now."""
        for index, request in enumerate(batch.receivers):
            request.num_pending += 1
            request.sampled_row = index
        for request, start, length, _ in batch.rows:
            request.num_cached = start + length

    def accept(self, batch: Batch, tokens: list[int]) -> list[Request]:
        """Record the tokens that the launched `batch` gave; return who got one, in order: not who ended meanwhile."""
        receivers = []
        for request, token in zip(batch.receivers, tokens, strict=True):
            if request.state is State.RUNNING:
                request.num_pending -= 1
                request.token_ids.append(token)
                receivers.append(request)
        return receivers

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a running request; its blocks are free at once.

        A launched step may still write to them. Whoever gets them writes and reads in a later step, and the device
        computes one step after the other.
        """
        self.running.remove(request)
        self._release_blocks(request)
        request.num_pending = 0
        request.state, request.finish_reason = State.FINISHED, reason

    def cancel(self, request: Request) -> None:
        """End a request wherever it is. Nothing happens to a finished one."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
            request.state, request.finish_reason = State.FINISHED, FinishReason.CANCELLED
        elif request.state is State.RUNNING:
            self.finish(request, FinishReason.CANCELLED)

    def _grow_running(self) -> bool:
        """Give every running sequence the block that its newest token needs, the oldest first.

        False: a pending token must be read first, as it is needed to choose the next one, or as it may end a sequence
        whose blocks save another from being preempted.
        """
        position = 0
        while position < len(self.running):
            request = self.running[position]
            if request.num_pending and request.sampling.needs_newest_token:
                return False
            if request.num_tokens > len(request.blocks) * self.limits.tokens_per_block and not request.has_sampled_all:
                if not self.allocator.num_free:
                    if any(running.num_pending for running in self.running):
                        return False
                    self._preempt_youngest()
                    continue
                request.blocks += self.allocator.allocate(1)
            position += 1
        return True

    def _preempt_youngest(self) -> None:
        # Whoever is here fits alone, so someone else holds blocks.
        assert len(self.running) > 1, "one sequence needs more blocks than there are"
        request = self.running.pop()
        assert not request.num_pending, "a sequence whose newest token nobody has read would lose it"
        self._release_blocks(request)
        request.num_cached = 0
        if request.collects_context_logits:
            request.context_logits.clear()
        request.state = State.WAITING
        self.waiting.appendleft(request)

    def _admissible(self, places: int) -> list[Request]:
        """Who may run next: the first in the queue, as far as there are places and blocks. Nobody is overtaken."""
        if not self.waiting or places <= 0:
            return []  # most steps: what the running ones will ask for need not be summed
        growth = sum(self._reserve(running, len(running.blocks)) for running in self.running)
        free, found = self.allocator.num_free, list[Request]()
        for request in islice(self.waiting, places):
            needed = self._blocks_for(len(request.token_ids))
            free -= needed
            growth += self._reserve(request, needed)
            # Where sequences may be preempted, one block for every second that will grow, or a newcomer would soon be:
            # until all of these are taken half a block's steps go by on average, in which others end.
            if free < ((growth + 1) // 2 if self.preempts else growth):
                break
            found.append(request)
        return found

    def _reserve(self, request: Request, num_blocks: int) -> int:
        """Blocks that a sequence with so many will still ask for: soon, or, where nothing is preempted, ever."""
        growth = request.max_blocks - num_blocks
        return min(growth, 1) if self.preempts else growth

    def _prompt_budget(
        self, num_contexts: int, num_decodes: int, unfinished: list[Request], newcomers: list[Request]
    ) -> int:
        """Prompt tokens of the next step beside its rows of one token.

        Where more requests wait than may run, prompts come in whole tiles (step_sizes.py), and if they do not fill one,
        they wait for others: a few steps, and as long as this keeps few places from decoding.
        """
        budget = self.limits.max_num_tokens - num_contexts - num_decodes
        prompts = unfinished + newcomers
        if not prompts or len(newcomers) == len(self.waiting):
            return budget
        num_tokens = sum(request.num_tokens - request.num_cached for request in prompts)
        in_whole_tiles = prompt_tokens_in_whole_tiles(num_contexts + min(num_tokens, budget), num_decodes)
        if in_whole_tiles > num_contexts:
            self._steps_held = 0
            return in_whole_tiles - num_contexts
        could_fill = prompt_tokens_in_whole_tiles(num_contexts + budget, num_decodes) > num_contexts
        few = len(prompts) * _DECODES_FOR_A_PLACE <= num_decodes
        if could_fill and few and self._steps_held < _MOST_STEPS_HELD:
            self._steps_held += 1
            return 0
        self._steps_held = 0
        return budget

    def _admit(self, request: Request) -> None:
        """Let the first waiting request run."""
        assert request is self.waiting[0]
        self.waiting.popleft()
        request.blocks = self.allocator.allocate(self._blocks_for(len(request.token_ids)))
        request.state = State.RUNNING
        self.running.append(request)

    def _release_blocks(self, request: Request) -> None:
        self.allocator.free(request.blocks)
        request.blocks = []

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.tokens_per_block)

    def _blocks_at_most(self, request: Request) -> int:
        # The last new token is never an input, so it is not cached.
        return self._blocks_for(request.context_length + request.sampling.max_new_tokens - 1)


def _add_chunk(contexts: list[Row], request: Request, budget: int) -> int:
    """Add as much of an unfinished sequence as the budget allows; return the tokens added."""
    start = request.num_cached
    length = min(len(request.token_ids) - start, budget)
    if length > 0:
        num_logits = int(start + length == len(request.token_ids))
        contexts.append(Row(request, start, length, length if request.collects_context_logits else num_logits))
    return length
