"""The Hugging Face baseline: Qwen-1 through Qwen2ForCausalLM is the same function up to the trained length."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoints import Storage, write_qwen1_checkpoint, write_qwen2_checkpoint
from hf_model import load_hf_model

S = 24  # trained length


def qwen1_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Qwen-1 up to its trained length in float64, written from its definition. ids [T] -> logits [T, V]."""
    config = json.loads((path / "config.json").read_text())
    checkpoint = HfCheckpoint(path)
    w = {name: checkpoint.read(name).double() for name in checkpoint.tensors()}
    heads, size, tokens = config["num_attention_heads"], config["kv_channels"], len(ids)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * w[name]

    angles = torch.arange(tokens).double()[:, None] * config["rotary_emb_base"] ** (
        -torch.arange(0, size, 2).double() / size
    )

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [T, heads, size]
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = w["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"transformer.h.{layer}"
        qkv = norm(x, f"{p}.ln_1.weight") @ w[f"{p}.attn.c_attn.weight"].T + w[f"{p}.attn.c_attn.bias"]
        q, k, v = (part.reshape(tokens, heads, size) for part in qkv.chunk(3, dim=-1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / size**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(tokens, -1)
        x = x + attended @ w[f"{p}.attn.c_proj.weight"].T
        n = norm(x, f"{p}.ln_2.weight")
        activated = torch.nn.functional.silu(n @ w[f"{p}.mlp.w2.weight"].T)
        x = x + (activated * (n @ w[f"{p}.mlp.w1.weight"].T)) @ w[f"{p}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ w["lm_head.weight"].T


def logits(path: Path, ids: torch.Tensor, dtype: str = "float32") -> torch.Tensor:
    with torch.no_grad():
        return load_hf_model(path, dtype, "cpu")(ids[None]).logits[0].double()


@pytest.mark.parametrize("rotary_base", [1e4, 1e6])
@pytest.mark.parametrize(("storage", "shards"), [("safetensors", 1), ("bin", 3)])
def test_qwen1_is_the_same_function_up_to_the_trained_length(
    tmp_path: Path, rotary_base: float, storage: Storage, shards: int
) -> None:
    write_qwen1_checkpoint(tmp_path, rotary_base=rotary_base, seq_length=S, storage=storage, shards=shards)
    ids = torch.randint(0, 97, (S,), generator=torch.Generator().manual_seed(0))
    expected = qwen1_logits(tmp_path, ids)
    error = (logits(tmp_path, ids) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_random_checkpoints_have_logits_that_differ(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path, seq_length=S)
    found = logits(tmp_path, torch.arange(S))
    assert found.std() > 0.5 and len(found.argmax(-1).unique()) > S // 3


@pytest.mark.parametrize("tie", [False, True])
def test_qwen2_is_loaded_with_its_own_weights(tmp_path: Path, tie: bool) -> None:
    write_qwen2_checkpoint(tmp_path, num_kv_heads=2, tie=tie)
    checkpoint, state = HfCheckpoint(tmp_path), load_hf_model(tmp_path, "float32", "cpu").state_dict()
    assert all(torch.equal(state[name], checkpoint.read(name)) for name in checkpoint.tensors())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_model_has_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    write_qwen1_checkpoint(tmp_path, layers=1)
    model = load_hf_model(tmp_path, dtype, "cpu")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"} and not model.training


def test_the_generation_config_of_qwen1_is_read(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path, layers=1)
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml", "eos_token_id": 7, "pad_token_id": 7}')
    assert load_hf_model(tmp_path, "float32", "cpu").generation_config.eos_token_id == 7


@pytest.mark.parametrize("write", [write_qwen1_checkpoint, write_qwen2_checkpoint])
def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(tmp_path, layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"\d+ missing: "):
        load_hf_model(tmp_path, "float32", "cpu")
