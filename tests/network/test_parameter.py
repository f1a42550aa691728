"""A parameter gives its data in its dtype, or says why it can't."""

import numpy as np
import pytest
import torch

from tensorrt_llm import Parameter


def parameter_with(data: torch.Tensor | np.ndarray, dtype: str = "float16") -> Parameter:
    parameter = Parameter(data.shape, dtype)
    parameter.name = "the.weight"
    parameter.value = data
    return parameter


@pytest.mark.parametrize("data", [np.array([[1.5, -2.0]], dtype=np.float32), torch.tensor([[1.5, -2.0]])])
def test_arrays_and_tensors_come_back_in_the_dtype(data: torch.Tensor | np.ndarray) -> None:
    assert torch.equal(parameter_with(data).load(), torch.tensor([[1.5, -2.0]], dtype=torch.float16))


def test_a_value_beyond_float16_is_named_with_the_weight() -> None:
    with pytest.raises(ValueError, match="the.weight: largest magnitude 70000 does not fit float16"):
        parameter_with(torch.tensor([1.0, -70000.0])).load()


def test_the_largest_float16_fits() -> None:
    assert parameter_with(torch.tensor([65504.0])).load().item() == 65504


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_damaged_data_is_refused_in_every_dtype(value: float, dtype: str) -> None:
    with pytest.raises(ValueError, match="the.weight: the data holds NaN or infinite values"):
        parameter_with(torch.tensor([1.0, value, 2.0]), dtype).load()


def test_data_of_another_shape_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        Parameter((2,)).value = torch.zeros(3)


def test_a_loader_of_another_shape_is_refused_when_it_loads() -> None:
    parameter = Parameter((2,))
    parameter.set_loader(lambda: torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        parameter.load()


def test_integers_are_no_weights() -> None:
    with pytest.raises(ValueError, match="int64, expected a floating dtype"):
        Parameter((2,)).value = torch.zeros(2, dtype=torch.int64)


def test_a_parameter_without_data_says_so() -> None:
    with pytest.raises(ValueError, match="has no data"):
        Parameter((2,)).load()
