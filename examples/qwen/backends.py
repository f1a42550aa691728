"""A model under measurement: an engine, or the Hugging Face model of the same checkpoint, behind one interface.

Knows token ids only: texts, datasets and clocks are the business of the scripts that compare.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tensorrt_llm import Engine
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session

# The names of the flag --data_type.
DATA_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Backend(Protocol):
    name: str
    device: torch.device
    vocab_size: int

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        """The new ids of each prompt; an id that ended a sequence is the last of them."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """float32 [len(ids), vocab_size] on the CPU: row i scores what follows ids[: i + 1]."""


class EngineBackend:
    def __init__(self, engine: Engine, name: str, device: torch.device) -> None:
        session = Session(engine, device)
        self.name = name
        self.device = device
        self.vocab_size = engine.config.vocab_size
        self._session = GenerationSession(session)

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        requests = [self._session.submit(prompt, sampling) for prompt in prompts]
        while self._session.has_work:
            self._session.step()
        return [request.output_ids for request in requests]

    def logits(self, ids: list[int]) -> torch.Tensor:
        sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
        logits: torch.Tensor = self._session.decode_batch([ids], sampling)["context_logits"][0]
        return logits


class HfBackend:
    """Qwen2ForCausalLM of transformers with its default attention; no remote code. See hf_model.py."""

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

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        """Prompts are padded on the left to one length. The mask keeps positions and attention right."""
        from transformers import GenerationConfig

        wanted = sampling.for_sequence(0, 1)
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
        output = self._model.generate(ids, attention_mask=mask.to(self.device), generation_config=config)
        return [_until_end(row, wanted.end_ids) for row in output[:, longest:].tolist()]

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([ids], device=self.device)).logits[0]
        return logits.float().cpu()


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    end = next((position for position, token_id in enumerate(ids) if token_id in end_ids), len(ids))
    return ids[: end + 1]
