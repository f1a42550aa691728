"""What a machine with TensorRT runs: the bundled checkpoint as plans, beside our own engines on the same GPU.

    pytest -q -rs tests/tensorrt/test_on_gpu.py

Nobody of this project could run it yet: please report what it says (docs/tensorrt.md).
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import build
import pytest
import run as run_script_module
import torch
from models_for_tests import random_prompts
from test_session import engines_of

from tensorrt_llm.runtime import GenerationSession, ModelRunner, SamplingConfig, Session
from tensorrt_llm.runtime.tensorrt_session import TensorRtSession
from tensorrt_llm.tensorrt_backend.api import import_tensorrt
from tensorrt_llm.tokenizer import load_tokenizer

CHECKPOINT = Path(build.__file__).parent / "tiny_qwen_chat"
QUESTION = "你好，请问你叫什么？"
MODES: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32"),
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float16", "--use_weight_only"),
}
# Relative errors of logits between two ways to round the same network of six layers.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 2e-2}
# build.py rounds to INT4 otherwise for a plan than for an engine of ours, so small networks of the same integers are
# compared. Of INT8 activations some are carried over to the next step.
SMALL_MODES = {"int4": 1e-3, "int4-g128": 1e-3, "smooth-quant": 1e-1}


def missing() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        import_tensorrt()
    except ValueError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is there")


def build_engine(folder: Path, *flags: str) -> Path:
    command = [sys.executable, build.__file__, "--hf_model_dir", str(CHECKPOINT), "--output_dir", str(folder)]
    limits = ("--max_batch_size", "4", "--max_input_len", "256", "--max_output_len", "256")
    subprocess.run([*command, *limits, "--allow_accuracy_loss", *flags], check=True)
    return folder


@pytest.fixture(scope="module", params=MODES)
def runners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    flags = MODES[request.param]
    tokenizer = load_tokenizer(CHECKPOINT)
    ours, plan = (
        ModelRunner.from_dir(build_engine(folder / name, *flags, *backend), tokenizer, device="cuda")
        for name, backend in (("ours", ()), ("plan", ("--backend", "tensorrt")))
    )
    return request.param, ours, plan


def prompts_of(runner: ModelRunner) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(runner.vocab_size, (length,), generator=generator).tolist() for length in (1, 37, 200, 12, 5)]


def test_logits_of_prompts_are_close(runners: tuple[str, Any, Any]) -> None:
    mode, ours, plan = runners
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    outputs = [runner.generate(prompts_of(runner), sampling)["context_logits"] for runner in (ours, plan)]
    for expected, found in zip(*outputs, strict=True):
        assert (found - expected).norm() <= TOLERANCES[mode] * expected.norm()


def test_logits_of_decodes_are_close(runners: tuple[str, Any, Any]) -> None:
    """The first 16 steps of each answer as far as both chose the same tokens: captured graphs and the cache."""
    mode, ours, plan = runners
    sampling = SamplingConfig(max_new_tokens=16, gather_generation_logits=True, return_dict=True)
    expected, found = (runner.generate(prompts_of(runner), sampling) for runner in (ours, plan))
    for row, prompt in enumerate(prompts_of(ours)):
        ids = [output["output_ids"][row, 0, len(prompt) : len(prompt) + 16] for output in (expected, found)]
        same = int((ids[0] == ids[1]).long().cumprod(0).sum())
        assert same >= 8, f"answers to prompt {row} part after {same} tokens"
        theirs, mine = (output["generation_logits"][row][:same] for output in (found, expected))
        assert (theirs - mine).norm() <= TOLERANCES[mode] * mine.norm()


def test_a_plan_answers_as_our_engine_does(runners: tuple[str, Any, Any]) -> None:
    _, ours, plan = runners
    args = run_script_module.RunArgs(engine_dir=Path("unused"), max_new_tokens=24)
    ids = run_script_module.encode(QUESTION, plan.session.tokenizer, args, 256)
    texts = [runner.generate([ids], max_new_tokens=24, return_dict=True)["texts"][0] for runner in (ours, plan)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("architecture", ["qwen1", "qwen2-gqa"])
@pytest.mark.parametrize("mode", SMALL_MODES)
def test_small_networks_of_the_same_integers_agree(mode: str, architecture: str, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    trt = import_tensorrt()
    ours, plan, _ = engines_of(architecture, mode, tmp_path, trt=trt)
    sessions = GenerationSession(Session(ours, device)), GenerationSession(TensorRtSession(plan, trt, device))
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    prompts = random_prompts((5, 20, 11), 97)
    expected, found = (session.decode_batch(prompts, sampling)["context_logits"] for session in sessions)
    for wanted, logits in zip(expected, found, strict=True):
        assert (logits - wanted).norm() <= SMALL_MODES[mode] * wanted.norm()
