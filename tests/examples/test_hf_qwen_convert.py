"""hf_qwen_convert.py as a user runs it: the files of spec 1.3 byte by byte, and one line for whatever is wrong."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hf_qwen_convert
import numpy as np
import pytest
import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from command_line import run_script
from ft.folder import FtFolder
from hf_model import load_hf_model
from hf_qwen_convert import ConvertArgs
from safetensors.torch import load_file, save_file
from texts.calibration_text import BUNDLED_TEXT
from token_files import read_token_ids

from tensorrt_llm.tokenizer import load_tokenizer

BUNDLED_CHECKPOINT = Path(hf_qwen_convert.__file__).parent / "tiny_qwen_chat"
EVALUATION_TEXT = BUNDLED_TEXT.with_name("summarize_test.jsonl.gz")

# The sizes of the checkpoints below.
HIDDEN, MLP, VOCAB, LAYERS, HEADS, HEAD = 32, 48, 97, 2, 4, 8
KV_HEADS = {"qwen": 4, "qwen2": 2}
NUMPY = {"float32": np.float32, "float16": np.float16, "int8": np.int8}

Convert = Callable[..., tuple[int, str, str]]
Listing = dict[str, tuple[tuple[int, ...], str]]  # file -> shape, dtype


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """hf_qwen_convert.py in this process, to tmp_path/ft: (exit code, stdout, stderr without the bar)."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, VOCAB, (4, 24)))

    def run(checkpoint: Path, *flags: object, output: Path = tmp_path / "ft") -> tuple[int, str, str]:
        calibrates = {"-sq", "--smoothquant", "-kv"} & set(flags) and "--calibration_text" not in flags
        text = ["--calibration_text", ids] if calibrates else []
        argv = ["hf_qwen_convert.py", "--in-file", checkpoint, "--out-dir", output, *text, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as caught:
            run_script(hf_qwen_convert.main, ConvertArgs, None)
        out, err = capsys.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith("convert:")]
        return int(caught.value.code or 0), out, "\n".join(lines)

    return run


def write_checkpoint(path: Path, model: str, dtype: torch.dtype = torch.float16) -> Path:
    if model == "qwen":
        return write_qwen1_checkpoint(path, dtype=dtype)
    return write_qwen2_checkpoint(path, num_kv_heads=KV_HEADS["qwen2"], dtype=dtype)


