"""The ops of quantized networks: each checks its operands, infers its result and adds one node.

What an op means is written once, in kernels/reference.py, under the same name.
"""

from ..dtype import is_floating
from ..network import Tensor


def weight_only_quant_matmul(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    dtype: str | None = None,
) -> Tensor:
    """input [m, k] times the transpose of a quantized weight [n, k], plus bias [n], in `dtype` (default: input's).

    weight is int8 [n, k], or uint8 [n, k / 2] for 4 bits; scale float32 and zero int16 are [n, groups]
    (quantization/quantize.py has the format).
    """
    op = "weight_only_quant_matmul"
    _check_matrix(op, input)
    _check_quantized(op, input.shape[1], weight, scale, zero, bits)
    _check(bias is None or bias.shape == weight.shape[:1], op, f"{bias!r} does not fit {weight!r}")
    dtype = dtype or input.dtype
    operands = [operand for operand in (input, weight, scale, zero, bias) if operand is not None]
    return input.network.add(
        op,
        *operands,
        outputs=[(dtype, (input.shape[0], weight.shape[0]))],
        bits=bits,
        has_zero=zero is not None,
        dtype=dtype,
    )[0]


def quantize_per_token(input: Tensor, smoother: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 [m, k] and scale float32 [m, 1]: input / smoother [k], each row divided by its largest magnitude / 127."""
    operands = _smoothed("quantize_per_token", input, smoother)
    rows, columns = input.shape
    quantized, scale = input.network.add(
        "quantize_per_token", *operands, outputs=[("int8", (rows, columns)), ("float32", (rows, 1))]
    )
    return quantized, scale


def quantize_tensor(input: Tensor, scale: Tensor, smoother: Tensor | None = None) -> Tensor:
    """int8 [m, k]: input / smoother [k] / scale [1], rounded and cut to -127..127."""
    operands = _smoothed("quantize_tensor", input, smoother)
    _check(scale.shape == (1,) and scale.dtype == "float32", "quantize_tensor", f"{scale!r} is not float32[1]")
    return input.network.add("quantize_tensor", input, scale, *operands[1:], outputs=[("int8", input.shape)])[0]


def smooth_quant_gemm(
    input: Tensor, input_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, dtype: str
) -> Tensor:
    """(int8 input [m, k] times the transpose of int8 weight [n, k]) * input_scale * weight_scale + bias, in `dtype`.

    input_scale is float32 [m, 1] (one per token) or [1] (one for all); weight_scale is float32 [n].
    """
    op = "smooth_quant_gemm"
    rows, columns = input.shape
    _check(input.dtype == "int8", op, f"{input!r} is not int8")
    _check(weight.shape[1:] == (columns,) and weight.dtype == "int8", op, f"{weight!r} does not fit {input!r}")
    _check(
        input_scale.shape in ((rows, 1), (1,)) and input_scale.dtype == "float32",
        op,
        f"{input_scale!r} does not fit {input!r}",
    )
    _check(
        weight_scale.shape == weight.shape[:1] and weight_scale.dtype == "float32",
        op,
        f"{weight_scale!r} does not fit {weight!r}",
    )
    _check(bias is None or bias.shape == weight.shape[:1], op, f"{bias!r} does not fit {weight!r}")
    operands = [operand for operand in (input, input_scale, weight, weight_scale, bias) if operand is not None]
    return input.network.add(op, *operands, outputs=[(dtype, (rows, weight.shape[0]))], dtype=dtype)[0]


def scale_columns(input: Tensor, scale: Tensor) -> Tensor:
    """input [m, k] times scale [k], column by column, in input's dtype (AWQ's pre_quant_scale)."""
    _check_matrix("scale_columns", input)
    _check(scale.shape == input.shape[1:], "scale_columns", f"{scale!r} does not fit {input!r}")
    return input.network.add("scale_columns", input, scale, outputs=[(input.dtype, input.shape)])[0]


def permute_columns(input: Tensor, order: Tensor) -> Tensor:
    """Columns of input [m, k] in the order int32 [k] (GPTQ's act-order)."""
    _check_matrix("permute_columns", input)
    _check(
        order.shape == input.shape[1:] and order.dtype == "int32",
        "permute_columns",
        f"{order!r} does not fit {input!r}",
    )
    return input.network.add("permute_columns", input, order, outputs=[(input.dtype, input.shape)])[0]


def _check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}")


def _check_matrix(op: str, x: Tensor) -> None:
    _check(len(x.shape) == 2 and is_floating(x.dtype), op, f"{x!r} is not a matrix of floats")


def _check_quantized(op: str, columns: object, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    _check(bits in (4, 8), op, f"bits is {bits}, expected 4 or 8")
    stored = "uint8" if bits == 4 else "int8"
    _check(
        len(weight.shape) == 2 and weight.dtype == stored and weight.shape[1] == int(str(columns)) * bits // 8,
        op,
        f"{weight!r} is not {stored} of {columns} columns in {bits} bits",
    )
    _check(
        scale.dtype == "float32" and len(scale.shape) == 2 and scale.shape[0] == weight.shape[0],
        op,
        f"{scale!r} is not a float32 scale of {weight!r}",
    )
    _check(int(str(columns)) % int(scale.shape[1]) == 0, op, f"{scale!r} does not divide {columns} columns in groups")
    _check(
        zero is None or (zero.shape == scale.shape and zero.dtype == "int16"), op, f"{zero!r} does not fit {scale!r}"
    )


def _smoothed(op: str, input: Tensor, smoother: Tensor | None) -> tuple[Tensor, ...]:
    _check_matrix(op, input)
    if smoother is None:
        return (input,)
    _check(
        smoother.shape == input.shape[1:] and smoother.dtype == "float32", op, f"{smoother!r} does not fit {input!r}"
    )
    return (input, smoother)
