"""The session of a plan, on the fake engine, serves as our own session on the CPU does: same tokens, same logits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling.compile_model import compile_model
from fake_tensorrt import make_tensorrt
from lowered_networks import ARCHITECTURES, LIMITS, MODES, set_weights
from models_for_tests import on_cpu, random_prompts

from tensorrt_llm import Engine, Limits
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.runtime import GenerationSession, SamplingConfig
from tensorrt_llm.runtime.engine_folder import open_engine
from tensorrt_llm.runtime.tensorrt_session import TensorRtSession
from tensorrt_llm.tensorrt_backend import shapes
from tensorrt_llm.tensorrt_backend.building import build_plan
from tensorrt_llm.tensorrt_backend.plan_file import TensorRtEngine

CPU = torch.device("cpu")
# Three at a time, and less room in a step than the prompts have tokens: queues, chunks and mixed steps.
LENGTHS = (5, 20, 11, 1, 24)


def engines_of(
    architecture: str, mode: str, folder: Path, limits: Limits = LIMITS, trt: Any = None
) -> tuple[Engine, TensorRtEngine, Any]:
    """The same weights as an engine of ours and as a plan, and the module that runs it."""
    quant_mode, options = MODES[mode]
    model = quantize_model(QWenForCausalLM(ARCHITECTURES[architecture], "float32"), quant_mode, **options)
    set_weights(model)
    trt = trt or make_tensorrt()
    build_plan(compile_model(model, limits, fuse=False), trt, folder)
    engine = open_engine(folder)
    assert isinstance(engine, TensorRtEngine)
    return compile_model(model, limits), engine, trt


def serve(session: GenerationSession, prompts: list[list[int]], **sampling: Any) -> dict[str, Any]:
    config = SamplingConfig(max_new_tokens=12, return_dict=True, gather_generation_logits=True, **sampling)
    output: dict[str, Any] = session.decode_batch(prompts, config)
    return output


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("mode", ["float", "int8", "int4-g32"])
@pytest.mark.parametrize("architecture", ["qwen1", "qwen2-gqa"])
def test_greedy_tokens_are_those_of_our_own_session(architecture: str, mode: str, tmp_path: Path) -> None:
    ours, plan, trt = engines_of(architecture, mode, tmp_path)
    prompts = random_prompts(LENGTHS, 97)
    expected = serve(on_cpu(ours), prompts)
    found = serve(GenerationSession(TensorRtSession(plan, trt, CPU)), prompts)
    assert torch.equal(found["output_ids"], expected["output_ids"])
    for logits, wanted in zip(found["generation_logits"], expected["generation_logits"], strict=True):
        assert_close(logits, wanted)


def test_slots_are_reused_and_idle_ones_are_left_alone(tmp_path: Path) -> None:
    """Sequences of very different lengths end and begin beside each other, and one prompt is cut into many chunks."""
    limits = dataclasses.replace(LIMITS, max_num_tokens=6)
    ours, plan, trt = engines_of("qwen1", "float", tmp_path, limits)
    prompts = random_prompts((3, 24, 2, 7, 19, 1, 24, 4), 97, seed=3)
    new_tokens = [1, 9, 30, 2, 16, 40, 5, 3]
    sampling = SamplingConfig(max_new_tokens=new_tokens, return_dict=True)
    expected = on_cpu(ours).decode_batch(prompts, sampling)
    found = GenerationSession(TensorRtSession(plan, trt, CPU)).decode_batch(prompts, sampling)
    assert torch.equal(found["output_ids"], expected["output_ids"])


def test_the_longest_sequence_fits(tmp_path: Path) -> None:
    ours, plan, trt = engines_of("qwen1", "float", tmp_path)
    prompts = random_prompts((LIMITS.max_input_len,) * 3, 97)
    sampling = SamplingConfig(max_new_tokens=LIMITS.max_output_len)
    found = GenerationSession(TensorRtSession(plan, trt, CPU)).decode_batch(prompts, sampling)
    assert torch.equal(found, on_cpu(ours).decode_batch(prompts, sampling))


def test_what_a_broken_sequence_left_in_its_slot_does_no_harm(tmp_path: Path) -> None:
    """Behind the mask a NaN times zero is NaN still."""
    ours, plan, trt = engines_of("qwen1", "float", tmp_path)
    session = TensorRtSession(plan, trt, CPU)
    prompts = random_prompts((5, 20, 11), 97)
    for cache in session._caches.values():
        cache.fill_(torch.nan)
    found = serve(GenerationSession(session), prompts)
    assert torch.equal(found["output_ids"], serve(on_cpu(ours), prompts)["output_ids"])


def test_a_context_of_decodes_keeps_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured of it stays valid only so."""
    _, plan, trt = engines_of("qwen1", "float", tmp_path)
    session = TensorRtSession(plan, trt, CPU)
    serve(GenerationSession(session), random_prompts(LENGTHS, 97))
    assert len(session._decode_contexts) > 1
    contexts = dict(session._decode_contexts)
    for context in contexts.values():
        monkeypatch.setattr(context, "set_shapes", lambda shapes: pytest.fail("shapes of a captured context"))
    serve(GenerationSession(session), random_prompts(LENGTHS, 97, seed=1))
    assert session._decode_contexts == contexts


