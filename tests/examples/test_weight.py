"""From a Hugging Face checkpoint to parameters: the right tensors, split over ranks without loss, proved complete."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoint.weight_map import origins_of
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint, write_tensors
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM
from weight import check_complete, load_from_hf_qwen

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.models.qwen.model import QWenForCausalLM

ATTENTION = ("c_attn.weight", "c_attn.bias", "c_proj.weight")

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path], Path]

WRITERS: dict[str, Writer] = {
    "qwen1": lambda path: write_qwen1_checkpoint(path),
    "qwen1-sharded-bin": lambda path: write_qwen1_checkpoint(path, storage="bin", shards=3),
    "qwen2-all-kv-heads": lambda path: write_qwen2_checkpoint(path, shards=2),
    "qwen2-2-kv-heads": lambda path: write_qwen2_checkpoint(path, num_kv_heads=2),
    "qwen2-1-kv-head": lambda path: write_qwen2_checkpoint(path, num_kv_heads=1, dtype=torch.bfloat16),
    "qwen2-tied": lambda path: write_qwen2_checkpoint(path, num_kv_heads=2, tie=True),
    "qwen2-head-dim": lambda path: write_qwen2_checkpoint(path, num_kv_heads=2, head_dim=12),
}


@pytest.fixture(params=WRITERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path)


def model_of(path: Path, tp_size: int = 1, rank: int = 0) -> QWenForCausalLM:
    mapping = Mapping(world_size=tp_size, rank=rank, tp_size=tp_size)
    config = QWenConfig.from_hf_dir(path)
    model = QWenForCausalLM(config, "float32", mapping)
    load_from_hf_qwen(model, path, config, mapping)
    return model


def loaded(path: Path, tp_size: int = 1, rank: int = 0) -> Tensors:
    return {name: parameter.load() for name, parameter in model_of(path, tp_size, rank).named_parameters()}


def expected_parameters(path: Path) -> Tensors:
    """The whole model's parameters, put together by hand from the checkpoint's tensors."""
    source = HfCheckpoint(path)
    hf = {name: source.read(name).float() for name in source.tensors()}
    layers = QWenConfig.from_hf_dir(path).num_hidden_layers
    if "transformer.wte.weight" in hf:
        ours = {
            "vocab_embedding.weight": hf["transformer.wte.weight"],
            "ln_f.weight": hf["transformer.ln_f.weight"],
            "lm_head.weight": hf["lm_head.weight"],
        }
        names = {
            "ln_1.weight": "ln_1.weight",
            "ln_2.weight": "ln_2.weight",
            "attention.qkv.weight": "attn.c_attn.weight",
            "attention.qkv.bias": "attn.c_attn.bias",
            "attention.dense.weight": "attn.c_proj.weight",
            "mlp.fc.weight": "mlp.w2.weight",
            "mlp.gate.weight": "mlp.w1.weight",
            "mlp.proj.weight": "mlp.c_proj.weight",
        }
        for i in range(layers):
            ours |= {f"layers.{i}.{mine}": hf[f"transformer.h.{i}.{theirs}"] for mine, theirs in names.items()}
        return ours
    ours = {
        "vocab_embedding.weight": hf["model.embed_tokens.weight"],
        "ln_f.weight": hf["model.norm.weight"],
        "lm_head.weight": hf.get("lm_head.weight", hf["model.embed_tokens.weight"]),
    }
    names = {
        "ln_1.weight": "input_layernorm.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.fc.weight": "mlp.gate_proj.weight",
        "mlp.gate.weight": "mlp.up_proj.weight",
        "mlp.proj.weight": "mlp.down_proj.weight",
    }
    for i in range(layers):
        ours |= {f"layers.{i}.{mine}": hf[f"model.layers.{i}.{theirs}"] for mine, theirs in names.items()}
        for kind in ("weight", "bias"):
            parts = [hf[f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            ours[f"layers.{i}.attention.qkv.{kind}"] = torch.cat(parts)
    return ours


def rejoin(name: str, ranks: list[torch.Tensor], config: QWenConfig) -> torch.Tensor:
    """The whole parameter from its shares, by the layout that the model's layers expect of each rank."""
    if name.endswith(("dense.weight", "proj.weight")):
        return torch.cat(ranks, dim=1)
    if name.endswith(("fc.weight", "gate.weight", "lm_head.weight")):
        return torch.cat(ranks)
    if ".qkv." in name:
        tp_size, size = len(ranks), config.head_size
        q_rows = config.num_attention_heads // tp_size * size
        q = [share[:q_rows] for share in ranks]
        k, v = zip(*(share[q_rows:].chunk(2) for share in ranks), strict=True)
        copies = max(tp_size // config.num_key_value_heads, 1)
        for rank in range(tp_size):
            assert torch.equal(k[rank], k[rank // copies * copies]) and torch.equal(v[rank], v[rank // copies * copies])
        return torch.cat([*q, *k[::copies], *v[::copies]])
    assert all(torch.equal(ranks[0], share) for share in ranks)
    return ranks[0]


def test_every_parameter_gets_its_tensor(checkpoint: Path) -> None:
    expected, found = expected_parameters(checkpoint), loaded(checkpoint)
    if QWenConfig.from_hf_dir(checkpoint).tie_word_embeddings:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_ranks_together_hold_the_model_bit_for_bit(checkpoint: Path, tp_size: int) -> None:
    config, expected = QWenConfig.from_hf_dir(checkpoint), expected_parameters(checkpoint)
    ranks = [loaded(checkpoint, tp_size, rank) for rank in range(tp_size)]
    for name in ranks[0]:
        whole = rejoin(name, [share[name] for share in ranks], config)
        rows = expected[name].shape[0]
        assert torch.equal(whole[:rows], expected[name]), name
        assert torch.equal(whole[rows:], torch.zeros_like(whole[rows:])), name


def test_lm_head_rows_are_padded_with_zeros_to_a_multiple_of_the_ranks(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path, vocab=97)
    last = loaded(tmp_path, tp_size=4, rank=3)["lm_head.weight"]
    assert last.shape[0] == 25 and torch.equal(last[22:], torch.zeros(3, 32)) and last[:22].any(dim=1).all()


def test_a_rank_may_hold_padding_alone(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path, vocab=9)
    assert torch.equal(loaded(tmp_path, tp_size=4, rank=3)["lm_head.weight"], torch.zeros(3, 32))


def test_a_checkpoint_saved_by_transformers_is_read(tmp_path: Path) -> None:
    theirs = Qwen2ForCausalLM.from_pretrained(write_qwen2_checkpoint(tmp_path / "one", tie=True))
    theirs.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("model-*.safetensors"))) > 1
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of elements of every read from now on."""
    elements: list[int] = []
    real = HfCheckpoint._read

    def read(self: HfCheckpoint, name: str, index: Any) -> torch.Tensor:
        tensor = real(self, name, index)
        elements.append(tensor.numel())
        return tensor

    monkeypatch.setattr(HfCheckpoint, "_read", read)
    return elements


def test_nothing_is_read_before_a_parameter_is_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = watch_reads(monkeypatch)
    parameters = dict(model_of(checkpoint).named_parameters())
    assert not read
    parameters["ln_f.weight"].load()
    assert len(read) == 1


def test_a_rank_reads_no_more_than_its_share(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = watch_reads(monkeypatch)
    shares = loaded(checkpoint, tp_size=4, rank=1)
    assert sum(read) == sum(share.numel() for share in shares.values())


# ---- the proof of completeness ----


def rewrite(path: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    write_tensors(path, tensors, "safetensors", 1)


def drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def check(path: Path) -> None:
    check_complete(HfCheckpoint(path), QWenConfig.from_hf_dir(path))


def test_missing_left_over_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path)

    def damage(tensors: Tensors) -> None:
        del tensors["transformer.h.1.mlp.w2.weight"]
        tensors["transformer.h.2.ln_1.weight"] = torch.ones(32)
        tensors["lm_head.weight"] = torch.ones(97, 31)
        tensors["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.float64)

    rewrite(tmp_path, damage)
    with pytest.raises(ValueError) as caught:
        check(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the tensors are not those of a QWenLMHeadModel with this config.json: "
        "1 missing: transformer.h.1.mlp.w2.weight [48, 32]; "
        "1 left over: transformer.h.2.ln_1.weight [32]; "
        "1 of wrong shape: lm_head.weight is [97, 31], expected [97, 32]; "
        "1 of wrong dtype: transformer.ln_f.weight is float64, expected float32 or float16 or bfloat16"
    )


def test_a_long_list_is_cut_with_a_count(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path, layers=4)
    rewrite(tmp_path, drop(*(f"transformer.h.{i}.attn.{name}" for i in range(4) for name in ATTENTION)))
    with pytest.raises(ValueError, match=r"12 missing: transformer.h.0.attn.c_attn.weight \[96, 32\], .* and 4 more$"):
        check(tmp_path)


def test_a_damaged_checkpoint_leaves_the_model_without_weights(tmp_path: Path) -> None:
    write_qwen2_checkpoint(tmp_path)
    rewrite(tmp_path, drop("model.norm.weight"))
    config = QWenConfig.from_hf_dir(tmp_path)
    model = QWenForCausalLM(config, "float32")
    with pytest.raises(ValueError, match="1 missing: model.norm.weight"):
        load_from_hf_qwen(model, tmp_path, config)
    with pytest.raises(ValueError, match="no data"):
        next(model.named_parameters())[1].load()


def test_tensors_known_to_be_harmless_are_ignored_with_their_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_qwen1_checkpoint(tmp_path)
    extra = {"transformer.rotary_emb.inv_freq": torch.ones(4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.INFO):
        check(tmp_path)
    assert "RoPE frequencies follow from the config: transformer.rotary_emb.inv_freq" in caplog.text


def test_a_copy_of_the_tied_embedding_is_harmless(tmp_path: Path) -> None:
    write_qwen2_checkpoint(tmp_path, tie=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    check(tmp_path)


def test_a_tied_lm_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    write_qwen2_checkpoint(tmp_path, tie=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight, expected a copy"):
        check(tmp_path)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    write_qwen2_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(ValueError, match=r"6 of wrong shape: .*gate_proj.weight is \[48, 32\], expected \[50, 32\]"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 4, "num_kv_heads": 4}, "num_attention_heads: 4 to split, expected a multiple of tp_size 3"),
        ({"heads": 6, "num_kv_heads": 2}, "num_key_value_heads is 2: neither it nor tp_size 3 divides the other"),
        (
            {"heads": 6, "num_kv_heads": 3, "mlp_width": 50},
            "gate_proj.weight: 50 to split, expected a multiple of tp_size 3",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(tmp_path: Path, sizes: dict[str, Any], message: str) -> None:
    config = QWenConfig.from_hf_dir(write_qwen2_checkpoint(tmp_path, hidden=48, **sizes))
    with pytest.raises(ValueError, match=message):
        for split, sources in origins_of(config).values():
            split(sources, config, Mapping(world_size=3, rank=0, tp_size=3))


def test_a_model_made_for_other_ranks_is_refused(tmp_path: Path) -> None:
    write_qwen1_checkpoint(tmp_path)
    config = QWenConfig.from_hf_dir(tmp_path)
    model = QWenForCausalLM(config, "float32")
    with pytest.raises(ValueError, match="rank 1 of 2 has .*, but the model was made for"):
        load_from_hf_qwen(model, tmp_path, config, Mapping(world_size=2, rank=1, tp_size=2))
