"""AWQ: stretching changes no result before rounding, and large inputs are rounded for."""

import pytest
import torch

from tensorrt_llm.quantization.awq import (
    InputMoments,
    divide_rows,
    largest_divisors,
    quantize_awq,
    search_stretch,
)
from tensorrt_llm.quantization.quantize import QuantizedWeight, quantize_weight

GROUP = 32
FLOAT16 = torch.float16


def make_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) / columns**0.5


def inputs_with_outliers(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    """One channel in 32 is 30 times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((tokens, columns), generator=generator)
    inputs[:, ::32] *= 30
    return inputs


def output_error(inputs: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor) -> float:
    expected = inputs @ weight.T
    return ((inputs @ quantized.T - expected).norm() / expected.norm()).item()


def quantize(weight: torch.Tensor, moments: InputMoments, stretch: torch.Tensor) -> QuantizedWeight:
    return quantize_awq(weight * stretch, moments.divided(stretch), GROUP, scale_dtype=FLOAT16)


def test_stretching_preserves_a_chain_of_layers_before_rounding() -> None:
    """A norm's weight, two branches of which one scales the other, and what reads their product: all as before."""
    norm, fc, gate, proj = torch.rand(64) + 0.5, make_weight(96, 64), make_weight(96, 64, 1), make_weight(64, 96, 2)
    x = inputs_with_outliers(50, 64)

    def mlp(norm: torch.Tensor, fc: torch.Tensor, gate: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
        normed = x.double() * norm.double()
        return (torch.nn.functional.silu(normed @ fc.double().T) * (normed @ gate.double().T)) @ proj.double().T

    hidden = torch.nn.functional.silu(x * norm @ fc.T) * (x * norm @ gate.T)
    first = search_stretch(torch.cat([fc, gate]), InputMoments.of(x * norm, GROUP), GROUP, scale_dtype=FLOAT16)
    second = search_stretch(proj, InputMoments.of(hidden, GROUP), GROUP, scale_dtype=FLOAT16)
    assert first.std() > 0 and second.std() > 0
    stretched = mlp(norm / first, fc * first, gate * first / second[:, None], proj * second)
    expected = mlp(norm, fc, gate, proj)
    assert (stretched - expected).norm() < 1e-6 * expected.norm()


def test_large_channels_get_a_larger_stretch_and_smaller_errors() -> None:
    weight, (inputs, unseen) = make_weight(64, 256), inputs_with_outliers(1500, 256).split((1000, 500))
    moments = InputMoments.of(inputs, GROUP)
    stretch = search_stretch(weight, moments, GROUP, scale_dtype=FLOAT16)
    assert stretch[::32].amin() > 2 * stretch.median()
    found = output_error(unseen, weight, quantize(weight, moments, stretch).dequantize() / stretch)
    clipped = output_error(unseen, weight, quantize(weight, moments, torch.ones(256)).dequantize())
    plain = output_error(unseen, weight, quantize_weight(weight, 4, GROUP).dequantize())
    assert found < 0.9 * clipped and found < 0.5 * plain


def test_equal_channels_are_left_as_they_are() -> None:
    inputs = torch.ones((100, 64)) * torch.randn((100, 1), generator=torch.Generator().manual_seed(0))
    stretch = search_stretch(make_weight(16, 64), InputMoments.of(inputs, GROUP), GROUP, scale_dtype=FLOAT16)
    torch.testing.assert_close(stretch, torch.ones(64))


@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_the_cost_of_an_error_is_its_mean_square_in_the_output(group_size: int) -> None:
    """Within blocks of at most 128 columns: here only one block has an error."""
    inputs = inputs_with_outliers(5000, 256)
    difference = torch.zeros((8, 256))
    difference[:, 32:64] = make_weight(8, 32)
    costs = InputMoments.of(inputs, group_size).cost(difference.unflatten(1, (-1, group_size)))
    expected = (inputs @ difference.T).square().mean(0)
    assert costs.shape == (8, 256 // group_size)
    torch.testing.assert_close(costs.sum(1), expected, rtol=1e-4, atol=1e-7)


def test_moments_of_divided_inputs_are_those_of_the_quotients() -> None:
    inputs, stretch = inputs_with_outliers(300, 64), torch.rand(64) + 0.5
    found, expected = InputMoments.of(inputs, GROUP).divided(stretch), InputMoments.of(inputs / stretch, GROUP)
    torch.testing.assert_close(found.magnitude, expected.magnitude)
    torch.testing.assert_close(found.products, expected.products)


@pytest.mark.parametrize("tokens", [1, 4096, 5000])
def test_moments_are_means_over_all_tokens(tokens: int) -> None:
    inputs = inputs_with_outliers(tokens, 64)
    moments = InputMoments.of(inputs, 16)
    torch.testing.assert_close(moments.magnitude, inputs.abs().mean(0))
    products = inputs.T @ inputs / tokens
    torch.testing.assert_close(moments.products[1], products[16:32, 16:32], rtol=1e-4, atol=1e-4)


def test_clipping_is_chosen_by_the_output() -> None:
    """Large weights on a channel without input are clipped to make the steps of their group finer, others less so."""
    weight, inputs = make_weight(16, 64), inputs_with_outliers(500, 64)
    weight[:, 7] *= 4
    scales = []
    for factor in (0, 10):
        inputs_7 = inputs.clone()
        inputs_7[:, 7] *= factor
        made = quantize_awq(weight, InputMoments.of(inputs_7, GROUP), GROUP, scale_dtype=FLOAT16)
        scales.append(made.scale[:, 0].mean())
    assert scales[0] < 0.9 * scales[1]


@pytest.mark.parametrize("unused", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_channels_that_are_never_used_have_a_finite_stretch(unused: slice) -> None:
    inputs = inputs_with_outliers(200, 64)
    inputs[:, unused] = 0
    moments = InputMoments.of(inputs, GROUP)
    stretch = search_stretch(make_weight(16, 64), moments, GROUP, scale_dtype=FLOAT16)
    assert stretch.isfinite().all() and (stretch > 0).all()
    made = quantize(make_weight(16, 64), moments, stretch)
    assert made.scale.isfinite().all() and (made.scale != 0).all()


def test_dividing_rows_divides_outputs_and_keeps_integers() -> None:
    moments, stretch = InputMoments.of(inputs_with_outliers(200, 64), GROUP), torch.tensor([0.5, 2.0, 3.0, 1.0])
    whole = quantize_awq(make_weight(4, 64), moments, GROUP, scale_dtype=FLOAT16)
    divided = divide_rows(whole, stretch, FLOAT16)
    assert torch.equal(divided.weight, whole.weight) and divided.zero is whole.zero
    # Half a unit in the last place of float16.
    torch.testing.assert_close(divided.dequantize(), whole.dequantize() / stretch[:, None], rtol=2**-11, atol=0)


def test_a_stretch_is_bounded_by_what_scales_before_it_can_bear() -> None:
    """Rows of tiny weights, divided by the stretch of the next layer, would have scales that float16 cannot hold."""
    tiny = quantize_weight(make_weight(64, 64) * 1e-3, 4, GROUP)
    moments = InputMoments.of(inputs_with_outliers(200, 64), GROUP)
    largest = largest_divisors(tiny)
    free = search_stretch(make_weight(16, 64), moments, GROUP, scale_dtype=FLOAT16)
    assert (free > largest).any()
    stretch = search_stretch(make_weight(16, 64), moments, GROUP, scale_dtype=FLOAT16, largest=largest)
    assert (stretch <= largest).all()
    divided = divide_rows(tiny, stretch, FLOAT16)
    torch.testing.assert_close(divided.dequantize(), tiny.dequantize() / stretch[:, None], rtol=2**-10, atol=0)
