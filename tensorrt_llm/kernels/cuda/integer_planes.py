"""Integers of 8 or 4 bits out of int16 words, one of each word at a time: a plane has the shape of the words.

They stand in offset binary, q + 2^(bits - 1). Shared by the weight-only matmuls and by attention over an int8 KV cache,
which both feed planes to tensor cores. Knows nothing of what the integers mean.

In 16 bits no conversion is needed, and one instruction takes two words: the last bit of 2^10 in float16, of 2^7 in
bfloat16, is worth one, so an unsigned integer put in that place is the float plus the integer. The compiler spends an
instruction on each of the two constants of (words & mask) | float, and on taking pairs of words apart; PTX does not.
"""

# mypy: allow-untyped-defs
# The arguments of a kernel are Triton's values, for which Python has no types.

import triton
import triton.language as tl

# Triton's interpreter knows no PTX: it, and types without a PTX form here, take the plain one.
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def integer_plane(words, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The q in bits INDEX * BITS and up of int16 words, in DTYPE and exact."""
    if HAS_PTX and (DTYPE == tl.float16 or (DTYPE == tl.bfloat16 and BITS == 4)):
        bits = tl.inline_asm_elementwise(
            two_words_ptx(INDEX, BITS, DTYPE == tl.float16), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
        q = bits.to(DTYPE, bitcast=True)
    else:
        q = _plain_plane(words, INDEX, BITS, DTYPE)
    return q


@triton.constexpr_function
def two_words_ptx(index, bits, is_half):
    """((words >> shift & mask) | ones) * factor + addend, in each half of a register."""
    if not is_half:
        shift, mask, ones, factor, addend = 4 * index, "000f", "4300", "3f80", "c308"  # * 1 - (128 + 8)
    elif bits == 8:
        shift, mask, ones, factor, addend = 8 * index, "00ff", "6400", "3c00", "e480"  # * 1 - (1024 + 128)
    elif index % 2:
        # Not shifted where it lies in the low byte: the product divides by its place, at no cost.
        shift, mask, ones, factor, addend = 4 * index - 4, "00f0", "6400", "2c00", "d480"  # / 16 - (64 + 8)
    else:
        shift, mask, ones, factor, addend = 4 * index, "000f", "6400", "3c00", "e408"  # * 1 - (1024 + 8)
    return f"""{{
        .reg .b32 bits, ones, factor, addend;
        mov.b32 ones, 0x{ones}{ones};
        mov.b32 factor, 0x{factor}{factor};
        mov.b32 addend, 0x{addend}{addend};
        shr.b32 bits, $1, {shift};
        lop3.b32 bits, bits, 0x{mask}{mask}, ones, 0xea;
        fma.rn.{"f16x2" if is_half else "bf16x2"} $0, bits, factor, addend;
    }}"""


@triton.jit
def _plain_plane(words, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
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
        # Bfloat16 has no room for the top bit of a byte, which chooses between 2^7 and 2^8 to subtract instead.
        octet = words >> (INDEX * BITS)
        q = ((octet & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True)
        q -= ((octet & 0x80) ^ 0x4380).to(tl.bfloat16, bitcast=True)
    return q
