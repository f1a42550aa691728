"""The bytes of a decode step, counted by hand for small models, and the rate at which a device reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarking.read_rate import measure_read_rate
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from engines_of_modes import CONFIG, engine_of_mode
from hf_model import load_hf_model, random_hf_model
from models_for_tests import engine_from_checkpoint
from step_bytes import StepBytes, step_bytes_of_engine, step_bytes_of_hf

from tensorrt_llm.quantization import QuantMode

FLOAT = QuantMode(0)
INT8, INT4 = QuantMode.use_weight_only(), QuantMode.use_weight_only(use_int4_weights=True)
# Of engines_of_modes.CONFIG: the elements of a layer's matrices (qkv, dense, fc, gate, proj), their rows, and its
# vectors: the bias of qkv and two norms. What is not in a layer is the last norm and the output layer.
MATRIX = 192 * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96
ROWS, VECTORS = 192 + 64 + 96 + 96 + 64, 192 + 2 * 64
REST = 64 + 61 * 64


def test_the_numbers_above_are_those_of_the_small_model() -> None:
    assert (CONFIG.hidden_size, CONFIG.mlp_hidden_size, CONFIG.vocab_size) == (64, 96, 61)
    assert (CONFIG.num_hidden_layers, CONFIG.num_attention_heads, CONFIG.head_size) == (2, 4, 16)


@pytest.mark.parametrize(("mode", "weights"), [
    (FLOAT, 2 * 4 * (MATRIX + VECTORS) + 4 * REST),
    (INT8, 2 * (MATRIX + 4 * ROWS + 4 * VECTORS) + 4 * REST),
    (INT4, 2 * (MATRIX // 2 + 4 * ROWS + 4 * VECTORS) + 4 * REST),
])  # fmt: skip
def test_a_step_reads_weights_as_they_are_stored(mode: QuantMode, weights: int) -> None:
    assert step_bytes_of_engine(engine_of_mode(mode)).weights == weights


def test_int4_groups_have_a_scale_for_each() -> None:
    per_row = step_bytes_of_engine(engine_of_mode(INT4)).weights
    groups = engine_of_mode(QuantMode.use_weight_only(True, per_group=True), group_size=32)
    # Rows of 64 columns have 2 groups, those of proj with 96 have 3.
    assert step_bytes_of_engine(groups).weights - per_row == 2 * 4 * (ROWS - 64 + 2 * 64)


def test_of_the_embedding_a_sequence_reads_one_row() -> None:
    assert step_bytes_of_engine(engine_of_mode(FLOAT)).per_sequence == 64 * 4
    assert step_bytes_of_engine(engine_of_mode(INT8, dtype="float16")).per_sequence == 64 * 2


@pytest.mark.parametrize(("mode", "dtype", "vector"), [
    (FLOAT, "float32", 16 * 4), (FLOAT, "bfloat16", 16 * 2), (INT4.set_int8_kv_cache(), "float16", 16 + 4),
])  # fmt: skip
def test_a_cached_token_has_keys_values_and_their_scales(mode: QuantMode, dtype: str, vector: int) -> None:
    # 2 layers, keys and values, 4 heads.
    assert step_bytes_of_engine(engine_of_mode(mode, dtype=dtype)).per_cached_token == 2 * 2 * 4 * vector


def test_weights_are_read_once_and_the_rest_for_each_sequence() -> None:
    assert StepBytes(weights=1000, per_sequence=10, per_cached_token=2).of(3, 7) == 1000 + 3 * (10 + 14)


def qwen1(path: Path) -> Path:
    return write_qwen1_checkpoint(path)


def qwen2(path: Path) -> Path:
    return write_qwen2_checkpoint(path, num_kv_heads=2)


def tied_qwen2(path: Path) -> Path:
    return write_qwen2_checkpoint(path, tie=True, head_dim=6)


@pytest.mark.parametrize("write", [qwen1, qwen2, tied_qwen2])
def test_hugging_face_moves_what_an_engine_of_its_dtype_moves(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "checkpoint")
    ours, theirs = step_bytes_of_engine(engine_from_checkpoint(path)), load_hf_model(path, "float32", "cpu")
    assert step_bytes_of_hf(theirs) == ours


def test_a_shared_table_is_read_whole_by_the_output_layer(tmp_path: Path) -> None:
    engines = [engine_from_checkpoint(write_qwen2_checkpoint(tmp_path / str(tie), tie=tie)) for tie in (False, True)]
    separate, shared = map(step_bytes_of_engine, engines)
    assert shared == separate and engines[0].weight_bytes - engines[1].weight_bytes == 97 * 32 * 4


def test_random_weights_move_what_those_of_the_checkpoint_move(tmp_path: Path) -> None:
    path = write_qwen1_checkpoint(tmp_path / "checkpoint")
    models: list[Any] = [load(path, "bfloat16", "cpu") for load in (load_hf_model, random_hf_model)]
    first, second = map(step_bytes_of_hf, models)
    assert first == second


def test_the_read_rate_is_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still but for the time of a read: the first, which does not count, takes the longest."""
    durations = iter((9.0, 2.0, 4.0, 3.0))
    now = [0.0]

    def move(self: torch.Tensor) -> torch.Tensor:
        now[0] += next(durations)
        return self

    monkeypatch.setattr(torch.Tensor, "sum", move)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert measure_read_rate(torch.device("cpu"), repeats=3, num_bytes=3 * 2**20) == 2**20


def test_a_device_reads_at_some_rate() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = measure_read_rate(device, repeats=3, num_bytes=2**26)
    assert 1e8 < rate < 1e14
