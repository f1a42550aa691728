"""The search for steps: no grid that was tried costs less, and every grid can be stored and divided by."""

import pytest
import torch

from tensorrt_llm.quantization.grid import Grid, largest_divisor, search_grid, storable


def squares(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().sum(-1)


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    """Normal, with a few large ones that clipping has to weigh."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((rows, columns), generator=generator)
    return noise * (1 + 4 * (torch.rand((rows, columns), generator=generator) > 0.97))


def rounded(weight: torch.Tensor, group_size: int, grid: Grid) -> torch.Tensor:
    steps = grid.spread()
    return steps.values(steps.integers(weight.unflatten(1, (-1, group_size)))).flatten(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [8, 32, 96])
def test_the_cost_is_that_of_the_rounded_weight_and_clipping_lowers_it(symmetric: bool, group_size: int) -> None:
    weight = weights()
    options = {"symmetric": symmetric, "scale_dtype": torch.float16}
    grid, cost = search_grid(weight, group_size, squares, **options)
    _, unclipped = search_grid(weight, group_size, squares, **options, clip_ratios=(1.0,))
    assert grid.scale.shape == grid.zero.shape == (24, 96 // group_size)
    assert cost == pytest.approx((rounded(weight, group_size, grid) - weight).square().sum().item(), rel=1e-4)
    assert cost < unclipped


def test_a_weight_searched_in_pieces_gets_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cost = search_grid(weights(), 32, squares, scale_dtype=torch.float16)
    monkeypatch.setattr("tensorrt_llm.quantization.grid._ELEMENTS_AT_ONCE", 5 * 96)
    pieces, cost_of_pieces = search_grid(weights(), 32, squares, scale_dtype=torch.float16)
    assert torch.equal(whole.scale, pieces.scale) and torch.equal(whole.zero, pieces.zero)
    assert cost == pytest.approx(cost_of_pieces, rel=1e-5)


@pytest.mark.parametrize("lowest_zero", [-8, -7])
def test_zero_points_are_integers_in_their_range_and_zero_stays_zero(lowest_zero: int) -> None:
    one_sided = torch.cat([weights().abs(), -weights().abs(), weights() + 3])
    grid, _ = search_grid(one_sided, 32, squares, scale_dtype=torch.float16, lowest_zero=lowest_zero)
    assert torch.equal(grid.zero, grid.zero.round())
    assert grid.zero.amin() == lowest_zero and grid.zero.amax() == 7
    assert torch.equal(grid.values(grid.integers(torch.zeros_like(grid.scale))), torch.zeros_like(grid.scale))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zeros(symmetric: bool) -> None:
    grid, cost = search_grid(torch.zeros((3, 32)), 16, squares, symmetric=symmetric, scale_dtype=torch.float16)
    assert (grid.scale != 0).all() and cost == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_scales_lose_nothing_in_their_dtype_nor_in_float16(dtype: torch.dtype) -> None:
    scale = storable(torch.tensor([0.0, 1e-9, -1e-9, 0.1, -0.1, 3e-3, 7.7]), dtype)
    assert torch.equal(scale, scale.to(dtype).float()) and torch.equal(scale, scale.half().float())
    assert (scale != 0).all()


def test_largest_divisor_is_the_most_columns_within_the_limit() -> None:
    assert [largest_divisor(count, 128) for count in (128, 64, 256, 5504, 48, 344, 131)] == [
        128,
        64,
        128,
        128,
        48,
        86,
        1,
    ]
