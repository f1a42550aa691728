"""From an FT folder to an engine: as from the checkpoint, split over ranks without loss, refused when wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_qwen_convert
import numpy as np
import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from command_line import parse
from compiling.compile_model import compile_model
from ft.folder import FtFolder
from ft.weight import load_from_ft
from hf_model import load_hf_model
from hf_qwen_convert import ConvertArgs
from models_for_tests import LIMITS, random_prompts
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.walk import walk

CPU = torch.device("cpu")
Loaded = dict[str, torch.Tensor]

WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen1": lambda path: write_qwen1_checkpoint(path, dtype=torch.float16),
    "qwen2-2-kv-heads": lambda path: write_qwen2_checkpoint(path, num_kv_heads=2, dtype=torch.float16),
    "qwen2-1-kv-head-tied": lambda path: write_qwen2_checkpoint(path, num_kv_heads=1, tie=True, dtype=torch.float16),
}
UNSMOOTHED_MODES = {
    "float16": (QuantMode(0), {}),
    "int8": (QuantMode.use_weight_only(), {"quantize_lm_head": True}),
    "int4": (QuantMode.use_weight_only(use_int4_weights=True), {}),
    "int4-g16": (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), {"group_size": 16}),
}
SMOOTHED_MODES = {
    f"{'per-token' if per_token else 'static'}-{'per-channel' if per_channel else 'per-tensor'}": (
        QuantMode.use_smooth_quant(per_token, per_channel)
    )
    for per_token in (False, True)
    for per_channel in (False, True)
}


@pytest.fixture(params=WRITERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "hf")


@pytest.fixture
def qwen1(tmp_path: Path) -> Path:
    return WRITERS["qwen1"](tmp_path / "hf")


def convert(checkpoint: Path, *flags: object) -> Path:
    """The folder above <tp>-gpu."""
    root = checkpoint.parent / "ft"
    ids = checkpoint.parent / "ids.npy"
    np.save(ids, np.array(random_prompts([24] * 4, 97)))
    text = ("--calibration_text", ids) if {"-sq", "-kv"} & set(flags) else ()
    argv = ("-i", checkpoint, "-o", root, *text, *flags)
    hf_qwen_convert.main(parse(ConvertArgs, None, list(map(str, argv))))
    return root


def make_model(
    checkpoint: Path, mode: QuantMode, dtype: str = "float16", mapping: Mapping | None = None, **layout: Any
) -> QWenForCausalLM:
    model = QWenForCausalLM(QWenConfig.from_hf_dir(checkpoint), dtype, mapping or Mapping())
    quantize_model(model, mode, **layout)
    return model


def from_hf(checkpoint: Path, mode: QuantMode, mapping: Mapping | None = None, **layout: Any) -> QWenForCausalLM:
    model = make_model(checkpoint, mode, mapping=mapping, **layout)
    load_from_hf_qwen(model, checkpoint, model.config, mapping)
    return model


def from_ft(
    checkpoint: Path,
    folder: Path | FtFolder,
    mode: QuantMode,
    dtype: str = "float16",
    mapping: Mapping | None = None,
    **layout: Any,
) -> QWenForCausalLM:
    model = make_model(checkpoint, mode, dtype, mapping, **layout)
    load_from_ft(model, folder, model.config, mapping)
    return model


def ranks_of(tp_size: int) -> Iterator[Mapping]:
    return (Mapping(world_size=tp_size, rank=rank, tp_size=tp_size) for rank in range(tp_size))


def loaded(model: QWenForCausalLM) -> Loaded:
    for name, parameter in model.named_parameters():
        parameter.name = name  # errors name it
    return {name: parameter.load() for name, parameter in model.named_parameters()}


def assert_equal(found: Loaded, expected: Loaded) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits_of(engine: Engine, texts: list[list[int]]) -> torch.Tensor:
    name = engine.plan.outputs["logits"]
    for visit in walk(engine, texts, CPU, logits_of=len(texts)):
        if any(spec.name == name for spec in visit.node.outputs):
            return visit.results[0]
    raise AssertionError("no logits")


# The same engine as from the checkpoint


@pytest.mark.parametrize("kind", UNSMOOTHED_MODES)
@pytest.mark.parametrize("flags", [(), ("-sq", 0.5, "--keep_unquantized")], ids=["plain", "smoothed"])
def test_an_engine_from_the_folder_is_that_from_the_checkpoint(
    checkpoint: Path, kind: str, flags: tuple[object, ...]
) -> None:
    mode, layout = UNSMOOTHED_MODES[kind]
    expected = compile_model(from_hf(checkpoint, mode, **layout), LIMITS)
    found = compile_model(from_ft(checkpoint, convert(checkpoint, *flags), mode, **layout), LIMITS)
    assert found.plan == expected.plan
    assert_equal(dict(found.weights), dict(expected.weights))
    texts = random_prompts([5, 9], 97, seed=1)
    assert torch.equal(logits_of(found, texts), logits_of(expected, texts))


@pytest.mark.parametrize("kind", UNSMOOTHED_MODES)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_rank_has_what_it_has_from_the_checkpoint(checkpoint: Path, kind: str, tp_size: int) -> None:
    mode, layout = UNSMOOTHED_MODES[kind]
    if layout.get("group_size"):
        layout = {"group_size": 4}  # a rank has 24 or 12 columns of proj
    root = convert(checkpoint, "-tp", tp_size)
    for mapping in ranks_of(tp_size):
        expected = from_hf(checkpoint, mode, mapping, **layout)
        assert_equal(loaded(from_ft(checkpoint, root, mode, mapping=mapping, **layout)), loaded(expected))


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_folder_of_a_wider_dtype_loses_nothing(tmp_path: Path, storage: str) -> None:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[storage]
    checkpoint = write_qwen1_checkpoint(tmp_path / "hf", dtype=dtype)
    expected = from_hf(checkpoint, QuantMode(0))
    assert_equal(loaded(from_ft(checkpoint, convert(checkpoint, "-t", storage), QuantMode(0))), loaded(expected))


# SmoothQuant, against a model in float32 whose layers round as the folder's files say


class RoundedLinear(torch.nn.Module):
    """y = (round(x / s / scale) * scale) (w_int8 * w_scale)^T + b, in float32."""

    def __init__(
        self,
        factors: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        x_scale: float | None,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.factors, self.weight, self.x_scale, self.bias = factors, weight * scale[:, None], x_scale, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / self.factors
        scale = x.abs().amax(-1, keepdim=True) / 127 if self.x_scale is None else torch.tensor(self.x_scale)
        y = (x / scale).round().clamp(-127, 127) * scale @ self.weight.T
        return y if self.bias is None else y + self.bias


def rounded_model(checkpoint: Path, folder: Path, mode: QuantMode) -> torch.nn.Module:
    """The transformers model in float32 with the files of a 1-gpu folder in place of its linear layers."""
    network = load_hf_model(checkpoint, "float32", "cpu")
    config = QWenConfig.from_hf_dir(checkpoint)
    q, kv = (heads * config.head_size for heads in (config.num_attention_heads, config.num_key_value_heads))
    if config.architecture == "QWenLMHeadModel":
        norms = ("ln_1", "ln_2")
        members = ("attention.qkv", "attention.dense", "mlp.w1", "mlp.w2", "mlp.c_proj")
    else:
        norms = ("input_layernorm", "post_attention_layernorm")
        members = ("self_attn.qkv", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")

    def read(layer: int, name: str, dtype: type = np.float32) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(folder / f"model.layers.{layer}.{name}", dtype).astype(np.float32))

    kind = ".col" if mode.has_per_channel_scaling() else ""
    for index, layer in enumerate(network.model.layers):
        factors = [
            norm.weight.detach() / read(index, f"{name}.weight.bin", np.float16)
            for norm, name in zip((layer.input_layernorm, layer.post_attention_layernorm), norms, strict=True)
        ]
        for member in members:
            is_row = member in (members[1], members[4])
            rank = "" if is_row or not kind else ".0"
            if is_row:
                factor = read(index, f"{member}.smoother.0.bin")
            else:
                factor = factors[0] if member == members[0] else factors[1]
            weight = read(index, f"{member}.weight.int8{kind}.0.bin", np.int8).view(len(factor), -1).T
            scale = read(index, f"{member}.scale_w_quant_orig{kind}{rank}.bin").expand(len(weight))
            x_scale = None
            if not mode.has_per_token_dynamic_scaling():
                x_scale = 1 / read(index, f"{member}.scale_x_orig_quant.bin").item()
            if member == members[0]:
                parts = zip("qkv", weight.split([q, kv, kv]), scale.split([q, kv, kv]), strict=True)
                for letter, rows, scales in parts:
                    old = getattr(layer.self_attn, f"{letter}_proj")
                    setattr(
                        layer.self_attn,
                        f"{letter}_proj",
                        RoundedLinear(factor, rows, scales, x_scale, old.bias.detach()),
                    )
            else:
                name = dict(zip(members, ("", "o_proj", "up_proj", "gate_proj", "down_proj"), strict=True))[member]
                parent = layer.self_attn if name == "o_proj" else layer.mlp
                setattr(parent, name, RoundedLinear(factor, weight, scale, x_scale, None))
    return network


@pytest.mark.parametrize("kind", SMOOTHED_MODES)
def test_a_smoothed_engine_is_the_rounded_model(checkpoint: Path, kind: str) -> None:
    mode = SMOOTHED_MODES[kind]
    root = convert(checkpoint, "-sq", 0.5)
    texts = random_prompts([7, 12, 20], 97, seed=1)
    found = logits_of(compile_model(from_ft(checkpoint, root, mode, dtype="float32"), LIMITS), texts)
    with torch.no_grad():
        network = rounded_model(checkpoint, root / "1-gpu", mode)
        expected = torch.cat([network(torch.tensor([text])).logits[0] for text in texts])
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    # Both compute in float32, so most tokens agree to its precision. Now and then the last bit puts a value on the
    # other side of a rounding: it moves by one of 127 steps, and its token by less than a hundredth.
    assert errors.quantile(0.25) < 1e-5 and errors.max() < 0.01


@pytest.mark.parametrize("kind", SMOOTHED_MODES)
def test_a_smoothed_engine_is_near_the_unquantized_one(checkpoint: Path, kind: str) -> None:
    root = convert(checkpoint, "-sq", 0.5)
    texts = random_prompts([24], 97)  # the first text of the calibration
    found = logits_of(compile_model(from_ft(checkpoint, root, SMOOTHED_MODES[kind]), LIMITS), texts)
    expected = logits_of(compile_model(from_hf(checkpoint, QuantMode(0)), LIMITS), texts)
    assert (found - expected).norm() / expected.norm() < 0.05


def rejoined(ranks: list[Loaded], config: QWenConfig) -> Loaded:
    """The whole model's parameters from those of its ranks."""
    tp_size, size = len(ranks), config.head_size
    copies = max(tp_size // config.num_key_value_heads, 1)
    q_rows = config.num_attention_heads // tp_size * size
    whole = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if ".qkv." in name:
            q = [part[:q_rows] for part in parts]
            k, v = zip(*(part[q_rows:].chunk(2) for part in parts), strict=True)
            whole[name] = torch.cat([*q, *k[::copies], *v[::copies]])
        elif name.endswith(("dense.weight", "proj.weight")):
            whole[name] = torch.cat(parts, dim=1)
        elif ".fc." in name or ".gate." in name or name.endswith("smoother") or name == "lm_head.weight":
            whole[name] = torch.cat(parts)[: config.vocab_size] if name == "lm_head.weight" else torch.cat(parts)
        else:
            assert all(torch.equal(part, first) for part in parts), name
            whole[name] = first
    return whole


@pytest.mark.parametrize("kind", SMOOTHED_MODES)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_smoothed_ranks_together_hold_the_model_of_one_rank_bit_for_bit(
    checkpoint: Path, kind: str, tp_size: int
) -> None:
    mode = SMOOTHED_MODES[kind]
    expected = loaded(from_ft(checkpoint, convert(checkpoint, "-sq", 0.5), mode))
    root = convert(checkpoint, "-sq", 0.5, "-tp", tp_size)
    ranks = [loaded(from_ft(checkpoint, root, mode, mapping=mapping)) for mapping in ranks_of(tp_size)]
    found = rejoined(ranks, QWenConfig.from_hf_dir(checkpoint))
    found.pop("lm_head.weight" if "lm_head.weight" not in expected else "", None)  # tied: its own on several ranks only
    assert_equal(found, expected)


@pytest.mark.parametrize("flags", [(), ("-sq", 0.5)], ids=["plain", "smoothed"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_whole_model_is_loaded_from_a_folder_of_many_ranks(
    checkpoint: Path, tp_size: int, flags: tuple[object, ...]
) -> None:
    """What the verdict on the engines of several ranks is measured on."""
    mode = QuantMode.use_smooth_quant(per_channel=True) if flags else QuantMode.use_weight_only()
    expected = loaded(from_ft(checkpoint, convert(checkpoint, *flags), mode))
    folder = FtFolder.open(convert(checkpoint, *flags, "-tp", tp_size), tp_size)
    assert_equal(loaded(from_ft(checkpoint, folder, mode)), expected)


# The folder


def test_a_folder_says_how_it_was_converted(qwen1: Path) -> None:
    plain = FtFolder.open(convert(qwen1, "-t", "float32"), 1)
    assert (plain.smoothquant, plain.has_unquantized, plain.has_kv_scale) == (None, True, False)
    assert (plain.storage_dtype, plain.calibration_ids, plain.config) == (
        "float32",
        None,
        QWenConfig.from_hf_dir(qwen1),
    )
    smoothed = FtFolder.open(convert(qwen1, "-sq", "auto", "-kv") / "1-gpu", 1)
    assert (smoothed.smoothquant, smoothed.has_unquantized, smoothed.has_kv_scale) == ("auto", False, True)
    ids = smoothed.calibration_ids
    assert ids is not None and np.load(ids).dtype == np.int32
    np.testing.assert_array_equal(np.sort(np.load(ids), 0), np.sort(np.array(random_prompts([24] * 4, 97)), 0))


def test_nothing_is_read_before_a_parameter_is_loaded(qwen1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = convert(qwen1)
    read: list[str] = []
    real = np.memmap

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(np, "memmap", watched)
    parameters = dict(from_ft(qwen1, root, QuantMode(0)).named_parameters())
    assert not read
    parameters["layers.1.mlp.fc.weight"].load()
    assert read == ["model.layers.1.mlp.w2.weight.0.bin"]


def test_a_folder_of_the_original_converter_is_not_taken_for_unquantized(qwen1: Path) -> None:
    """Its storage-dtype weights are smoothed ones, and it does not say --keep_unquantized."""
    ini = convert(qwen1, "-sq", 0.5, "--keep_unquantized") / "1-gpu/config.ini"
    ini.write_text("".join(line for line in ini.read_text().splitlines(True) if "keep_unquantized" not in line))
    assert not FtFolder.open(ini.parent, 1).has_unquantized


# Bad input


def edit_ini(root: Path, old: str, new: str) -> None:
    ini = root / "1-gpu/config.ini"
    text = ini.read_text()
    assert old in text
    ini.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[qwen]", "[gpt]", r"config.ini: has the sections \['gpt'\], expected \[qwen\]"),
        ("[qwen]", "qwen", "config.ini: not a readable ini file"),
        ("storage_dtype = float16\n", "", "config.ini: has no key storage_dtype"),
        ("storage_dtype = float16", "storage_dtype = int3", "config.ini: storage_dtype is 'int3', expected one of"),
        ("tensor_parallelism = 1\n", "", "config.ini: has no key tensor_parallelism"),
        ("tensor_parallelism = 1", "tensor_parallelism = 8", "tensor_parallelism is 8, expected 1"),
        ("smoothquant = None\n", "", "config.ini: has no key smoothquant"),
        ("vocab_size = 97\n", "", r"config.ini: vocab_size .* is missing"),
        ("vocab_size = 97", "vocab_size = 98", "config.ini: vocab_size is 98, expected 97 as the Hugging Face"),
        ("num_hidden_layers = 2", "num_hidden_layers = 3", "config.ini: num_hidden_layers is 3, expected 2"),
        ("intermediate_size = 96", "intermediate_size = 98", "config.ini: mlp_hidden_size is 49, expected 48"),
        ("rotary_emb_base = 10000.0", "rotary_emb_base = 5e5", "config.ini: rotary_base is 500000.0, expected 10000.0"),
        ("vocab_size = 97", "vocab_size = " + "(" * 10000, "config.ini: vocab_size is .*, expected an integer"),
    ],
)
def test_a_config_that_is_not_of_this_model_is_refused(qwen1: Path, old: str, new: str, message: str) -> None:
    root = convert(qwen1)
    edit_ini(root, old, new)
    with pytest.raises(ValueError, match=message):
        from_ft(qwen1, root, QuantMode(0))


def test_a_folder_without_config_or_of_other_ranks_is_refused(qwen1: Path) -> None:
    root = convert(qwen1)
    rank = Mapping(world_size=2, rank=0, tp_size=2)
    with pytest.raises(ValueError, match=r"2-gpu: no such folder, .*--tensor-parallelism 2 writes; .*has 1-gpu"):
        from_ft(qwen1, root, QuantMode(0), mapping=rank)
    with pytest.raises(ValueError, match="tensor_parallelism is 1, expected 2"):
        from_ft(qwen1, root / "1-gpu", QuantMode(0), mapping=rank)
    (root / "1-gpu/config.ini").unlink()
    with pytest.raises(ValueError, match="config.ini: cannot be read"):
        from_ft(qwen1, root, QuantMode(0))


def test_a_folder_for_another_mode_is_refused_with_the_flag_that_helps(qwen1: Path) -> None:
    with pytest.raises(ValueError, match="was converted without --smoothquant"):
        from_ft(qwen1, convert(qwen1), QuantMode.use_smooth_quant())
    root = convert(qwen1, "-sq", 0.5)
    for mode in (QuantMode(0), QuantMode.use_weight_only()):
        with pytest.raises(ValueError, match=r"for SmoothQuant \(--smoothquant 0.5\) .*--keep_unquantized"):
            from_ft(qwen1, root, mode)


def test_missing_and_truncated_files_are_one_error(qwen1: Path) -> None:
    root = convert(qwen1)
    for layer in range(2):
        (root / f"1-gpu/model.layers.{layer}.mlp.w1.weight.0.bin").unlink()
    bias = root / "1-gpu/model.layers.0.attention.qkv.bias.0.bin"
    bias.write_bytes(bias.read_bytes()[:-2])
    with pytest.raises(ValueError) as caught:
        from_ft(qwen1, root, QuantMode(0))
    assert str(caught.value) == (
        f"{root / '1-gpu'}: 2 missing: model.layers.0.mlp.w1.weight.0.bin, model.layers.1.mlp.w1.weight.0.bin; "
        "1 of wrong size: model.layers.0.attention.qkv.bias.0.bin has 190 bytes, expected 192 of float16 [96]; "
        "run hf_qwen_convert.py again"
    )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["attention.qkv.scale_x_orig_quant.bin", "mlp.c_proj.smoother.0.bin", "mlp.w2.scale_w_quant_orig.col.0.bin"]
)
def test_a_scale_that_cannot_be_one_is_named(qwen1: Path, name: str, value: float) -> None:
    root = convert(qwen1, "-sq", 0.5)
    file = root / "1-gpu" / f"model.layers.1.{name}"
    scales = np.fromfile(file, np.float32)
    scales[0] = value
    scales.tofile(file)
    with pytest.raises(ValueError, match=rf"layers\.1\.{name}: holds {value}, expected finite scales above zero"):
        loaded(from_ft(qwen1, root, QuantMode.use_smooth_quant(per_channel=True)))


def test_weights_that_are_not_finite_are_named(qwen1: Path) -> None:
    root = convert(qwen1)
    file = root / "1-gpu/model.layers.1.ln_2.weight.bin"
    np.full(32, np.nan, np.float16).tofile(file)
    with pytest.raises(ValueError, match=r"layers\.1\.ln_2\.weight: the data holds NaN"):
        loaded(from_ft(qwen1, root, QuantMode(0)))
