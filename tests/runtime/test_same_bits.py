"""Bits on a GPU: the same in two runs, and with batch_invariant the same for a prompt alone and among 64."""

from collections.abc import Sequence

import pytest
import torch
from engines_of_modes import MODES, random_engine
from models_for_tests import make_config

from tensorrt_llm import Limits
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session

# 64 prompts do not fit into one step, so some of them are computed in pieces.
LIMITS = Limits(max_batch_size=64, max_input_len=150, max_output_len=16, max_num_tokens=512, tokens_per_block=16)
CONFIG = make_config(
    vocab_size=90,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_size=64,
    mlp_hidden_size=352,
    seq_length=512,
    max_position_embeddings=512,
)


def logits_of(session: GenerationSession, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    config = SamplingConfig(max_new_tokens=8, end_id=None, gather_generation_logits=True, return_dict=True)
    output: list[torch.Tensor] = session.decode_batch(prompts, config)["generation_logits"]
    return output


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (64,), generator=generator).tolist()
    return [torch.randint(90, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_give_the_same_bits(mode: str) -> None:
    prompts = make_prompts()
    runs = []
    for _ in range(2):
        session = GenerationSession(Session(random_engine(MODES[mode], CONFIG, LIMITS), "cuda"))
        runs.append(torch.cat(logits_of(session, prompts)))
    assert torch.equal(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_has_the_same_bits_alone_and_among_64(mode: str) -> None:
    session = GenerationSession(Session(random_engine(MODES[mode], CONFIG, LIMITS, batch_invariant=True), "cuda"))
    prompts = make_prompts()
    together = logits_of(session, prompts)
    for index in (0, 7, 33, 63):
        assert torch.equal(logits_of(session, [prompts[index]])[0], together[index])
