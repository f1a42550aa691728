"""GPTQ: it is the published recursion, and the outputs of its weights are closer than those of rounded ones."""

import pytest
import torch

from tensorrt_llm.quantization.gptq import hessian_of, quantize_gptq
from tensorrt_llm.quantization.quantize import QuantizedWeight, integers_of, quantize_weight


def make_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) / columns**0.5


def correlated_inputs(tokens: int, columns: int, seed: int = 1, rank: int = 16) -> torch.Tensor:
    """As activations are: most of their energy lies in few directions, and some channels are large."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((rank, columns), generator=generator)
    inputs = torch.randn((tokens, rank), generator=generator) @ directions / rank**0.5
    channels = 1 + 9 * (torch.rand(columns, generator=generator) > 0.9)
    return (inputs + 0.3 * torch.randn((tokens, columns), generator=generator)) * channels


def output_error(inputs: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor) -> float:
    expected = inputs.double() @ weight.double().T
    return ((inputs.double() @ quantized.double().T - expected).norm() / expected.norm()).item()


def dequantized(made: tuple[QuantizedWeight, torch.Tensor | None]) -> torch.Tensor:
    """Columns as the input has them."""
    weight, order = made
    if order is None:
        return weight.dequantize()
    natural = torch.empty(weight.shape)
    natural[:, order.long()] = weight.dequantize()
    return natural


def published_recursion(
    weight: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Integers [n, k] by the definition: round a column, let the others make up for it, with the inverse of what is
    left of the damped H taken anew each time. scale and zero [n, k] are those of each column."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    integers = torch.empty_like(weight)
    left = order.tolist()
    while left:
        column, inverse = left[0], hessian[left][:, left].inverse()
        integers[:, column] = (weight[:, column] / scale[:, column] + zero[:, column]).round().clamp(-8, 7)
        value = (integers[:, column] - zero[:, column]) * scale[:, column]
        weight[:, left] -= ((weight[:, column] - value) / inverse[0, 0])[:, None] * inverse[0]
        left.pop(0)
    return integers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 16), (96, 48), (288, 144), (96, 0)])
def test_integers_are_those_of_the_published_recursion(
    columns: int, group_size: int, desc_act: bool, symmetric: bool
) -> None:
    weight = make_weight(12, columns)
    hessian = hessian_of(correlated_inputs(400, columns))
    made, order = quantize_gptq(weight, hessian, group_size, desc_act=desc_act, symmetric=symmetric)

    by_activation = hessian.diagonal().argsort(descending=True, stable=True)
    places = torch.arange(columns) if order is None else order.long()
    scale, zero, found = (torch.empty((12, columns), dtype=torch.float64) for _ in range(3))
    scale[:, places] = made.scale.repeat_interleave(made.group_size, dim=1).double()
    zero[:, places] = 0.0 if made.zero is None else made.zero.repeat_interleave(made.group_size, dim=1).double()
    found[:, places] = integers_of(made.weight, 4).double()
    assert torch.equal(found, published_recursion(weight, hessian, by_activation, scale, zero))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", [16, 128, 0])
def test_outputs_are_closer_than_those_of_rounding_by_a_third(group_size: int, desc_act: bool, symmetric: bool) -> None:
    weight, (inputs, unseen) = make_weight(64, 256), correlated_inputs(2500, 256).split((2000, 500))
    made = quantize_gptq(weight, hessian_of(inputs), group_size, desc_act=desc_act, symmetric=symmetric)
    plain = quantize_weight(weight, 4, group_size).dequantize()
    assert output_error(unseen, weight, dequantized(made)) < 0.67 * output_error(unseen, weight, plain)


@pytest.mark.parametrize("seed", range(4))
def test_columns_by_activation_beat_columns_from_left_to_right(seed: int) -> None:
    """The large channels are last here, where nothing would be left to make up for them."""
    weight, inputs = make_weight(32, 128, seed), correlated_inputs(1000, 128, seed + 10)
    inputs = inputs[:, inputs.square().sum(0).argsort()]
    hessian = hessian_of(inputs)
    made, _ = quantize_gptq(weight, hessian, 32)
    scale = made.scale.repeat_interleave(32, dim=1).double()
    from_left = published_recursion(weight, hessian, torch.arange(128), scale, torch.zeros_like(scale)) * scale
    assert output_error(inputs, weight, made.dequantize()) < output_error(inputs, weight, from_left)


def test_desc_act_sorts_columns_by_activation_and_groups_them_in_that_order() -> None:
    hessian = hessian_of(correlated_inputs(500, 96))
    made, order = quantize_gptq(make_weight(8, 96), hessian, 32, desc_act=True)
    assert order is not None and order.dtype == torch.int32 and made.scale.shape == (8, 3)
    assert sorted(order.tolist()) == list(range(96))
    assert (hessian.diagonal()[order.long()].diff() <= 0).all()


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    weight, hessian = make_weight(24, 96), hessian_of(correlated_inputs(500, 96))
    whole, _ = quantize_gptq(weight, hessian, 32)
    part, _ = quantize_gptq(weight[8:16], hessian, 32)
    assert torch.equal(whole.rows(8, 16).weight, part.weight)
    assert torch.equal(whole.rows(8, 16).scale, part.scale)


def test_a_column_without_input_is_rounded_by_itself() -> None:
    """It may have some in another text."""
    weight, inputs = make_weight(16, 64), correlated_inputs(500, 64)
    inputs[:, 5] = 0
    made, _ = quantize_gptq(weight, hessian_of(inputs), 32)
    assert torch.equal(integers_of(made.weight, 4)[:, 5], (weight[:, 5] / made.scale[:, 0]).round().clamp(-8, 7))


def test_fewer_tokens_than_columns_are_damped() -> None:
    weight, inputs = make_weight(32, 128), correlated_inputs(20, 128)
    made, _ = quantize_gptq(weight, hessian_of(inputs), 32)
    assert output_error(inputs, weight, made.dequantize()) < 0.5 * output_error(
        inputs, weight, quantize_weight(weight, 4, 32).dequantize()
    )


@pytest.mark.parametrize("share", [0.0, 1e-2])
def test_no_input_at_all_is_plain_rounding(share: float) -> None:
    """H of zeros, or with nothing beside its diagonal: no column can make up for another."""
    weight = make_weight(16, 64)
    made, _ = quantize_gptq(weight, share * torch.eye(64), 32)
    scale = made.scale.repeat_interleave(32, dim=1)
    assert torch.equal(integers_of(made.weight, 4), (weight / scale).round().clamp(-8, 7).to(torch.int8))


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = correlated_inputs(100, 32)
    inputs[3, 4] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        quantize_gptq(make_weight(8, 32), hessian_of(inputs), 16)


def test_zero_points_have_a_place_in_the_v1_format() -> None:
    """It stores them less one, from 0 to 15."""
    made, _ = quantize_gptq(make_weight(16, 64).abs(), hessian_of(correlated_inputs(500, 64)), 16, symmetric=False)
    assert made.zero is not None and made.zero.amin() == -7


@pytest.mark.parametrize("tokens", [1, 4096, 5000])
def test_the_hessian_sums_over_all_tokens(tokens: int) -> None:
    inputs = correlated_inputs(tokens, 24)
    expected = inputs.double().T @ inputs.double()
    assert (hessian_of(inputs) - expected).norm() < 1e-6 * expected.norm()
