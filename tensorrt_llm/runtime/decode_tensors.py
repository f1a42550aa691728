"""Tensors that `decode` takes and gives, in the forms of TensorRT-LLM 0.7.1. Elsewhere sequences are lists of ids."""

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

import numpy as np
import torch

from .request import FinishReason, Request, SamplingConfig

# One sequence's token ids: a list, or a 1-D tensor or array of integers.
Prompt = Sequence[int] | torch.Tensor | np.ndarray


def read_prompt(prompt: Prompt, name: str) -> list[int]:
    """A prompt as a list; anything but whole numbers in one dimension is a ValueError that begins with `name`."""
    try:
        return list(map(index, prompt.tolist() if hasattr(prompt, "tolist") else prompt))
    except TypeError as error:
        raise ValueError(f"{name} is not a one-dimensional list or tensor of integer token ids: {error}") from error


def split_prompts(input_ids: torch.Tensor, context_lengths: torch.Tensor | Sequence[int]) -> list[list[int]]:
    """The prompts in a right-padded or packed tensor."""
    lengths = read_prompt(context_lengths, "context_lengths")
    shape = tuple(input_ids.shape)
    if lengths and min(lengths) >= 0:
        if len(shape) == 2 and shape[0] == len(lengths) and max(lengths) <= shape[1]:
            return [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        if shape in ((sum(lengths),), (1, sum(lengths))):
            ids = input_ids.flatten().tolist()
            return [ids[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]
    raise ValueError(
        f"input_ids have shape {list(shape)} and context_lengths are {lengths}, expected right-padded "
        f"[batch, longest] or packed [1, sum of lengths] or [sum of lengths], and a length for each prompt"
    )


class DecodeOutput:
    """What `decode` returns about its requests: output_ids, or a dict.

    The dict holds output_ids and, with one entry per sequence, sequence_lengths (prompt and output, without an id that
    ended it), finish_reasons (None: not finished), and texts if there is a tokenizer. What the config asks for comes
    when all are finished: log_probs [batch, 1, max_new_tokens] and cum_log_probs [batch, 1] of the chosen tokens;
    context_logits [prompt, vocab] and generation_logits [new tokens, vocab], float32 on the CPU.
    """

    def __init__(self, requests: list[Request], config: SamplingConfig, has_texts: bool) -> None:
        self.requests = requests
        self.has_texts = has_texts
        # Who asks for what a bare tensor cannot hold asks for the dict.
        self.is_dict = config.return_dict or config.output_sequence_lengths or _wants_details(config)
        self._config = config
        self._max_new_tokens = max(request.sampling.max_new_tokens for request in requests)
        total = max(request.context_length for request in requests) + self._max_new_tokens
        fill = next((token for token in (config.end_id, config.pad_id) if token is not None), 0)
        self._output_ids = np.full((len(requests), 1, total), fill, dtype=np.int32)
        self._written = [0] * len(requests)

    def current(self) -> torch.Tensor | dict[str, Any]:
        """The output so far. The tensor of ids is the same one every time, and grows in place."""
        self._write_new_ids()
        output_ids = torch.from_numpy(self._output_ids)
        if not self.is_dict:
            return output_ids
        output: dict[str, Any] = {
            "output_ids": output_ids,
            "sequence_lengths": torch.tensor([[_length(request)] for request in self.requests], dtype=torch.int32),
            "finish_reasons": [request.finish_reason for request in self.requests],
        }
        if self.has_texts:
            output["texts"] = [request.text for request in self.requests]
        if all(request.is_finished for request in self.requests):
            output |= self._details()
        return output

    def _write_new_ids(self) -> None:
        for row, request in enumerate(self.requests):
            start, end = self._written[row], len(request.token_ids)
            if start < end:
                self._output_ids[row, 0, start:end] = request.token_ids[start:]
                self._written[row] = end

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if self._config.output_log_probs:
            details["log_probs"] = torch.zeros((len(self.requests), 1, self._max_new_tokens))
            for row, request in enumerate(self.requests):
                details["log_probs"][row, 0, : request.num_output] = torch.tensor(request.log_probs)
        if self._config.output_cum_log_probs:
            details["cum_log_probs"] = torch.tensor([[request.cum_log_prob] for request in self.requests])
        if self._config.gather_context_logits:
            details["context_logits"] = [torch.cat(request.context_logits) for request in self.requests]
        if self._config.gather_generation_logits:
            details["generation_logits"] = [torch.stack(request.generation_logits) for request in self.requests]
        return details


def _length(request: Request) -> int:
    return len(request.token_ids) - (request.finish_reason is FinishReason.END_ID)


def _wants_details(config: SamplingConfig) -> bool:
    return any(
        (
            config.output_log_probs,
            config.output_cum_log_probs,
            config.gather_context_logits,
            config.gather_generation_logits,
        )
    )
