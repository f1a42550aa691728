"""What cannot be lowered, and what the backend needs and does not find, is one clear error before any work is done."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from checkpoints import write_qwen1_checkpoint
from compiling.compile_model import compile_model
from fake_tensorrt import make_tensorrt
from lowered_networks import ARCHITECTURES, LIMITS, set_weights

from tensorrt_llm import Engine
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.tensorrt_backend.lowering import lower

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
REFUSED: dict[str, tuple[QuantMode, dict[str, Any], tuple[str, ...]]] = {
    "int8-kv": (QuantMode.INT8_KV_CACHE, {}, ("gpt_attention", "KV cache is INT8")),
    "per-token": (QuantMode.use_smooth_quant(per_token=True), {}, ("quantize_per_token", "constant scales")),
    "asymmetric-int4": (
        QuantMode.use_weight_only(True, True),
        {"group_size": 64, "zero": True},
        ("weight_only_quant_matmul", "asymmetric"),
    ),
    "int8-groups": (
        QuantMode.use_weight_only(False, True),
        {"group_size": 64},
        ("weight_only_quant_matmul", "INT8 weights have a scale per group"),
    ),
}


class Unread(dict[str, torch.Tensor]):
    """Weights that nobody may read."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def lower_it(engine: Engine, weights: Any) -> None:
    trt = make_tensorrt()
    lower(engine.plan, weights, trt.Builder(trt.Logger(trt.Logger.WARNING)).create_network(0), trt, 64)


@pytest.mark.parametrize("mode", REFUSED)
def test_what_cannot_be_lowered_names_op_and_reason_before_a_weight_is_read(mode: str) -> None:
    quant_mode, options, words = REFUSED[mode]
    model = quantize_model(QWenForCausalLM(ARCHITECTURES["qwen1"], "float16"), quant_mode, **options)
    with pytest.raises(ValueError, match="cannot be lowered to TensorRT") as caught:
        lower_it(compile_model(model, LIMITS, fuse=False), Unread())
    for word in words:
        assert word in str(caught.value)


def test_a_fused_network_cannot_be_lowered() -> None:
    model = QWenForCausalLM(ARCHITECTURES["qwen1"], "float16")
    with pytest.raises(ValueError, match="lower the network before the passes"):
        lower_it(compile_model(model, LIMITS), Unread())


@pytest.mark.parametrize(
    ("scale", "words"), [(-0.01, "positive ones only"), (1e-7, "float16 cannot hold; build with --dtype bfloat16")]
)
def test_a_scale_that_tensorrt_cannot_take_is_named(scale: float, words: str) -> None:
    model = quantize_model(QWenForCausalLM(ARCHITECTURES["qwen1"], "float16"), QuantMode.use_weight_only())
    set_weights(model)
    parameter = dict(model.named_parameters())["layers.1.mlp.proj.scale"]
    parameter.value = torch.full(parameter.shape, scale)
    engine = compile_model(model, LIMITS, fuse=False)
    with pytest.raises(ValueError, match=f"layers.1.mlp.proj.scale: a scale is .*{words}"):
        lower_it(engine, engine.weights)


def test_rows_of_zeros_may_have_any_scale() -> None:
    model = quantize_model(QWenForCausalLM(ARCHITECTURES["qwen1"], "float16"), QuantMode.use_weight_only())
    set_weights(model)
    parameters = dict(model.named_parameters())
    for kind in ("weight", "scale"):
        parameter = parameters[f"layers.0.mlp.fc.{kind}"]
        data = parameter.load().clone()
        data[3:5] = 0 if kind == "weight" else 1e-38
        parameter.value = data
    engine = compile_model(model, LIMITS, fuse=False)
    lower_it(engine, engine.weights)


# build.py and the scripts where there is no TensorRT


def run_build(checkpoint: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, build.__file__, "--hf_model_dir", str(checkpoint), "--output_dir", str(output)]
    return subprocess.run([*command, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def has_tensorrt() -> bool:
    code = "from tensorrt_llm.tensorrt_backend.api import import_tensorrt; import_tensorrt()"
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120).returncode == 0


@pytest.mark.skipif(has_tensorrt(), reason="tensorrt is installed")
def test_without_tensorrt_one_line_says_what_to_install(tmp_path: Path) -> None:
    checkpoint = write_qwen1_checkpoint(tmp_path / "qwen1")
    found = run_build(checkpoint, tmp_path / "engine", "--backend", "tensorrt")
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1
    assert "pip install 'tensorrt_llm[tensorrt]'" in found.stderr
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("flag", ["--paged_kv_cache", "--batch_invariant", "--remove_input_padding", "--tune"])
def test_flags_of_our_own_engines_are_refused(flag: str, tmp_path: Path) -> None:
    checkpoint = write_qwen1_checkpoint(tmp_path / "qwen1")
    found = run_build(checkpoint, tmp_path / "engine", "--backend", "tensorrt", flag)
    assert found.returncode == 1 and f"{flag} does not go with --backend tensorrt" in found.stderr


def test_no_other_path_imports_tensorrt(tmp_path: Path) -> None:
    """The package, its parts for TensorRT, and an engine that is built and run the other way."""
    checkpoint = write_qwen1_checkpoint(tmp_path / "qwen1")
    code = f"""
import json, sys
sys.path[:0] = {[str(Path(build.__file__).parent)]!r}
import build, run, summarize, benchmark
from compiling.args import BuildArgs
from pathlib import Path
import tensorrt_llm.tensorrt_backend.building, tensorrt_llm.runtime.tensorrt_session
build.main(BuildArgs(Path({str(tmp_path / "engine")!r}), Path({str(checkpoint)!r}), dtype="float32", max_input_len=8))
runner = tensorrt_llm.runtime.ModelRunner.from_dir({str(tmp_path / "engine")!r}, device="cpu", kv_cache_tokens=512)
runner.generate([[1, 2, 3]], max_new_tokens=2)
print(json.dumps(sorted(sys.modules)))
"""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = json.loads(found.stdout.splitlines()[-1])
    assert "tensorrt_llm.tensorrt_backend.building" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in ("tensorrt", "tensorrt_bindings")]
