"""AWQ state dicts of ammo: rounded as the original rounded them, one scale of inputs for q, k and v."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.quantized_checkpoint import open_quantized_checkpoint
from checkpoints import write_qwen1_checkpoint
from quantized_folders import Tensors, linears_of, write_ammo, write_dequantized
from quantized_models import (
    SHAPE,
    TOLERANCES,
    assert_same_logits,
    config_of,
    engine_of,
    rejoined,
    weights_of,
    write_plain,
)

from tensorrt_llm.quantization.layers import WeightOnlyLayout


@pytest.fixture(scope="module", params=["qwen1", "qwen2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"), request.param)


def effective(tensors: Tensors, name: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer of an ammo state dict multiplies with, and its pre_quant_scale, by the rule of the original."""
    amax = tensors[f"{name}.weight_quantizer._amax"].float()
    scale = amax.reshape(tensors[f"{name}.weight"].shape[0], -1).repeat_interleave(group_size, dim=1) / 8
    integers = torch.clamp(torch.round(tensors[f"{name}.weight"].float() / scale), -8, 7)
    return integers * scale, tensors[f"{name}.input_quantizer._pre_quant_scale"].float()


def requantized(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 8
    return (torch.clamp(torch.round(groups / scale), -8, 7) * scale).flatten(1)


def dequantized_ammo(tensors: Tensors, names: list[str], group_size: int) -> Tensors:
    """The weights that act on unscaled inputs; q, k and v of Qwen2 go through the mean of their scales."""
    weights = {}
    for name in names:
        weight, scale = effective(tensors, name, group_size)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            parent = name.rpartition(".")[0]
            mean = torch.stack([effective(tensors, f"{parent}.{x}_proj", group_size)[1] for x in "qkv"]).mean(0)
            weight = requantized(tensors[f"{name}.weight"].float() * (scale / mean), group_size)
            scale = mean
        weights[name] = weight * scale
    return weights


def test_an_ammo_state_dict_is_rounded_as_the_original_did(plain: Path, tmp_path: Path) -> None:
    tensors = write_ammo(plain, tmp_path / "awq.pt", 16)
    checkpoint = open_quantized_checkpoint(tmp_path / "awq.pt")
    assert checkpoint.quant_algo == "W4A16_AWQ"
    assert checkpoint.layout == WeightOnlyLayout(4, 16, pre_quant_scale=True)
    for name, linear in checkpoint.linears.items():
        if not name.endswith(("q_proj", "k_proj", "v_proj")):
            weight, scale = effective(tensors, name, 16)
            assert torch.equal(checkpoint.read_rows(name, 0, linear.shape[0]).dequantize(), weight)
            assert linear.pre_quant_scale is not None and torch.equal(linear.pre_quant_scale, scale)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_logits_of_an_ammo_state_dict_are_those_of_the_dequantized_model(
    plain: Path, tmp_path: Path, dtype: str
) -> None:
    tensors = write_ammo(plain, tmp_path / "awq.pt", 16)
    weights = dequantized_ammo(tensors, linears_of(tensors), 16)
    expected = write_dequantized(plain, tmp_path / "dequantized", weights)
    assert_same_logits(engine_of(tmp_path / "awq.pt", plain, dtype), expected, dtype)


def test_an_ammo_lm_head_is_quantized_too(tmp_path: Path) -> None:
    plain = write_qwen1_checkpoint(tmp_path / "plain", layers=1, seq_length=256, **SHAPE)
    tensors = write_ammo(plain, tmp_path / "awq.pt", 16, also=("lm_head",))
    assert open_quantized_checkpoint(tmp_path / "awq.pt").quantizes_lm_head
    weights = dequantized_ammo(tensors, [*linears_of(tensors), "lm_head"], 16)
    expected = write_dequantized(plain, tmp_path / "dequantized", weights)
    assert_same_logits(engine_of(tmp_path / "awq.pt", plain), expected, "float32")


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_hold_their_part_of_pre_quant_scales(plain: Path, tmp_path: Path, tp_size: int) -> None:
    write_ammo(plain, tmp_path / "awq.pt", 32)
    (whole,), ranks = weights_of(tmp_path / "awq.pt", plain), weights_of(tmp_path / "awq.pt", plain, tp_size)
    config = config_of(plain)
    for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
        path = f"layers.0.{name}"
        scales = [rank[f"{path}.pre_quant_scale"] for rank in ranks]
        joined = torch.cat(scales) if name.endswith(("dense", "proj")) else scales[-1]
        assert torch.equal(joined, whole[f"{path}.pre_quant_scale"]), path
        assert torch.equal(rejoined(path, ranks, config, 4), rejoined(path, [whole], config, 4)), path


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("weight_quantizer._amax", lambda amax: amax[:-1], "expected a float per group of each of 64 rows"),
        (
            "weight_quantizer._amax",
            lambda amax: amax * 0,
            "_amax: the quantization scale of output 0 and group 0 is 0.0",
        ),
        ("input_quantizer._pre_quant_scale", lambda scale: scale[1:], "has 63 elements, expected 64"),
        ("input_quantizer._pre_quant_scale", lambda scale: scale * 0, "holds zero, NaN or infinite values"),
        ("weight", lambda weight: weight * float("inf"), "_proj.weight: the data holds NaN or infinite values"),
    ],
)
def test_a_damaged_ammo_state_dict_is_refused_by_name(
    plain: Path, tmp_path: Path, kind: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    tensors = write_ammo(plain, tmp_path / "awq.pt", 16)
    name = next(name for name in tensors if name.endswith((f"o_proj.{kind}", f"attn.c_proj.{kind}")))
    torch.save(tensors | {name: change(tensors[name])}, tmp_path / "awq.pt")
    with pytest.raises(ValueError, match=message):
        weights_of(tmp_path / "awq.pt", plain)
