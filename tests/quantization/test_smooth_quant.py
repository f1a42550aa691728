"""SmoothQuant's arithmetic, and what calibration sees: against the formulas, on columns of zeros, for every alpha."""

import math

import pytest
import torch
from models_for_tests import make_config, set_random_weights

from tensorrt_llm import Builder, Engine, Limits, net_guard
from tensorrt_llm.kernels import reference
from tensorrt_llm.models import QWenForCausalLM
from tensorrt_llm.quantization.calibrate import observe_layers, visit_linears
from tensorrt_llm.quantization.smooth_quant import (
    ALPHAS,
    fold_into_norm,
    quantize_linear,
    round_per_block,
    round_per_channel,
    search_alpha,
    smoothing_error,
    smoothing_factors,
)

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Activations of which every eighth column is fifty times as large, as those of language models are."""
    x = draw(tokens, columns, seed=seed)
    x[:, ::8] *= 50
    return x


# Smoothing


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_factors_are_the_formula(alpha: float) -> None:
    x, weights = with_outliers(9, 16), [draw(5, 16, seed=1), draw(7, 16, seed=2)]
    found = smoothing_factors(x.abs().amax(0), weights, alpha)
    for column in range(16):
        largest_x = max(abs(value) for value in x[:, column].tolist())
        largest_w = max(abs(value) for weight in weights for value in weight[:, column].tolist())
        assert found[column].item() == pytest.approx(largest_x**alpha / largest_w ** (1 - alpha), rel=1e-6)


def test_smoothing_moves_outliers_into_the_weights() -> None:
    x, weight = with_outliers(64, 32), draw(24, 32, seed=1)
    factors = smoothing_factors(x.abs().amax(0), [weight], 0.5)
    amax_x, amax_w = (x / factors).abs().amax(0), (weight * factors).abs().amax(0)
    torch.testing.assert_close(amax_x, amax_w, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_column_without_inputs_or_without_weights_is_left_alone(alpha: float) -> None:
    x, weight = draw(9, 6), draw(5, 6, seed=1)
    x[:, 1] = x[:, 3] = 0
    weight[:, 2] = weight[:, 3] = 0
    factors = smoothing_factors(x.abs().amax(0), [weight], alpha)
    assert factors.isfinite().all() and (factors > 0).all()
    assert factors[1:4].tolist() == [1, 1, 1]


def test_factors_are_bounded_below() -> None:
    factors = smoothing_factors(torch.tensor([1e-30, 1.0]), [torch.tensor([[1e20, 1.0]])], 0.5)
    assert factors[0].item() == pytest.approx(1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_norm_and_its_factors_multiply_to_what_the_norm_was(dtype: torch.dtype) -> None:
    """Whatever the dtype rounds, the weights behind the norm undo it."""
    norm = 1 + 0.2 * draw(512)
    norm[:3] = 0
    stored, factors = fold_into_norm(norm, draw(512, seed=1).exp(), dtype)
    assert stored.dtype == dtype
    torch.testing.assert_close(stored.float() * factors, norm, rtol=3e-7, atol=0)


def test_a_norm_that_would_vanish_in_float16_is_not_smoothed() -> None:
    norm, wanted = torch.tensor([0.5, 0.5]), torch.tensor([1e9, 4.0])
    stored, factors = fold_into_norm(norm, wanted, torch.float16)
    assert stored.tolist() == [0.5, 0.125] and factors.tolist() == [1, 4]


# Integers and scales


def test_a_row_has_the_integers_of_its_own_largest_magnitude() -> None:
    weight = draw(7, 33) * torch.tensor([1.0, 10, 0.1, 1e-3, 1e3, 1, 1])[:, None]
    found = round_per_channel(weight)
    amax = weight.abs().amax(1)
    assert torch.equal(found.weight, (weight * (127 / amax)[:, None]).round().to(torch.int8))
    assert torch.equal(found.scale, amax / 127)
    assert (found.weight.abs().amax(1) == 127).all()


def test_blocks_of_rows_have_a_scale_each() -> None:
    weight = draw(10, 8) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 2)[:, None]
    found = round_per_block(weight, (4, 4, 2))
    amax = [weight[:4].abs().max(), weight[4:8].abs().max(), weight[8:].abs().max()]
    scale = torch.stack(amax).repeat_interleave(torch.tensor([4, 4, 2])) / 127
    assert torch.equal(found.scale, scale)
    assert (found.weight * found.scale[:, None] - weight).abs().amax() <= scale.max() / 2 * 1.001


def test_rows_of_zeros_get_zeros_and_a_scale_that_can_be_divided_by() -> None:
    weight = draw(4, 8)
    weight[1] = 0
    for found in (round_per_channel(weight), round_per_block(torch.zeros(4, 8), (4,))):
        assert not found.weight[1].any() and found.scale[1] > 0 and found.scale.isfinite().all()


@pytest.mark.parametrize("kind", ["per_block", "per_channel"])
def test_scales_of_both_ends_make_the_same_output(kind: str) -> None:
    """accumulator * y_accum_quant * y_quant_orig is accumulator / (x_orig_quant * w_orig_quant)."""
    x, weight = draw(6, 16), draw(5, 16, seed=1)
    y = x @ weight.T
    int8 = quantize_linear(weight, (5,), x.abs().max().item(), y.abs().max().item())
    stored = getattr(int8, kind)
    accumulator = (x * int8.x_orig_quant).round() @ stored.weight.float().T
    found = accumulator * int8.y_accum_quant(stored) * int8.y_quant_orig
    torch.testing.assert_close(found, accumulator * stored.scale / int8.x_orig_quant)
    assert (found - y).norm() / y.norm() < 0.02  # two roundings to 127 steps


def test_ends_at_which_nothing_was_seen_have_finite_scales() -> None:
    int8 = quantize_linear(draw(5, 16), (5,), 0.0, 0.0)
    assert int8.x_orig_quant == 127 and int8.y_quant_orig == pytest.approx(1 / 127)


# The search


@pytest.mark.parametrize("seed", range(4))
def test_the_alpha_that_is_found_is_no_worse_than_any_of_the_grid(seed: int) -> None:
    x, weights = with_outliers(64, 48, seed), [draw(24, 48, seed=seed + 9), draw(40, 48, seed=seed + 19)]
    amax = x.abs().amax(0)
    errors = {alpha: smoothing_error(amax, x, weights, alpha) for alpha in ALPHAS}
    assert errors[search_alpha(amax, x, weights)] == min(errors.values())


def test_the_error_is_that_of_the_int8_outputs() -> None:
    """Against rounding written down once more, with the reference's op for tokens."""
    x, weight = with_outliers(32, 16), draw(8, 16, seed=1)
    factors = smoothing_factors(x.abs().amax(0), [weight], 0.5)
    q, scale = reference.quantize_per_token(x, factors)
    rows = (weight * factors) / ((weight * factors).abs().amax(1, keepdim=True) / 127)
    y = (q.float() @ rows.round().T) * scale * ((weight * factors).abs().amax(1) / 127)
    wanted = (y - x @ weight.T).square().sum().item()
    assert smoothing_error(x.abs().amax(0), x, [weight], 0.5) == pytest.approx(wanted, rel=1e-4)