def test_addresses_are_multiples_of_256_bytes(tmp_path: Path) -> None:
    """Of all slots, where a cache's is one, and of all inputs, where their buffer's is one."""
    _, plan, trt = engines_of("qwen2-gqa", "float", tmp_path)
    session = TensorRtSession(plan, trt, CPU)
    for cache in session._caches.values():
        assert 2 * cache.stride(0) % 256 == 0, "in 16 bits, and so in 32"
    assert all(4 * start % 256 == 0 for start in session._prefill_context._starts.values())


def test_tokens_may_be_pending(tmp_path: Path) -> None:
    """As on a GPU, a step is launched before the last one's tokens are read."""
    ours, plan, trt = engines_of("qwen1", "float", tmp_path)
    prompts = random_prompts(LENGTHS, 97)
    session = TensorRtSession(plan, trt, CPU)
    session.runs_ahead = True
    assert torch.equal(
        serve(GenerationSession(session), prompts)["output_ids"], serve(on_cpu(ours), prompts)["output_ids"]
    )


def test_logits_of_whole_prompts_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_LOGITS_AT_ONCE", 7)
    ours, plan, trt = engines_of("qwen1", "float", tmp_path)
    prompts = random_prompts(LENGTHS, 97)
    wants = {"gather_context_logits": True}
    found = serve(GenerationSession(TensorRtSession(plan, trt, CPU)), prompts, **wants)
    expected = serve(on_cpu(ours), prompts, **wants)
    for logits, wanted in zip(found["context_logits"], expected["context_logits"], strict=True):
        assert_close(logits, wanted)


def test_fewer_slots_make_requests_wait(tmp_path: Path) -> None:
    ours, plan, trt = engines_of("qwen1", "float", tmp_path)
    prompts = random_prompts(LENGTHS, 97)
    session = TensorRtSession(plan, trt, CPU, kv_cache_tokens=plan.shapes.cache_length)
    assert session.num_blocks == 2
    assert torch.equal(
        serve(GenerationSession(session), prompts)["output_ids"], serve(on_cpu(ours), prompts)["output_ids"]
    )
    with pytest.raises(ValueError, match="kv_cache_tokens is 63, expected at least 64"):
        TensorRtSession(plan, trt, CPU, kv_cache_tokens=63)


# Files


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_an_altered_plan_is_refused(tmp_path: Path) -> None:
    _, plan, trt = engines_of("qwen1", "float", tmp_path)
    damage(plan.path, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered or damaged"):
        TensorRtSession(plan, trt, CPU)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, b'{"format": "tensorrt_llm.tensorrt_plan"}'])
def test_a_description_of_another_form_is_refused(content: bytes, tmp_path: Path) -> None:
    _, plan, _ = engines_of("qwen1", "float", tmp_path)
    damage(plan.path.with_suffix(".json"), lambda data: content)
    with pytest.raises(ValueError, match=r"qwen_float32_tp1_rank0\.json: "):
        open_engine(tmp_path)


def test_config_json_says_what_it_is(tmp_path: Path) -> None:
    _, plan, trt = engines_of("qwen1", "float", tmp_path)
    written = plan.config_json()
    assert written["builder_config"]["backend"] == "tensorrt"
    assert written["builder_config"]["tensorrt"] == trt.__version__
    assert written["plugin_config"]["paged_kv_cache"] is False
