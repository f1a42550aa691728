"""A model under measurement: an engine, or the Hugging Face model of the same checkpoint, behind one interface.

Knows token ids only: texts, datasets and clocks are the business of the scripts that compare.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from step_bytes import StepBytes, step_bytes_of_engine, step_bytes_of_hf

from tensorrt_llm.runtime import GenerationSession, Request, SamplingConfig
from tensorrt_llm.runtime.engine_folder import AnyEngine, open_session
from tensorrt_llm.runtime.request import Sampling

# The names of the flag --data_type.
DATA_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# Hears the positions of the requests that got a token in a step.
OnTokens = Callable[[Sequence[int]], None]


class Backend(Protocol):
    kind: str  # trt_llm or hf
    name: str
    device: torch.device
    vocab_size: int
    step_bytes: StepBytes

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        """The new ids of each prompt; an id that ended a sequence is the last of them."""

    def serve(
        self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int, on_tokens: OnTokens
    ) -> None:
        """Give each prompt its number of new tokens, greedily and whatever they are, `batch_size` prompts at a time."""

    def warm_up(self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int) -> None:
        """Leave nothing to be compiled or captured in a `serve` of the same."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """float32 [len(ids), vocab_size] on the CPU: row i scores what follows ids[: i + 1]."""


class EngineBackend:
    kind = "trt_llm"

    def __init__(self, engine: AnyEngine, name: str, device: torch.device, *, reference: bool = False) -> None:
        """With `reference` the engine, one of ours, is interpreted in float32."""
        session = open_session(engine, device, reference=reference)
        self.name = name
        self.device = device
        self.vocab_size = engine.config.vocab_size
        self.step_bytes = step_bytes_of_engine(engine)
        self._session = GenerationSession(session)

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        requests = [self._session.submit(prompt, sampling) for prompt in prompts]
        while self._session.has_work:
            self._session.step()
        return [request.output_ids for request in requests]

    def serve(
        self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int, on_tokens: OnTokens
    ) -> None:
        """All at once where the engine itself runs no more than `batch_size`, else one more whenever one is done."""
        at_once = len(prompts) if batch_size >= self._session.limits.max_batch_size else batch_size
        waiting = iter(range(len(prompts)))
        position_of: dict[Request, int] = {}  # of those that were submitted and are not done

        def submit(count: int) -> None:
            for _, position in zip(range(count), waiting, strict=False):
                sampling = SamplingConfig(max_new_tokens=output_lens[position])
                position_of[self._session.submit(prompts[position], sampling)] = position

        submit(at_once)
        while self._session.has_work:
            receivers = self._session.step()
            on_tokens([position_of[request] for request in receivers])
            done = [request for request in receivers if request.is_finished]
            for request in done:
                del position_of[request]
            submit(len(done))

    def warm_up(self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int) -> None:
        """All of it: which graphs are captured follows from every step's batch and longest context."""
        self.serve(prompts, output_lens, batch_size, lambda positions: None)
        self._session.session.capture_graphs()

    def logits(self, ids: list[int]) -> torch.Tensor:
        sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
        logits: torch.Tensor = self._session.decode_batch([ids], sampling)["context_logits"][0]
        return logits


class HfBackend:
    """Qwen2ForCausalLM of transformers with its default attention; no remote code. See hf_model.py."""

    kind = "hf"

    def __init__(
        self, hf_model_dir: Path, data_type: str, device: torch.device, *, dummy_weights: bool = False
    ) -> None:
        # Imported here because transformers takes seconds to load, which an engine's start must not be charged with.
        from hf_model import load_hf_model, random_hf_model
        from transformers import GenerationConfig

        self.name = f"HF {DATA_TYPES[data_type]}"
        self.device = device
        load = random_hf_model if dummy_weights else load_hf_model
        self._model: Any = load(hf_model_dir, DATA_TYPES[data_type], self.device)
        # A checkpoint's recommendations (sampling, penalties, end ids) must not add to what is asked for.
        self._model.generation_config = GenerationConfig()
        self.vocab_size = int(self._model.config.vocab_size)
        self.step_bytes = step_bytes_of_hf(self._model)

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        wanted = sampling.for_sequence(0, 1)
        return [_until_end(row, wanted.end_ids) for row in self._generate(prompts, wanted)]

    def serve(
        self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int, on_tokens: OnTokens
    ) -> None:
        """In batches, one after the other; each goes on until its longest answer is there."""
        for start in range(0, len(prompts), batch_size):
            positions = range(start, min(start + batch_size, len(prompts)))
            wanted = SamplingConfig(max_new_tokens=max(output_lens[position] for position in positions))
            streamer = _Streamer(positions, output_lens, on_tokens)
            self._generate([prompts[position] for position in positions], wanted.for_sequence(0, 1), streamer)

    def warm_up(self, prompts: Sequence[list[int]], output_lens: Sequence[int], batch_size: int) -> None:
        """The first batch: nothing is captured, and kernels are not compiled for a shape."""
        self.serve(prompts[:batch_size], output_lens[:batch_size], batch_size, lambda positions: None)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], wanted: Sampling, streamer: "_Streamer | None" = None
    ) -> list[list[int]]:
        """Prompts are padded on the left to one length. The mask keeps positions and attention right."""
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=sorted(wanted.end_ids) or None,
            pad_token_id=0,
            do_sample=not wanted.is_greedy,
        )
        if not wanted.is_greedy:
            config.update(temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p or 1.0)
            torch.manual_seed(wanted.random_seed or 0)
        output = self._model.generate(
            ids, attention_mask=mask.to(self.device), generation_config=config, streamer=streamer
        )
        ids_after: list[list[int]] = output[:, longest:].tolist()
        return ids_after

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([ids], device=self.device)).logits[0]
        return logits.float().cpu()


class _Streamer:
    """What transformers gives the prompts, and then the tokens of each step when the host has them."""

    def __init__(self, positions: Sequence[int], output_lens: Sequence[int], on_tokens: OnTokens) -> None:
        self._positions = positions
        self._output_lens = output_lens
        self._on_tokens = on_tokens
        self._num_tokens = -1  # that each prompt of the batch has

    def put(self, ids: torch.Tensor) -> None:
        self._num_tokens += 1
        if self._num_tokens:
            # What comes after a request's length is not its own.
            self._on_tokens([at for at in self._positions if self._output_lens[at] >= self._num_tokens])

    def end(self) -> None:
        pass


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    end = next((position for position, token_id in enumerate(ids) if token_id in end_ids), len(ids))
    return ids[: end + 1]
