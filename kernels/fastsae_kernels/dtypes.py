"""Storing float32 in fewer bits, with the same bits on a GPU and in the interpreter.

Triton's interpreter truncates where a GPU rounds to nearest even when it stores bfloat16, so values
are made representable by integer arithmetic before they are stored.
"""

from .dispatch import jit, tl


@jit
def rounded(value, dtype: tl.constexpr):
    """``value`` (float32) in ``dtype``, to nearest, ties to even; NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # Adding to a NaN's payload may carry into its sign and make it a zero.
        bits = tl.where(value == value, even, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return value.to(dtype)
