"""What numbers are kept in: the accumulator of each dtype, and the bits of a float inside a kernel."""

import torch
from torch import Tensor

from .dispatch import jit, tl

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """``tensor`` in its accumulator's dtype."""
    return tensor.to(accumulator(tensor.dtype))


@jit
def float_bits(x):
    """The bits of ``x`` as float32; bfloat16 by a shift, which is exact under the interpreter too."""
    if x.dtype == tl.bfloat16:
        return x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True)


@jit
def rounded(value, dtype: tl.constexpr):
    """``value`` (float32) in ``dtype``, to nearest, ties to even; NaN stays NaN.

    By integer arithmetic: a GPU rounds like this when it stores bfloat16, Triton's interpreter truncates.
    """
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # Adding to a NaN's payload may carry into its sign and make it a zero.
        bits = tl.where(value == value, even, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return value.to(dtype)
