"""GPTQ: a weight is rounded column by column, and the columns left make up for the error of those done.

What counts is the output: over all inputs x, an error e of a row costs e^T H e with H the sum of x x^T. When column j
is off by d, the columns after it do best to subtract (d / U[j, j]) U[j, after], where U is upper triangular and U^T U
the inverse of H [1]. Rows know nothing of each other. Everything is float32, on any device.

Columns go by activation: those with large inputs first, while many are left to make up for them. Mean KL of the bundled
checkpoint in 1e-3 nats (groups of 128, without the worst thousandth of the tokens, over three calibration texts): 0.32
so, whether groups go along or stay runs of columns, and 0.43 from left to right; rounding to the nearest has 1.24.

[1] Frantar et al., https://arxiv.org/abs/2210.17323
"""

from functools import partial

import torch

from .grid import LOWEST, Cost, Grid, largest_divisor, search_grid
from .quantize import QuantizedWeight, pack_int4

# Columns whose errors reach the rest of the weight in one product.
_COLUMNS_AT_ONCE = 128
# Inputs that are cast to float32 at a time.
_INPUTS_AT_ONCE = 4096
# Shares of the mean of H's diagonal that are added to it; the first with which H has an inverse counts. With 0.001
# the KL is 0.32 too, with 0.05 it is 0.33.
_DAMPING = (0.01, 0.1, 1.0)
# AutoGPTQ's format stores zero points less one.
_LOWEST_ZERO = LOWEST + 1


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    """The sum of x x^T over the rows x of inputs [tokens, k]: float32 [k, k]."""
    hessian = torch.zeros((inputs.shape[1], inputs.shape[1]), device=inputs.device)
    for part in inputs.split(_INPUTS_AT_ONCE):
        rows = part.float()
        hessian.addmm_(rows.T, rows)
    return hessian


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int = 0,
    *,
    desc_act: bool = False,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """`weight` [n, k] in four bits for inputs of `hessian`; group_size 0 is one group per row.

    Groups are runs of columns. With `desc_act` they are runs of columns sorted by activation: the result's columns are
    in that order, and the order, int32 [k], comes beside it.
    """
    columns = weight.shape[1]
    group_size = group_size or columns
    assert columns % group_size == 0, (columns, group_size)
    importance = hessian.diagonal()
    order = importance.argsort(descending=True, stable=True)
    search = partial(_search_grid, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    left = weight.float().T[order]  # [k, n]: a column lies in one piece
    factor = _inverse_factor(hessian, order)
    integers = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    grids = [] if desc_act else search(weight, importance).of_groups()
    groups = ((torch.arange(columns) if desc_act else order.cpu()) // group_size).tolist()
    # A group's steps are found when its first column is reached, so errors must have reached all of them by then.
    step = largest_divisor(group_size, _COLUMNS_AT_ONCE)
    for first in range(0, columns, step):
        if desc_act and first % group_size == 0:
            members = slice(first, first + group_size)
            grids += search(left[members].T, importance[order[members]]).of_groups()
        run = slice(first, first + step)
        integers[run], errors = _round_run(left[run], factor[run, run], [grids[group] for group in groups[run]])
        after = slice(first + step, None)
        left[after].addmm_(factor[run, after].T, errors, alpha=-1)
    if not desc_act:
        integers[order] = integers.clone()
    scale = torch.stack([grid.scale for grid in grids], dim=1)
    zero = None if symmetric else torch.stack([grid.zero for grid in grids], dim=1).to(torch.int16)
    quantized = QuantizedWeight(4, pack_int4(integers.T), scale, zero)
    return quantized, order.to(torch.int32) if desc_act else None


def _search_grid(
    weight: torch.Tensor, importance: torch.Tensor, *, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> Grid:
    grid, _ = search_grid(
        weight,
        group_size,
        _cost(importance.unflatten(0, (-1, group_size))),
        symmetric=symmetric,
        lowest_zero=_LOWEST_ZERO,
        scale_dtype=scale_dtype,
    )
    return grid


def _cost(importance: torch.Tensor) -> Cost:
    """Cubed errors, as in quantize.py, times what the column's input weighs. KL as above: 0.34 without that, 0.40 with
    squares, 0.43 with no clipping at all."""
    return lambda difference: difference.abs_().pow_(3).mul_(importance).sum(-1)


def _round_run(columns: torch.Tensor, factor: torch.Tensor, grids: list[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Round neighbouring columns [c, n], each after its own steps: their integers, and what later columns have to make
    up for, in units of the factor's diagonal."""
    integers, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j, grid in enumerate(grids):
        integers[j] = grid.integers(columns[j])
        errors[j] = (columns[j] - grid.values(integers[j])) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return integers, errors


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper triangular U, U^T U the inverse of `hessian` with rows and columns in `order`, damped to have one."""
    # With rows and columns turned around, L L^T = H gives U as the inverse of L, turned around again.
    backwards = order.flip(0)
    turned = hessian[backwards[:, None], backwards]
    diagonal = turned.diagonal()
    mean = diagonal.mean()
    # A column whose input was always zero is rounded by itself.
    diagonal.masked_fill_(diagonal == 0, 1)
    undamped = diagonal.clone()
    for share in _DAMPING:
        diagonal.copy_(undamped + share * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            break
    else:
        raise ValueError("H has no inverse however it is damped: the inputs are not finite")
    inverse = torch.eye(len(order), device=hessian.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse.flip(0, 1)
