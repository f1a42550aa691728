"""compare_layers finds the tensor at which an engine leaves its reference."""

import math

import pytest
import torch
from models_for_tests import make_config, make_engine

from tensorrt_llm.kernels.cpu import attention
from tensorrt_llm.runtime.layer_comparison import Summary, compare_layers

PROMPT = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_sound_engine_agrees_in_every_tensor(dtype: str) -> None:
    rows = compare_layers(make_engine(make_config(num_hidden_layers=3), dtype), PROMPT, "cpu")
    assert all(row.agrees for row in rows)


def test_tensors_come_in_network_order() -> None:
    names = [row.name for row in compare_layers(make_engine(), PROMPT, "cpu")]
    assert names == ["embedding", "layers.0.attention", "layers.0.mlp", "layers.0.output", "logits"]


def test_every_tensor_is_compared_in_all_tokens_of_the_prompt() -> None:
    """Of the last layer too, which in use computes the rows whose logits are wanted."""
    rows = compare_layers(make_engine(make_config(num_hidden_layers=2)), PROMPT, "cpu")
    assert {row.shape[0] for row in rows} == {len(PROMPT)}


def test_a_fault_shows_first_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "logn_scale", lambda *_: torch.tensor([2.0]))
    rows = compare_layers(make_engine(make_config(num_hidden_layers=2)), PROMPT, "cpu")
    assert next(row.name for row in rows if not row.agrees) == "layers.0.attention"


def test_nan_never_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "logn_scale", lambda *_: torch.tensor([math.nan]))
    assert not compare_layers(make_engine(), PROMPT, "cpu")[-1].agrees


def test_a_summary_holds_mean_sum_and_largest_magnitude() -> None:
    assert Summary.of(torch.tensor([1.0, -4.0, 0.0])) == Summary(mean=-1.0, sum=-3.0, max_abs=4.0)
