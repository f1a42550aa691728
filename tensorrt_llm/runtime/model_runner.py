"""An engine folder, ready to generate: `ModelRunner.from_dir(...)`, then `.generate(...)`, as in TensorRT-LLM 0.7.1.

Opens the engine and fills in sampling from keyword arguments; serving is generation.py's.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch

from ..dtype import torch_dtype
from ..engine import EngineConfig
from ..engine_file import EngineFile
from ..tokenizer import Tokenizer
from .engine_folder import open_engine, open_session
from .generation import GenerationSession, Prompt
from .request import SamplingConfig


class ModelRunner:
    def __init__(self, session: GenerationSession) -> None:
        self.session = session

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | Path,
        tokenizer: Tokenizer | None = None,
        rank: int = 0,
        device: str | torch.device | None = None,
        kv_cache_tokens: int | None = None,
        opened: EngineFile | None = None,
    ) -> "ModelRunner":
        """Load the engine in `engine_dir`, on CUDA if there is one. Stop strings and text need a tokenizer.

        `opened` is the engine's file, if its check was begun before.
        """
        engine = open_engine(engine_dir, rank, check_weights=False, opened=opened)  # the session checks
        return cls(GenerationSession(open_session(engine, device, kv_cache_tokens=kv_cache_tokens), tokenizer))

    def generate(
        self,
        batch_input_ids: Sequence[Prompt],
        sampling_config: SamplingConfig | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`GenerationSession.decode_batch` with fields of `sampling_config` set by `kwargs`; the config stays as it is.

        Without a config it is greedy, and ends at the tokenizer's stop ids if there is a tokenizer.
        """
        config = copy(sampling_config) if sampling_config else self.default_sampling()
        unknown = config.update(**kwargs)
        if unknown:
            raise ValueError(f"generate got {', '.join(sorted(unknown))}, expected fields of SamplingConfig")
        return self.session.decode_batch(batch_input_ids, config, streaming=streaming)

    def stream_text(self, prompt_ids: Prompt, sampling_config: SamplingConfig) -> Iterator[str]:
        """The answer to one prompt in pieces of whole characters. Leaving it early cancels."""
        return self.session.stream_text(prompt_ids, sampling_config)

    def default_sampling(self) -> SamplingConfig:
        tokenizer = self.session.tokenizer
        if tokenizer is None:
            return SamplingConfig()
        return SamplingConfig(end_id=tokenizer.stop_ids[0], pad_id=tokenizer.eod_id, stop_ids=tokenizer.stop_ids)

    @property
    def config(self) -> EngineConfig:
        return self.session.config

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.config.precision)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def vocab_size_padded(self) -> int:
        return self.config.vocab_size_padded

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def max_sequence_length(self) -> int:
        return self.config.limits.max_seq_len

    @property
    def remove_input_padding(self) -> bool:
        """Always: inputs are packed inside, whatever form they come in."""
        return True
