"""Integers of 8 or 4 bits out of int16 words, one of each word at a time: a plane has the shape of the words.

They stand in offset binary, q + 2^(bits - 1). Shared by the weight-only matmuls and by attention over an int8 KV cache,
which both feed planes to tensor cores. Knows nothing of what the integers mean.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import triton
import triton.language as tl


@triton.jit
def integer_plane(words, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The q in bits INDEX * BITS and up of int16 words, in DTYPE and exact.

    In 16 bits without a conversion, and two words in one instruction. The last bit of 2^10 in float16, of 2^7 in
    bfloat16, is worth one: an unsigned integer in that place is the float plus the integer. Bfloat16 has no room for
    the top bit of a byte, which chooses between 2^7 and 2^8 to subtract instead.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    if DTYPE == tl.float32:
        q = ((words >> (INDEX * BITS)) & MASK).to(tl.float32) - OFFSET
    elif DTYPE == tl.float16:
        # Not shifted where it lies in the low byte: the product divides by its place, at no cost.
        SHIFT: tl.constexpr = INDEX * BITS % 8
        octet = words if INDEX * BITS < 8 else words >> 8
        bits = (octet & (MASK << SHIFT)) | 0x6400
        q = bits.to(tl.float16, bitcast=True) * (2.0**-SHIFT) - (2.0 ** (10 - SHIFT) + OFFSET)
    elif BITS == 4:
        bits = ((words >> (INDEX * BITS)) & MASK) | 0x4300
        q = bits.to(tl.bfloat16, bitcast=True) - (2.0**7 + OFFSET)
    else:
        octet = words >> (INDEX * BITS)
        q = ((octet & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True)
        q -= ((octet & 0x80) ^ 0x4380).to(tl.bfloat16, bitcast=True)
    return q
