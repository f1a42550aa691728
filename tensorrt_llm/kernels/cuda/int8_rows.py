"""Rows of float32 to int8, a scale for each row: shared by quantize_per_token and the int8 KV cache.

    q = round(x * (127 / amax)),  scale = amax / 127       amax the largest magnitude of the row

The operations are those of reference.quantize_per_token, one by one, so integers and scales come out equal.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import triton
import triton.language as tl


@triton.jit
def round_to_int8(x):
    """float32 to the nearest integer within -127..127, half steps to the even one.

    1.5 * 2^23 pushes the fraction out of the 24 bits of a float, which rounds it the IEEE way. The cut also stands
    between that sum and the product that x was: fused into one instruction they would be rounded once, not twice.
    """
    return ((tl.clamp(x, -127.0, 127.0) + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_rows(x):
    """x float32 [rows, columns] -> int8 of that shape and scale float32 [rows, 1]; masked columns must be zero."""
    # Magnitudes are ordered as their bits are, with NaN above all: a maximum of floats would lose it.
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1, keep_dims=True)
    amax = bits.to(tl.float32, bitcast=True)
    # Torch divides a number by a tensor as the tensor's inverse times the number: two roundings, so here as well.
    steps_per_unit = tl.where(amax > 1e-30, tl.div_rn(1.0, amax) * 127.0, 0.0)
    return round_to_int8(x * steps_per_unit), tl.div_rn(amax, 127.0)
