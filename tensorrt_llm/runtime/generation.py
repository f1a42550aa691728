"""The serving loop: prompts in, tokens and text out, any number of sequences at a time.

`GenerationSession.step` is the loop; everything else here feeds it or shows its results: `submit` and `cancel` for
servers, `decode` with the meaning of TensorRT-LLM 0.7.1, `stream` and `stream_text` for what a person reads. Knows
neither models nor kernels nor how a step is computed. Not thread-safe: one thread calls it.

If the session runs ahead, the tokens of a step are read once the next step is launched, so the device never waits for
the host:

    host      launch 1 | launch 2 | read 1 | launch 3 | read 2 | ...
    device         | step 1 ........ | step 2 ........ | step 3 ...

Who turns out to have ended in step 1 is computed once more in step 2, for nothing: that token is thrown away. Tokens,
texts and reasons are those of a loop that reads each step before the next.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, count
from typing import Any, NamedTuple

import torch

from ..tokenizer import StopStringMatcher, TextStream, Tokenizer
from .batch import Batch
from .decode_tensors import DecodeOutput, Prompt, read_prompt, split_prompts
from .kv_cache import BlockAllocator
from .request import FinishReason, Request, Sampling, SamplingConfig, check_prompt
from .sampling import BROKEN, Sampled, Sampler, no_next_token
from .scheduler import Scheduler
from .session import Session
from .tensorrt_session import TensorRtSession
from .transfers import upload


class NewToken(NamedTuple):
    """What one sequence gained in one step."""

    prompt_index: int
    token_id: int
    text: str  # whole characters that are now certain: "" while one is incomplete or a stop string may have begun
    finish_reason: FinishReason | None


class _KeptLogits(NamedTuple):
    """Copies of what a request wants to have of a step."""

    request: Request
    context: torch.Tensor | None  # [chunk, vocab]
    generation: torch.Tensor | None  # [vocab]


class _Launched(NamedTuple):
    """A step whose tokens are not read yet."""

    batch: Batch
    sampled: Sampled
    logits: list[_KeptLogits]


class _Setup(NamedTuple):
    batch_size: int
    max_context_length: int
    max_new_tokens: int


class GenerationSession:
    def __init__(self, session: Session | TensorRtSession, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is needed for text only: stop strings, `stream_text`, and "texts" of decode."""
        self.session = session
        self.tokenizer = tokenizer
        self.config = session.config
        self.limits = session.config.limits
        self._allocator = BlockAllocator(session.num_blocks)
        # A preempted sequence is computed anew as a prompt, whose bits are not those of decodes.
        self._scheduler = Scheduler(self.limits, self._allocator, preempts=not session.config.batch_invariant)
        self._sampler = Sampler(session.device)
        self._launched: deque[_Launched] = deque()  # between two calls of `step` at most one
        self._ids = count()
        self._texts: dict[int, _OutputText] = {}  # request id -> the text that is followed
        self._setup: _Setup | None = None

    # The loop

    def submit(self, prompt_ids: Prompt, sampling: SamplingConfig, *, with_text: bool = False) -> Request:
        """Queue a prompt. `with_text` keeps `request.text` up to date; stop strings do so anyway."""
        if with_text and self.tokenizer is None:
            raise ValueError("with_text needs a tokenizer, but there is none; give one")
        request = self._make_request(prompt_ids, sampling.for_sequence(0, 1), "the prompt")
        self._enqueue(request, with_text)
        return request

    def step(self) -> list[Request]:
        """Launch one step and read one; return the requests that got a token. Finished ones hold no blocks any more.

        A request gets at most one token. A request without a next token (its logits are broken) is cancelled, and named
        by a ValueError; the others keep the tokens of its step.
        """
        receivers: list[Request] = []
        batch = self._scheduler.next_batch()
        if batch is None:
            receivers = self._read()
            batch = self._scheduler.next_batch()
            assert batch is not None, "nothing is pending"
        if batch.rows:
            self._launch(batch)
        if not batch.rows or len(self._launched) > int(self.session.runs_ahead):
            receivers += self._read()
        return receivers

    def cancel(self, request: Request) -> None:
        """End a request between two steps, whatever its state; its blocks are free at once."""
        self._scheduler.cancel(request)
        self._texts.pop(request.id, None)

    @property
    def has_work(self) -> bool:
        """Some request waits or runs, so a step would do something."""
        return self._scheduler.has_work

    def _launch(self, batch: Batch) -> None:
        # What is pending was sampled in the last step: the one before that has been read.
        sampled_ids = self._launched[-1].sampled.ids if self._launched else None
        logits = self.session.run(batch, sampled_ids)
        sampled = self._sampler.sample(_rows_of_receivers(batch, logits), batch.receivers, sampled_ids)
        self._launched.append(_Launched(batch, sampled, _copy_logits(batch, logits)))
        self._scheduler.launch(batch)

    def _read(self) -> list[Request]:
        """Wait for the tokens of the oldest launched step, if there is one; return the requests that got one."""
        if not self._launched:
            return []
        step = self._launched.popleft()
        batch, sampled = step.batch, step.sampled
        broken: list[Request] = []
        if BROKEN in sampled.tokens:
            pairs = zip(batch.receivers, sampled.tokens, strict=True)
            broken = [request for request, token in pairs if token == BROKEN and not request.is_finished]
        for request in broken:
            self.cancel(request)
        receivers = self._record(step)
        if broken:
            raise no_next_token(broken, len(batch.receivers))
        return receivers

    def _record(self, step: _Launched) -> list[Request]:
        for request, context, generation in step.logits:
            if context is not None and not request.is_finished:
                request.context_logits.append(context)
            if generation is not None and not request.is_finished:
                request.generation_logits.append(generation)
        for request, log_prob in zip(step.batch.receivers, step.sampled.log_probs or (), strict=False):
            if request.sampling.gather_log_probs and not request.is_finished:
                request.log_probs.append(log_prob)
        receivers = self._scheduler.accept(step.batch, step.sampled.tokens)
        for request in receivers:
            text = self._texts.get(request.id)
            reason = FinishReason.STOP_STRING if text and text.push(request) else request.stop_reason()
            if reason:
                self._finish(request, reason)
        return receivers

    def _finish(self, request: Request, reason: FinishReason) -> None:
        text = self._texts.pop(request.id, None)
        if text:
            text.finish(request)
        self._scheduler.finish(request, reason)

    def _enqueue(self, request: Request, with_text: bool) -> None:
        self._scheduler.submit(request)
        if with_text or request.sampling.stop_strings:
            assert self.tokenizer is not None, "who asks for text was refused before"
            self._texts[request.id] = _OutputText(self.tokenizer, request.sampling.stop_strings)

    def _make_request(self, prompt_ids: Prompt, sampling: Sampling, name: str) -> Request:
        """A request that this engine can serve; else a ValueError that begins with `name`."""
        ids = read_prompt(prompt_ids, name)
        limits, vocab_size = self.limits, self.config.vocab_size
        check_prompt(ids, limits, vocab_size, name)
        if len(ids) + sampling.max_new_tokens > limits.max_seq_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens, with max_new_tokens {sampling.max_new_tokens} that makes "
                f"{len(ids) + sampling.max_new_tokens}, expected at most {limits.max_seq_len} "
                f"(max_input_len + max_output_len)"
            )
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError(f"stop_strings are {list(sampling.stop_strings)!r}, but there is no tokenizer; give one")
        sampling.check_vocabulary(vocab_size)
        request = Request(next(self._ids), ids, sampling)
        self._scheduler.check_fits(request)
        return request

    def _make_requests(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Request]:
        if not len(prompts):
            raise ValueError("the batch has 0 prompts, expected at least one")
        return [
            self._make_request(prompt, sampling.for_sequence(position, len(prompts)), f"prompt {position}")
            for position, prompt in enumerate(prompts)
        ]

    def _run(self, requests: list[Request], with_text: bool) -> Iterator[list[Request]]:
        """Serve `requests` to their ends, giving the receivers of each step. Left early, it cancels the others."""
        try:
            for request in requests:
                self._enqueue(request, with_text)
            while not all(request.is_finished for request in requests):
                yield self.step()
        finally:
            for request in requests:
                self.cancel(request)
            if not self.has_work:
                self._allocator.check_balanced()

    # The interface of 0.7.1

    def setup(self, batch_size: int, max_context_length: int, max_new_tokens: int, beam_width: int = 1) -> None:
        """State the shape of the calls of `decode` that follow. Nothing is allocated: the session has its memory."""
        if beam_width != 1:
            raise ValueError(f"beam_width is {beam_width}, expected 1: beam search is not supported")
        if min(batch_size, max_context_length, max_new_tokens) < 1:
            raise ValueError(
                f"batch_size is {batch_size}, max_context_length {max_context_length}, max_new_tokens "
                f"{max_new_tokens}, expected at least 1 of each"
            )
        if max_context_length > self.limits.max_input_len:
            raise ValueError(
                f"max_context_length is {max_context_length}, expected at most {self.limits.max_input_len} "
                f"(max_input_len)"
            )
        if max_context_length + max_new_tokens > self.limits.max_seq_len:
            raise ValueError(
                f"max_context_length + max_new_tokens is {max_context_length + max_new_tokens}, expected at most "
                f"{self.limits.max_seq_len} (max_input_len + max_output_len)"
            )
        self._setup = _Setup(batch_size, max_context_length, max_new_tokens)

    def decode(
        self,
        input_ids: torch.Tensor,
        context_lengths: torch.Tensor | Sequence[int],
        sampling_config: SamplingConfig,
        *,
        stop_words_list: Sequence[Sequence[int]] | None = None,
        bad_words_list: Sequence[Sequence[int]] | None = None,
        streaming: bool = False,
        output_sequence_lengths: bool = False,
        return_dict: bool = False,
    ) -> Any:
        """Continue prompts that come right-padded [batch, longest] or packed [1, tokens] or [tokens].

        Gives int32 output_ids [batch, 1, longest prompt + max_new_tokens] on the CPU: each prompt, its new tokens right
        after it, then end_id (or pad_id). `return_dict` gives a dict with more (see `DecodeOutput`), `streaming` a
        generator of the same after every step that gave tokens. If `setup` was called, its max_new_tokens holds.
        """
        prompts = split_prompts(input_ids, context_lengths)
        if self._setup:
            found = (len(prompts), max(map(len, prompts)))
            if found != self._setup[:2]:
                raise ValueError(
                    f"decode got {found[0]} prompts of at most {found[1]} tokens, but setup was called for "
                    f"{self._setup.batch_size} of at most {self._setup.max_context_length}; call setup again"
                )
            sampling_config = replace(sampling_config, max_new_tokens=self._setup.max_new_tokens)
        return self.decode_batch(
            prompts,
            sampling_config,
            stop_words_list=stop_words_list,
            bad_words_list=bad_words_list,
            streaming=streaming,
            output_sequence_lengths=output_sequence_lengths,
            return_dict=return_dict,
        )

    def decode_batch(
        self,
        input_ids: Sequence[Prompt],
        sampling_config: SamplingConfig,
        *,
        stop_words_list: Sequence[Sequence[int]] | None = None,
        bad_words_list: Sequence[Sequence[int]] | None = None,
        streaming: bool = False,
        output_sequence_lengths: bool = False,
        return_dict: bool = False,
    ) -> Any:
        """`decode` for a list of prompts. What is asked for here or in `sampling_config` is given."""
        config = replace(
            sampling_config,
            stop_words_list=sampling_config.stop_words_list if stop_words_list is None else stop_words_list,
            bad_words_list=sampling_config.bad_words_list if bad_words_list is None else bad_words_list,
            return_dict=sampling_config.return_dict or return_dict,
            output_sequence_lengths=sampling_config.output_sequence_lengths or output_sequence_lengths,
        )
        requests = self._make_requests(input_ids, config)
        output = DecodeOutput(requests, config, has_texts=self.tokenizer is not None)
        steps = self._run(requests, with_text=output.is_dict and output.has_texts)
        if streaming:
            return (output.current() for receivers in steps if receivers)
        for _ in steps:
            pass
        return output.current()

    # Text and tokens as they come

    def stream(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> Iterator[NewToken]:
        """The new tokens of all prompts as they come, with text if there is a tokenizer. Leaving it early cancels."""
        return self._stream(self._make_requests(prompts, sampling))

    def _stream(self, requests: list[Request]) -> Iterator[NewToken]:
        position_of = {request.id: position for position, request in enumerate(requests)}
        shown = [0] * len(requests)
        for receivers in self._run(requests, with_text=self.tokenizer is not None):
            for request in receivers:
                position = position_of.get(request.id)
                if position is not None:  # somebody may have submitted others meanwhile
                    text = request.text[shown[position] :]
                    shown[position] = len(request.text)
                    yield NewToken(position, request.token_ids[-1], text, request.finish_reason)

    def stream_text(self, prompt_ids: Prompt, sampling: SamplingConfig) -> Iterator[str]:
        """The answer to one prompt in pieces of whole characters. Leaving it early cancels."""
        if self.tokenizer is None:
            raise ValueError("stream_text needs a tokenizer, but there is none; give one")
        return (token.text for token in self.stream([prompt_ids], sampling) if token.text)


class _OutputText:
    """Follows the text of one request: whole characters, nothing for the id that ends it, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._matcher = StopStringMatcher(stop_strings)
        self._vocab_size = tokenizer.vocab_size

    def push(self, request: Request) -> bool:
        """Add the newest token's text to `request.text`; return whether a stop string is complete."""
        token = request.token_ids[-1]
        # An engine's vocabulary may have more ids than its tokenizer has tokens.
        has_text = token < self._vocab_size and token not in request.sampling.end_ids
        text = self._stream.push([token]) if has_text else ""
        matched = False
        if request.num_output >= request.sampling.min_length:
            text, matched = self._matcher.push(text)
        request.text += text
        return matched

    def finish(self, request: Request) -> None:
        text, _ = self._matcher.push(self._stream.flush())
        request.text += text + self._matcher.flush()


def _rows_of_receivers(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """The row of each receiver's last token, which chooses the next."""
    if batch.num_logits == len(batch.receivers):
        return logits
    ends = accumulate(row.num_logits for row in batch.rows)
    chosen = [end - 1 for row, end in zip(batch.rows, ends, strict=True) if row.gives_token]
    return logits.index_select(0, upload(chosen, torch.int64, logits.device))


def _copy_logits(batch: Batch, logits: torch.Tensor) -> list[_KeptLogits]:
    """Logits on the host for the requests that want to have them. Waits for the step if there are any."""
    kept: list[_KeptLogits] = []
    if not any(request.sampling.gathers_logits for request in batch.requests):
        return kept
    end = 0
    for row in batch.rows:
        start, end = end, end + row.num_logits
        wants_context = row.request.collects_context_logits
        wants_generation = row.request.sampling.gather_generation_logits and row.gives_token
        context = _copy_to_host(logits[start:end]) if wants_context else None
        generation = _copy_to_host(logits[end - 1]) if wants_generation else None
        kept.append(_KeptLogits(row.request, context, generation))
    return kept


def _copy_to_host(logits: torch.Tensor) -> torch.Tensor:
    # Always a copy: the session writes the next step's logits over these.
    return logits.to("cpu", copy=True)