# Calibration


def unfused_engine() -> Engine:
    """Two layers with random weights."""
    model = QWenForCausalLM(make_config(num_hidden_layers=2, hidden_size=16, head_size=8), "float32")
    set_random_weights(model)
    network = Builder().create_network()
    network.set_named_parameters(model.named_parameters())
    with net_guard(network):
        model(**model.prepare_inputs(16))
    limits = Limits(max_batch_size=1, max_input_len=1, max_output_len=1, max_num_tokens=1, tokens_per_block=16)
    return Builder().build_engine(network, Builder().create_builder_config(model, limits), fuse=False)


TEXTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 1, 2, 3]]
LINEARS = ["attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"]


def test_every_linear_layer_is_visited_with_all_tokens_and_nothing_behind_them_is_loaded() -> None:
    engine = unfused_engine()
    loaded: list[str] = []
    weights = engine.weights

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            loaded.append(name)
            return weights[name]

    engine.weights = Watched()
    found = [(linear.path, len(linear.visit.reads[0])) for linear in visit_linears(engine, TEXTS, CPU)]
    assert found == [(f"layers.{layer}.{name}", 13) for layer in range(2) for name in LINEARS]
    assert "lm_head.weight" not in loaded


def test_what_is_observed_are_both_ends_of_each_layer() -> None:
    visited = {
        linear.path: (linear.visit.reads[0].clone(), linear.visit.results[0].clone())
        for linear in visit_linears(unfused_engine(), TEXTS, CPU)
    }
    layers = list(observe_layers(unfused_engine(), TEXTS, CPU, dtype="float32", rows_kept=4))
    assert [list(layer) for layer in layers] == [LINEARS, LINEARS]
    for index, layer in enumerate(layers):
        for name, seen in layer.items():
            inputs, outputs = visited[f"layers.{index}.{name}"]
            assert torch.equal(seen.input_amax, inputs.abs().amax(0))
            assert seen.output_amax == outputs.abs().max().item()
            assert torch.equal(seen.input_rows, inputs[[0, 3, 6, 9]])


def test_no_more_rows_are_kept_than_there_are_tokens() -> None:
    first = next(observe_layers(unfused_engine(), TEXTS, CPU, dtype="float32", rows_kept=100))
    assert len(first["mlp.fc"].input_rows) == 13


@pytest.mark.parametrize(("scale", "dtype"), [(1e6, "float16"), (math.inf, "float32"), (math.nan, "bfloat16")])
def test_an_activation_that_overflows_is_named(scale: float, dtype: str) -> None:
    engine = unfused_engine()
    weights = dict(engine.weights)
    weights["layers.1.mlp.proj.weight"] = weights["layers.1.mlp.proj.weight"] * scale
    engine.weights = weights
    with pytest.raises(ValueError, match=rf"the output of layers\.1\.mlp\.proj .* expected what {dtype} holds"):
        list(observe_layers(engine, TEXTS, CPU, dtype=dtype))
