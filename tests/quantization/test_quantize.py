"""Rounding weights to integers: the format, the error it may make, and splits that change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorrt_llm.quantization.quantize import (
    QuantizedWeight,
    dequantize,
    pack_int4,
    quantize_weight,
    unpack_int4,
)

SHAPES = [(1, 2, 0), (7, 96, 0), (5, 96, 32), (33, 256, 128), (3, 48, 16)]


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31))
@settings(deadline=None)
def test_packing_is_undone_by_unpacking(rows: int, pairs: int, seed: int) -> None:
    q = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q)), q)


def test_the_even_column_lies_in_the_low_nibble_as_offset_binary() -> None:
    assert pack_int4(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)).tolist() == [[0xF0, 0x78]]


def test_dequantizing_follows_the_formula_element_by_element() -> None:
    q = torch.randint(-8, 8, (3, 8), dtype=torch.int8)
    scale, zero = torch.rand(3, 2) + 0.1, torch.randint(-8, 9, (3, 2), dtype=torch.int16)
    found = dequantize(pack_int4(q), scale, zero, bits=4)
    for row in range(3):
        for column in range(8):
            group = column // 4
            expected = (q[row, column].item() - zero[row, group].item()) * scale[row, group]
            assert found[row, column] == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_without_clipping_no_weight_moves_more_than_half_a_step(
    rows: int, columns: int, group_size: int, bits: int
) -> None:
    weight = torch.randn(rows, columns)
    quantized = quantize_weight(weight, bits, group_size, clip="amax")
    steps = quantized.scale.repeat_interleave(quantized.group_size, dim=1)
    # Scales of groups are rounded to float16, so that the largest weight may lie 2^-11 of itself behind the last step.
    slack = 1 + 2 * 2 ** (bits - 1) * 2**-11
    assert ((quantized.dequantize() - weight).abs() <= steps / 2 * slack).all()


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_search_never_loses_by_its_own_measure(rows: int, columns: int, group_size: int) -> None:
    weight = torch.randn(rows, columns).pow(3)  # heavy tails, which clipping is for
    searched, whole = (
        (quantize_weight(weight, 4, group_size, clip=clip).dequantize() - weight).abs().pow(3).sum()
        for clip in ("search", "amax")
    )
    assert searched <= whole * (1 + 1e-6)


def test_the_search_gains_where_tails_are_heavy() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).pow(3)
    errors = [(quantize_weight(weight, 4, 0, clip=clip).dequantize() - weight).norm() for clip in ("search", "amax")]
    assert errors[0] < 0.97 * errors[1]


def test_positive_scales_are_so_and_lose_no_more_than_without_search() -> None:
    """Of scales of both signs, about half turn the grid around."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    both, positive = (quantize_weight(weight, 4, 32, positive_scales=is_positive) for is_positive in (False, True))
    assert (both.scale < 0).float().mean() > 0.2 and (positive.scale > 0).all()
    largest = quantize_weight(weight, 4, 32, clip="amax")
    lost = [(each.dequantize() - weight).abs().pow(3).sum() for each in (both, positive, largest)]
    assert lost == sorted(lost)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_and_tiny_rows_stay_finite(bits: int) -> None:
    weight = torch.stack((torch.zeros(64), torch.full((64,), 1e-42), torch.full((64,), 1e30), torch.ones(64)))
    quantized = quantize_weight(weight, bits)
    assert quantized.scale.isfinite().all() and (quantized.scale != 0).all()
    assert torch.equal(quantized.dequantize()[0], torch.zeros(64))
    torch.testing.assert_close(quantized.dequantize()[2:], weight[2:], rtol=0.08 if bits == 4 else 0.005, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_quantized_by_itself(bits: int) -> None:
    weight = torch.randn(9, 64)
    whole, alone = quantize_weight(weight, bits, 32), quantize_weight(weight[3:5], bits, 32)
    assert torch.equal(whole.rows(3, 5).weight, alone.weight) and torch.equal(whole.rows(3, 5).scale, alone.scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("has_zero", [False, True])
def test_cut_and_regrouped_parts_join_to_the_same_matrix(bits: int, group_size: int, has_zero: bool) -> None:
    quantized = quantize_weight(torch.randn(6, 128), bits, group_size)
    if has_zero:
        zero = torch.randint(-8, 9, quantized.scale.shape, dtype=torch.int16)
        quantized = QuantizedWeight(bits, quantized.weight, quantized.scale, zero)
    whole = quantized.dequantize()
    columns = torch.cat([quantized.columns(start, start + 32).dequantize() for start in range(0, 128, 32)], dim=1)
    rows = QuantizedWeight.stacked([quantized.rows(0, 1), quantized.rows(1, 6)]).dequantize()
    assert torch.equal(columns, whole) and torch.equal(rows, whole)
    across_groups = torch.cat([quantized.columns(start, start + 16).dequantize() for start in range(0, 128, 16)], dim=1)
    assert torch.equal(quantized.regrouped(16).dequantize(), whole) and torch.equal(across_groups, whole)


def test_what_cannot_be_grouped_or_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group size 32 does not divide the 48 columns"):
        quantize_weight(torch.ones(2, 48), 8, 32)
    with pytest.raises(ValueError, match=r"7 columns, expected an even number"):
        quantize_weight(torch.ones(2, 7), 4)