@pytest.fixture(params=["qwen", "qwen2"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checkpoint(tmp_path: Path, model: str) -> Path:
    return write_checkpoint(tmp_path / "hf", model)


# The list of spec 1.3, written down a second time


def global_files(model: str, storage: str) -> Listing:
    embedding, norm = ("vocab_embedding", "ln_f") if model == "qwen" else ("embed_tokens", "norm")
    return {
        f"{embedding}.weight.bin": ((VOCAB, HIDDEN), storage),
        f"{norm}.weight.bin": ((HIDDEN,), storage),
        "lm_head.weight.bin": ((VOCAB, HIDDEN), storage),
    }


def linears(model: str, tp: int) -> dict[str, tuple[int, int, bool]]:
    """Name in a layer -> (inputs and outputs of a rank, whether ranks share the outputs)."""
    q, kv = HEADS * HEAD, KV_HEADS[model] * HEAD
    if model == "qwen":
        names = ("attention.qkv", "attention.dense", "mlp.w1", "mlp.w2", "mlp.c_proj")
    else:
        names = ("self_attn.qkv", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    shapes = (
        (HIDDEN, (q + 2 * kv) // tp, True),
        (q // tp, HIDDEN, False),
        (HIDDEN, MLP // tp, True),
        (HIDDEN, MLP // tp, True),
        (MLP // tp, HIDDEN, False),
    )
    return dict(zip(names, shapes, strict=True))


def norms(model: str) -> tuple[str, str]:
    return ("ln_1", "ln_2") if model == "qwen" else ("input_layernorm", "post_attention_layernorm")


def plain_files(model: str, tp: int, storage: str) -> Listing:
    files = global_files(model, storage)
    for i in range(LAYERS):
        files |= {f"model.layers.{i}.{norm}.weight.bin": ((HIDDEN,), storage) for norm in norms(model)}
        for name, (rows, columns, _) in linears(model, tp).items():
            for r in range(tp):
                files[f"model.layers.{i}.{name}.weight.{r}.bin"] = ((rows, columns), storage)
                if name.endswith("qkv"):
                    files[f"model.layers.{i}.{name}.bias.{r}.bin"] = ((columns,), storage)
    return files


def smoothed_files(model: str, tp: int, storage: str) -> Listing:
    """Without the storage-dtype copies of what is int8."""
    files = {
        name: file
        for name, file in plain_files(model, tp, storage).items()
        if not (".weight." in name and name.split(".")[-2].isdigit())
    }
    for i in range(LAYERS):
        for name, (rows, columns, is_column) in linears(model, tp).items():
            base = f"model.layers.{i}.{name}"
            is_qkv = name.endswith("qkv")
            whole = (columns * tp,) if is_column else (columns,)
            files |= {
                f"{base}.scale_x_orig_quant.bin": ((1,), "float32"),
                f"{base}.scale_y_quant_orig.bin": ((1,), "float32"),
                f"{base}.scale_w_quant_orig.bin": (whole if is_qkv else (1,), "float32"),
                f"{base}.scale_y_accum_quant.bin": (whole if is_qkv else (1,), "float32"),
            }
            if not is_column:
                files |= {
                    f"{base}.scale_w_quant_orig.col.bin": (whole, "float32"),
                    f"{base}.scale_y_accum_quant.col.bin": (whole, "float32"),
                }
            for r in range(tp):
                files |= {
                    f"{base}.weight.int8.{r}.bin": ((rows, columns), "int8"),
                    f"{base}.weight.int8.col.{r}.bin": ((rows, columns), "int8"),
                }
                if is_column:
                    files |= {
                        f"{base}.scale_w_quant_orig.col.{r}.bin": ((columns,), "float32"),
                        f"{base}.scale_y_accum_quant.col.{r}.bin": ((columns,), "float32"),
                    }
                else:
                    files[f"{base}.smoother.{r}.bin"] = ((rows,), "float32")
    return files


def sizes(listing: Listing) -> dict[str, int]:
    return {name: int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize for name, (shape, dtype) in listing.items()}


def sizes_in(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.glob("*.bin")}


def arrays(folder: Path, listing: Listing) -> dict[str, np.ndarray]:
    """The files' content in float32 (integers as they are), in their shapes."""
    found = {}
    for name, (shape, dtype) in listing.items():
        array = np.fromfile(folder / name, NUMPY[dtype]).reshape(shape)
        found[name] = array.astype(np.float32) if dtype == "float16" else array
    return found


def hf_weights(checkpoint: Path, model: str) -> dict[str, np.ndarray]:
    """The checkpoint under the folder's names, as nn.Linear has it; Q, K and V joined."""
    source = HfCheckpoint(checkpoint)
    hf = {name: source.read(name).float().numpy() for name in source.tensors()}
    if model == "qwen":
        renamed = {"transformer.wte.weight": "vocab_embedding.weight", "transformer.ln_f.weight": "ln_f.weight"}
        found = {renamed.get(name, name): array for name, array in hf.items()}
        parts = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.dense", "transformer.h": "model.layers"}
        for hf_part, part in parts.items():
            found = {name.replace(hf_part, part): array for name, array in found.items()}
        return found
    found = {name.removeprefix("model.") if "layers" not in name else name: array for name, array in hf.items()}
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            parts_of_qkv = [hf[f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"model.layers.{i}.self_attn.qkv.{kind}"] = np.concatenate(parts_of_qkv)
    return found


def shard(array: np.ndarray, name: str, model: str, tp: int, r: int) -> np.ndarray:
    """A rank's part of a tensor as nn.Linear has it, by spec 2.3."""
    if name.endswith("qkv"):
        q, kv = HEADS * HEAD, KV_HEADS[model] * HEAD
        return np.concatenate([np.split(part, tp)[r] for part in np.split(array, [q, q + kv])])
    return np.split(array, tp, axis=0 if linears(model, tp)[name][2] else 1)[r]


# The plain folder


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_a_plain_folder_holds_the_checkpoint_byte_by_byte(
    convert: Convert, checkpoint: Path, model: str, tp: int, storage: str, tmp_path: Path
) -> None:
    code, out, err = convert(checkpoint, "-tp", tp, "-t", storage)
    folder = tmp_path / "ft" / f"{tp}-gpu"
    assert (code, err) == (0, "") and str(folder) in out
    listing = plain_files(model, tp, storage)
    assert sizes_in(folder) == sizes(listing)
    hf, found = hf_weights(checkpoint, model), arrays(folder, listing)
    for file, array in found.items():
        base, _, rest = file.removesuffix(".bin").partition(".weight") if ".weight" in file else file.partition(".bias")
        kind = "bias" if ".bias" in file else "weight"
        wanted = hf[f"{base}.{kind}"]
        if rest.lstrip("."):
            name = ".".join(base.split(".")[3:])
            wanted = shard(wanted, name, model, tp, int(rest.split(".")[1])).T
        np.testing.assert_array_equal(array, wanted, err_msg=file)


def test_bfloat16_is_stored_as_such(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_qwen1_checkpoint(tmp_path / "hf", dtype=torch.bfloat16)
    assert convert(checkpoint, "--storage-type", "bfloat16")[0] == 0
    stored = np.fromfile(tmp_path / "ft/1-gpu/ln_f.weight.bin", np.uint16)
    wanted = HfCheckpoint(checkpoint).read("transformer.ln_f.weight")
    np.testing.assert_array_equal(stored, wanted.view(torch.int16).numpy().view(np.uint16))


def test_a_tied_output_layer_has_no_file(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_qwen2_checkpoint(tmp_path / "hf", tie=True)
    assert convert(checkpoint)[0] == 0
    names = {file.name for file in (tmp_path / "ft/1-gpu").iterdir()}
    assert "embed_tokens.weight.bin" in names and "lm_head.weight.bin" not in names


def test_the_kv_scale_is_one_file_per_layer_more(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    assert convert(checkpoint, "-kv")[0] == 0
    scales = {f"model.layers.{i}.attention.qkv.scale_y_quant_orig.bin": ((1,), "float32") for i in range(LAYERS)}
    assert sizes_in(tmp_path / "ft/1-gpu") == sizes(plain_files("qwen", 1, "float16") | scales)
    ranges = hf_ranges(checkpoint, read_token_ids(tmp_path / "ids.npy", ()))
    for i in range(LAYERS):
        found = np.fromfile(tmp_path / f"ft/1-gpu/model.layers.{i}.attention.qkv.scale_y_quant_orig.bin", np.float32)
        wanted = max(ranges[f"model.layers.{i}.self_attn.{x}_proj"][1] for x in "qkv") / 127
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


# The SmoothQuant folder


def hf_ranges(checkpoint: Path, texts: list[list[int]]) -> dict[str, tuple[np.ndarray, float]]:
    """Of every nn.Linear of the transformers model: the largest magnitude of each input, and of any output."""
    ranges: dict[str, tuple[np.ndarray, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, y = inputs[0].abs().flatten(0, -2).amax(0).numpy(), output.abs().max().item()
            old_x, old_y = ranges.get(name, (x, y))
            ranges[name] = (np.maximum(x, old_x), max(y, old_y))

        return hook

    network = load_hf_model(checkpoint, "float32", "cpu")
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        for text in texts:
            network(torch.tensor([text]))
    return ranges


# Of each linear layer the transformers module that reads the same input (transformers runs Qwen-1 as Qwen2).
TRANSFORMERS = {
    "attention.qkv": "self_attn.q_proj",
    "attention.dense": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
    "self_attn.qkv": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_smoothed_folder_has_the_names_shapes_and_dtypes_of_the_spec(
    convert: Convert, checkpoint: Path, model: str, tp: int, tmp_path: Path
) -> None:
    assert convert(checkpoint, "-sq", 0.5, "-tp", tp)[0] == 0
    assert sizes_in(tmp_path / "ft" / f"{tp}-gpu") == sizes(smoothed_files(model, tp, "float16"))


def smoothing(
    found: dict[str, np.ndarray], hf: dict[str, np.ndarray], base: str, name: str, model: str, tp: int
) -> np.ndarray:
    """The factors of a layer's inputs, from its norm or its smoothers."""
    if not linears(model, tp)[name][2]:
        return np.concatenate([found[f"{base}.{name}.smoother.{r}.bin"] for r in range(tp)])
    norm = f"{base}.{norms(model)[0 if name.endswith('qkv') else 1]}.weight"
    return hf[norm] / found[f"{norm}.bin"]


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_smoothing_is_the_formula_on_what_the_transformers_model_shows(
    convert: Convert, checkpoint: Path, model: str, alpha: float, storage: str, tmp_path: Path
) -> None:
    assert convert(checkpoint, "-sq", alpha, "-t", storage)[0] == 0
    found = arrays(tmp_path / "ft/1-gpu", smoothed_files(model, 1, storage))
    hf, ranges = hf_weights(checkpoint, model), hf_ranges(checkpoint, read_token_ids(tmp_path / "ids.npy", ()))
    up, gate = [name for name in linears(model, 1) if name.startswith("mlp")][:2]
    for i in range(LAYERS):
        base = f"model.layers.{i}"
        for name in linears(model, 1):
            x, y = ranges[f"{base}.{TRANSFORMERS[name]}"]
            weights = [hf[f"{base}.{member}.weight"] for member in ((up, gate) if name in (up, gate) else (name,))]
            wanted = x**alpha / np.abs(np.concatenate(weights)).max(0) ** (1 - alpha)
            factors = smoothing(found, hf, base, name, model, 1)
            # The norm is rounded to the storage dtype, and its factor with it.
            np.testing.assert_allclose(factors, wanted, rtol=1e-3 if storage == "float16" else 1e-5)
            np.testing.assert_allclose(
                found[f"{base}.{name}.scale_x_orig_quant.bin"], 127 / (x / factors).max(), rtol=1e-5
            )
            if name.endswith("qkv"):
                y = max(ranges[f"{base}.self_attn.{part}_proj"][1] for part in "qkv")
            np.testing.assert_allclose(found[f"{base}.{name}.scale_y_quant_orig.bin"], y / 127, rtol=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_integers_and_scales_are_those_of_the_smoothed_weights_to_the_last_bit(
    convert: Convert, checkpoint: Path, model: str, tp: int, tmp_path: Path
) -> None:
    assert convert(checkpoint, "-sq", 0.5, "-tp", tp)[0] == 0
    found = arrays(tmp_path / "ft" / f"{tp}-gpu", smoothed_files(model, tp, "float16"))
    hf = hf_weights(checkpoint, model)
    q, kv = HEADS * HEAD, KV_HEADS[model] * HEAD
    for i in range(LAYERS):
        for name, (_, _, is_column) in linears(model, tp).items():
            base = f"model.layers.{i}"
            smooth = hf[f"{base}.{name}.weight"] * smoothing(found, hf, base, name, model, tp)
            base = f"{base}.{name}"
            per_channel = np.abs(smooth).max(1)
            blocks = [0, q, q + kv] if name.endswith("qkv") else [0]
            runs = np.diff([*blocks, len(smooth)])
            per_tensor = np.repeat(np.maximum.reduceat(per_channel, blocks), runs)
            accum = 1 / (found[f"{base}.scale_x_orig_quant.bin"] * found[f"{base}.scale_y_quant_orig.bin"])
            for kind, amax in (("", per_tensor), (".col", per_channel)):
                integers = np.rint(smooth * (np.float32(127) / amax)[:, None]).astype(np.int8)
                for r in range(tp):
                    np.testing.assert_array_equal(
                        found[f"{base}.weight.int8{kind}.{r}.bin"], shard(integers, name, model, tp, r).T
                    )
                scale = amax / np.float32(127)
                if is_column and kind:
                    scales = {r: shard(scale, name, model, tp, r) for r in range(tp)}
                    files = {f"col.{r}.bin": part for r, part in scales.items()}
                else:
                    files = {f"{kind[1:]}.bin".lstrip("."): scale if kind or name.endswith("qkv") else scale[:1]}
                for file, wanted in files.items():
                    np.testing.assert_array_equal(found[f"{base}.scale_w_quant_orig.{file}"], wanted)
                    np.testing.assert_allclose(found[f"{base}.scale_y_accum_quant.{file}"], wanted * accum, rtol=1e-6)


def test_unquantized_copies_are_those_of_the_checkpoint(convert: Convert, tmp_path: Path) -> None:
    """With their norms beside the smoothed ones, they are what a plain folder holds."""
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    assert convert(checkpoint, "-sq", 0.5, "--keep_unquantized")[0] == 0
    assert convert(checkpoint, output=tmp_path / "plain")[0] == 0
    for file in (tmp_path / "plain/1-gpu").glob("*.bin"):
        name = file.name.replace("ln_1.", "ln_1.unsmoothed.").replace("ln_2.", "ln_2.unsmoothed.")
        assert (tmp_path / "ft/1-gpu" / name).read_bytes() == file.read_bytes(), name


def test_columns_of_zeros_leave_everything_finite(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.h.0.ln_1.weight"][3] = 0  # nothing comes in
    for part in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
        tensors[f"transformer.h.1.{part}.weight"][:, 5] = 0  # nothing goes on
    tensors["transformer.h.0.mlp.c_proj.weight"][:] = 0
    save_file(tensors, checkpoint / "model.safetensors")
    assert convert(checkpoint, "-sq", "auto")[0] == 0
    for name, array in arrays(tmp_path / "ft/1-gpu", smoothed_files("qwen", 1, "float16")).items():
        assert np.isfinite(array).all(), name
        if "scale" in name or "smoother" in name:
            assert (array > 0).all(), name


def test_auto_chooses_an_alpha_for_every_group_of_every_layer(convert: Convert, tmp_path: Path) -> None:
    assert convert(write_checkpoint(tmp_path / "hf", "qwen"), "-sq", "auto")[0] == 0
    lines = (tmp_path / "ft/1-gpu/config.ini").read_text().splitlines()
    chosen = dict(line.split(" = ") for line in lines if line.startswith("smoothquant_alpha."))
    assert list(chosen) == [
        f"smoothquant_alpha.{x}" for x in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    ]
    for alphas in map(json.loads, chosen.values()):
        assert len(alphas) == LAYERS and all(0.3 <= alpha <= 0.9 for alpha in alphas)


def test_layers_converted_at_the_same_time_are_the_same(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    assert convert(checkpoint, "-sq", "auto")[0] == 0
    assert convert(checkpoint, "-sq", "auto", "-p", 2, output=tmp_path / "two")[0] == 0
    for file in (tmp_path / "ft/1-gpu").glob("*.bin"):
        assert (tmp_path / "two/1-gpu" / file.name).read_bytes() == file.read_bytes(), file.name


# What is read, and what is recorded


def test_calibration_reads_training_articles_and_no_evaluation_article(convert: Convert, tmp_path: Path) -> None:
    flags = ("--calibration_text", BUNDLED_TEXT, "--calibration_tokens", 1024)
    assert convert(BUNDLED_CHECKPOINT, "-kv", *flags)[0] == 0
    tokenizer = load_tokenizer(BUNDLED_CHECKPOINT)
    ids = FtFolder.open(tmp_path / "ft", 1).calibration_ids
    assert ids is not None
    texts = [tokenizer.decode(row) for row in read_token_ids(ids, ())]
    train, evaluation = (
        [row["article"].strip() for row in map(json.loads, gzip.open(file)) if "article" in row]
        for file in (BUNDLED_TEXT, EVALUATION_TEXT)
    )
    assert sum(len(row) for row in read_token_ids(ids, ())) == 1024
    assert any(article in text for article in train for text in texts)
    assert not any(article[:80] in text for article in evaluation for text in texts)


def test_config_ini_says_all_arguments_and_all_of_the_hf_config(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    assert convert(checkpoint, "-sq", 0.5, "-t", "float32")[0] == 0
    lines = (tmp_path / "ft/1-gpu/config.ini").read_text().splitlines()
    assert lines[0] == "[qwen]"
    settings = dict(line.split(" = ", 1) for line in lines[1:] if line)
    hf_config = json.loads((checkpoint / "config.json").read_text())
    assert settings.items() >= {key: str(value) for key, value in hf_config.items()}.items()
    assert (
        settings.items()
        >= {
            "out_dir": str(tmp_path / "ft"),
            "in_file": str(checkpoint),
            "tensor_parallelism": "1",
            "processes": "1",
            "calibrate_kv_cache": "False",
            "smoothquant": "0.5",
            "model": "qwen",
            "storage_type": "float32",
            "dataset_cache_dir": "None",
            "storage_dtype": "float32",
            "multi_query_mode": "False",
        }.items()
    )


# Bad input


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 1 and len(err.splitlines()) == 1 and err.startswith("hf_qwen_convert.py: error: "), err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "nan", "half"])
def test_an_alpha_outside_of_its_range_is_refused(convert: Convert, tmp_path: Path, alpha: str) -> None:
    result = convert(write_checkpoint(tmp_path / "hf", "qwen"), f"--smoothquant={alpha}")
    assert_refused(result, f"--smoothquant is '{alpha}'", "from 0 to 1, or auto")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "qwen2"), ("--model is qwen2", "QWenLMHeadModel")),
        (("-tp", 3), ("num_attention_heads: 4 to split", "tp_size 3")),
        (("-tp", 0), ("--tensor_parallelism is 0", "at least 1")),
        (("--keep_unquantized",), ("--keep_unquantized is given without --smoothquant",)),
        (("--calibration_text", "x.txt"), ("--calibration_text is given without",)),
        (("--dataset-cache-dir", "/tmp"), ("no dataset is downloaded", "--calibration_text FILE")),
        (("-kv", "--calibration_text", "missing.npy"), ("missing.npy: no such file",)),
        (("-kv", "--calibration_text", BUNDLED_TEXT), ("no tokenizer", "qwen.tiktoken")),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    convert: Convert, tmp_path: Path, flags: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_refused(convert(write_checkpoint(tmp_path / "hf", "qwen"), *flags), *words)
    assert not (tmp_path / "ft").exists()


def change(checkpoint: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, checkpoint / "model.safetensors")


def test_activations_that_overflow_float16_are_named(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen", torch.float32)
    change(checkpoint, "transformer.h.1.mlp.w1.weight", lambda weight: weight * 1e6)
    assert_refused(convert(checkpoint, "-sq", 0.5), "the output of layers.1.mlp.gate reaches", "float16", "bfloat16")
    assert not (tmp_path / "ft").exists()
    assert convert(checkpoint, "-sq", 0.5, "-t", "bfloat16")[0] == 0


def test_weights_that_overflow_float16_are_named(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen", torch.float32)
    change(checkpoint, "transformer.h.0.attn.c_attn.bias", lambda bias: bias + 1e6)
    result = convert(checkpoint)
    assert_refused(result, "model.layers.0.attention.qkv.bias.0.bin: holds 1e+06", "--storage-type bfloat16")


def test_a_full_disk_is_told_before_anything_is_written(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = convert(write_checkpoint(tmp_path / "hf", "qwen"))
    assert_refused(result, "the folder takes", "the disk has 0.00 GiB free")
    assert not (tmp_path / "ft").exists()


def test_a_folder_that_is_no_ft_folder_is_not_replaced(convert: Convert, tmp_path: Path) -> None:
    target = tmp_path / "ft/1-gpu"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    assert_refused(convert(write_checkpoint(tmp_path / "hf", "qwen")), str(target), "has no config.ini")
    assert (target / "notes.txt").read_text() == "mine"


def test_an_older_folder_is_replaced_whole(convert: Convert, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", "qwen")
    assert convert(checkpoint)[0] == 0 and convert(checkpoint, "-sq", 0.5)[0] == 0
    assert sizes_in(tmp_path / "ft/1-gpu") == sizes(smoothed_files("qwen", 1, "float16"))
    assert [path.name for path in (tmp_path / "ft").iterdir()] == ["1-gpu"]
