"""Qwen-1 beyond its trained length against the model's definition, written here in float64 numpy, whole and uncached.

Dynamic NTK: a prompt of L tokens stretches the RoPE base by alpha(L)^(d / (d - 2)) with
alpha = max(2^ceil(log2(L / S) + 1) - 1, 1), for the prompt and for all that follows it. Log-n: the query at position i,
counted from 1, is multiplied by ln(i) / ln(S) where i > S. Source: modeling_qwen.py of the Qwen-1 checkpoints.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_qwen1_checkpoint
from models_for_tests import engine_from_checkpoint, on_cpu, random_prompts
from safetensors.numpy import load_file

from tensorrt_llm.runtime import SamplingConfig

S = 16
LENGTHS = (S - 1, S, S + 1, 2 * S, 2 * S + 1)
NEW_TOKENS = 24  # from below S to beyond 2 S, and from 2 S + 1 to beyond 3 S
HEADS, LAYERS, EPS = 3, 2, 1e-6
RULES = [(True, True), (True, False), (False, True), (False, False)]


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def qwen1_logits(
    weights: dict[str, np.ndarray], ids: list[int], prompt: int, base: float, ntk: bool, logn: bool
) -> np.ndarray:
    """Logits [tokens, vocab] of a sequence whose first `prompt` tokens were its prompt."""
    size = weights["transformer.wte.weight"].shape[1] // HEADS
    if ntk:
        alpha = max(2 ** math.ceil(math.log2(prompt / S) + 1) - 1, 1)
        base *= alpha ** (size / (size - 2))
    positions = np.arange(len(ids))
    angles = positions[:, None] / base ** (np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate((half, half), axis=1) for half in (np.cos(angles), np.sin(angles)))

    def rope(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=1)
        return x * cos + np.concatenate((-second, first), axis=1) * sin

    is_future = positions[None, :] > positions[:, None]
    x = weights["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        w = {name.removeprefix(f"transformer.h.{layer}."): value for name, value in weights.items()}
        q, k, v = np.split(rms(x, w["ln_1.weight"]) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"], 3, axis=1)
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            query = rope(q[:, part])
            if logn:
                query = query * np.maximum(np.log(positions + 1) / np.log(S), 1)[:, None]
            scores = np.where(is_future, -np.inf, query @ rope(k[:, part]).T / np.sqrt(size))
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, part])
        x = x + np.concatenate(heads, axis=1) @ w["attn.c_proj.weight"].T
        n = rms(x, w["ln_2.weight"])
        gate = n @ w["mlp.w2.weight"].T
        x = x + (n @ w["mlp.w1.weight"].T * gate / (1 + np.exp(-gate))) @ w["mlp.c_proj.weight"].T
    return rms(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


@pytest.fixture(scope="module", params=RULES, ids=["ntk+logn", "ntk", "logn", "neither"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per prompt: its length, all logits of the engine, and all logits by the definition for the same tokens."""
    ntk, logn = request.param
    base = 1e4
    path: Path = tmp_path_factory.mktemp("checkpoint")
    write_qwen1_checkpoint(
        path, hidden=60, heads=HEADS, layers=LAYERS, seq_length=S, use_dynamic_ntk=ntk, use_logn_attn=logn,
        rotary_base=base, norm_epsilon=EPS,
    )  # fmt: skip
    weights = {name: value.astype(np.float64) for name, value in load_file(path / "model.safetensors").items()}
    prompts = random_prompts(LENGTHS, 97)
    # One batch of all: each sequence must keep its own alpha; prompts are cut into chunks of one step's 64 tokens.
    output = on_cpu(engine_from_checkpoint(path)).decode_batch(
        prompts,
        SamplingConfig(
            max_new_tokens=NEW_TOKENS, return_dict=True, gather_context_logits=True, gather_generation_logits=True
        ),
    )
    results = []
    for row, prompt in enumerate(prompts):
        ids = output["output_ids"][row, 0, : len(prompt) + NEW_TOKENS].tolist()
        results.append(
            {
                "length": len(prompt),
                "context": output["context_logits"][row].double(),
                "generation": output["generation_logits"][row].double(),
                "wanted": torch.from_numpy(qwen1_logits(weights, ids, len(prompt), base, ntk, logn)),
            }
        )
    return results


def assert_close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit."""
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=map(str, LENGTHS))
def test_prefill_is_the_definition(served: list[dict[str, Any]], index: int) -> None:
    result = served[index]
    assert_close(result["context"], result["wanted"][: result["length"]])


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=map(str, LENGTHS))
def test_decode_is_the_definition(served: list[dict[str, Any]], index: int) -> None:
    """Also where a decode grows beyond S or 2 S: log-n begins, alpha stays."""
    result = served[index]
    assert_close(result["generation"], result["wanted"][result["length"] - 1 : -1])


def test_the_rules_change_logits_by_far_more_than_the_tolerance(tmp_path: Path) -> None:
    """The comparisons above would see a rule that is left out, off by one, or not frozen at prefill."""
    write_qwen1_checkpoint(tmp_path, hidden=60, heads=HEADS, layers=LAYERS, seq_length=S)
    weights = {name: value.astype(np.float64) for name, value in load_file(tmp_path / "model.safetensors").items()}
    (ids,) = random_prompts([2 * S + 1], 97)
    right = qwen1_logits(weights, ids, 2 * S + 1, 1e4, True, True)
    for prompt, ntk, logn in ((2 * S, True, True), (2 * S + 1, False, True), (2 * S + 1, True, False)):
        wrong = qwen1_logits(weights, ids, prompt, 1e4, ntk, logn)
        assert np.abs(wrong - right).max() > 100 * 1e-4 * np.abs(right).max()
