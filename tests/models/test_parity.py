"""FP32 engines on the CPU against transformers in FP32, on random checkpoints of both generations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from hf_model import load_hf_model
from models_for_tests import engine_from_checkpoint, on_cpu, random_prompts
from transformers import PreTrainedModel

from tensorrt_llm.runtime import GenerationSession, SamplingConfig

NEW_TOKENS = 64
# Around the blocks of 16 tokens; together more than the 64 tokens of a step, so prompts are cut into chunks too.
LENGTHS = (1, 2, 15, 16, 17, 33, 57)

QWEN1: dict[str, dict[str, Any]] = {
    "qwen1": {"hidden": 64, "heads": 4},
    "qwen1-3-heads-of-24": {"hidden": 72, "heads": 3, "mlp_width": 53, "rotary_base": 1e6, "vocab": 101},
    "qwen1-5-heads-of-16": {"hidden": 80, "heads": 5, "mlp_width": 37, "norm_epsilon": 1e-5, "layers": 3},
    "qwen1-7-heads-of-20": {"hidden": 140, "heads": 7, "vocab": 211, "layers": 1},
}
QWEN2: dict[str, dict[str, Any]] = {
    "qwen2-1-kv-head": {"hidden": 48, "heads": 3, "num_kv_heads": 1, "mlp_width": 61},
    "qwen2-1-kv-head-tied": {"hidden": 140, "heads": 7, "num_kv_heads": 1, "tie": True, "rotary_base": 1e6},
    "qwen2-2-kv-heads": {"hidden": 96, "heads": 6, "num_kv_heads": 2, "rotary_base": 1e6, "norm_epsilon": 1e-5},
    "qwen2-2-kv-heads-tied": {"hidden": 64, "heads": 4, "num_kv_heads": 2, "tie": True, "vocab": 131},
    "qwen2-all-kv-heads": {"hidden": 100, "heads": 5, "num_kv_heads": 5, "layers": 3},
    "qwen2-all-kv-heads-tied": {"hidden": 72, "heads": 3, "num_kv_heads": 3, "tie": True, "rotary_base": 1e6},
    "qwen2-wide-heads": {"hidden": 50, "heads": 7, "num_kv_heads": 1, "head_dim": 22, "mlp_width": 33},
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint in both engines, prompts, and what our engine makes of them in one batch."""

    ours: GenerationSession
    theirs: PreTrainedModel
    prompts: list[list[int]]
    output: dict[str, Any]

    @property
    def continuations(self) -> list[list[int]]:
        return continuations(self.output, self.prompts)


@pytest.fixture(scope="module", params=[*QWEN1, *QWEN2])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    if request.param in QWEN1:
        # Beyond its trained length Qwen-1 is another function than transformers' Qwen2.
        write_qwen1_checkpoint(path, seq_length=max(LENGTHS) + NEW_TOKENS, **QWEN1[request.param])
    else:
        write_qwen2_checkpoint(path, max_position_embeddings=256, **QWEN2[request.param])
    theirs = load_hf_model(path, "float32", "cpu")
    ours = on_cpu(engine_from_checkpoint(path))
    prompts = random_prompts(LENGTHS, theirs.config.vocab_size)
    return Pair(ours, theirs, prompts, generate(ours, prompts))


def generate(session: GenerationSession, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy continuations and all logits of the engine."""
    return session.decode_batch(
        prompts,
        SamplingConfig(
            max_new_tokens=NEW_TOKENS, return_dict=True, gather_context_logits=True, gather_generation_logits=True
        ),
    )


def continuations(output: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    ids = output["output_ids"]
    return [ids[row, 0, len(prompt) : len(prompt) + NEW_TOKENS].tolist() for row, prompt in enumerate(prompts)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.inference_mode()
def hf_logits(pair: Pair, ids: list[int]) -> torch.Tensor:
    return pair.theirs(torch.tensor([ids])).logits[0]


def test_logits_of_all_prompt_positions_are_those_of_transformers(pair: Pair) -> None:
    for prompt, logits in zip(pair.prompts, pair.output["context_logits"], strict=True):
        assert_close(logits, hf_logits(pair, prompt))


def test_logits_of_all_new_tokens_are_those_of_transformers(pair: Pair) -> None:
    for prompt, new, logits in zip(pair.prompts, pair.continuations, pair.output["generation_logits"], strict=True):
        assert_close(logits, hf_logits(pair, prompt + new)[len(prompt) - 1 : -1])


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    theirs = [
        pair.theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in pair.prompts
    ]
    assert pair.continuations == theirs


def test_a_prompt_alone_and_among_seven_gives_the_same_tokens(pair: Pair) -> None:
    for prompt, among_seven in list(zip(pair.prompts, pair.continuations, strict=True))[::3]:
        assert continuations(generate(pair.ours, [prompt]), [prompt]) == [among_seven]


def test_continuations_differ(pair: Pair) -> None:
    """The comparisons above mean something: tokens depend on prompts."""
    distinct = {token for new in pair.continuations for token in new}
    assert len(distinct) > 10 and len({tuple(new) for new in pair.continuations}) > 1
