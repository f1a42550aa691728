"""The verdict on a quantized engine: what it is compared with, on which text, and what the build lets pass."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from texts.calibration_text import (
    BUNDLED_TEXT,
    CalibrationText,
    load_calibration_text,
    needs_tokenizer,
    random_text,
)

from tensorrt_llm import Engine
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.quantization_loss import measure_loss
from tensorrt_llm.tokenizer import HF_FILE, QWEN_FILE, Tokenizer, load_tokenizer
from tensorrt_llm.verdict import Gate, Verdict, default_gate

logger = logging.getLogger(__name__)

# Longer texts make no other numbers, but attention of their square.
_LONGEST_TEXT = 512


@dataclass(frozen=True)
class Examination:
    """How a verdict is reached."""

    text: CalibrationText
    gate: Gate
    device: torch.device
    loss_is_allowed: bool

    def judge(self, quantized: Engine, unquantized: Engine, reference_name: str) -> Verdict:
        """Measure; worse than the gate is a ValueError with the numbers and the layers, unless loss is allowed."""
        verdict = measure_loss(
            quantized,
            unquantized,
            self.text.texts,
            self.device,
            text_name=self.text.name,
            reference_name=reference_name,
            gate=self.gate,
            loss_is_allowed=self.loss_is_allowed,
        )
        if not verdict.passes and not self.loss_is_allowed:
            worst = ", ".join(f"{layer.layer} {layer.relative_error:.2%}" for layer in verdict.worst_layers)
            raise ValueError(
                f"quantization loses more than the gate allows: {verdict}; worst layers: {worst}; choose a finer mode, "
                f"or build with --allow_accuracy_loss"
            )
        return verdict


def gate_for(mode: QuantMode, mean_kl: float | None) -> Gate:
    """The mode's gate, with the user's bound on mean KL if there is one."""
    gate = default_gate(mode)
    if mean_kl is None:
        return gate
    if not mean_kl >= 0:
        raise ValueError(f"--accuracy_gate is {mean_kl}, expected nats per token of 0 or more")
    return replace(gate, mean_kl=mean_kl)


def accuracy_text(
    path: Path | None, calibration_ids: Path | None, tokenizer_dir: Path, vocab_size: int, max_tokens: int
) -> CalibrationText:
    """What --accuracy_text names, else the text that the weights were calibrated on, else the bundled one."""
    chosen = path or calibration_ids or BUNDLED_TEXT
    tokenizer = None
    if needs_tokenizer(chosen):
        tokenizer = _tokenizer_of(tokenizer_dir, is_wanted=path is not None)
        if tokenizer is None:
            logger.warning(
                "%s has no tokenizer: accuracy is measured on random token ids; give --accuracy_text IDS.npy for "
                "numbers that mean more",
                tokenizer_dir,
            )
            return random_text(vocab_size, _LONGEST_TEXT, max_tokens)
    return load_calibration_text(chosen, tokenizer, vocab_size, _LONGEST_TEXT, max_tokens, from_end=True)


def _tokenizer_of(folder: Path, is_wanted: bool) -> Tokenizer | None:
    if not is_wanted and not any((folder / name).exists() for name in (QWEN_FILE, HF_FILE)):
        return None
    return load_tokenizer(folder)
