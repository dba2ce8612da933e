"""What the update reads and writes: a parameter's state, in the forms it can be stored in.

**Split masters.** A float32 weight is a bfloat16 and a 16-bit remainder, 4 bytes together, and the
bfloat16 half is what products take:

    hi = (bits + 0x8000) >> 16      the nearest bfloat16, ties away from zero
    lo = bits - (hi << 16)          in [-0x8000, 0x7fff]
    bits = (hi << 16) + lo          exact, for every finite or infinite float32

Rounding to nearest *even* would need lo = 0x8000 at half of the ties, one more than 16 bits hold, and
truncation would bias every operand towards zero. NaN keeps being NaN but loses its payload.

**8-bit moments.** Both are logarithmic: code 0 is zero, code c is ``scale · 2^((c - top) / 8)``, 9 % a
step, with the row's largest element as its scale. ``m`` is int8 with its sign, top = 127, a range of
2^15.75; ``v`` is uint8, top = 255, 2^31.75. A linear code for ``m`` would spend its levels on the few
dimensions of a residual stream that are a hundred times larger than the rest. Rounding is stochastic
with an exact mean: a decay of 0.1 % a step is far less than one code, and rounding to nearest would undo
it every time. Only a ``v`` below the range is rounded up, never to zero, since it divides. Two runs are
bit-identical: the random ``u`` in [0, 1) are 16 bits each, for both moments of four columns, of a hash of
(step, latent, column / 4). Their effect on quality is measured in ``kernels/README.md``.

Few instructions code a number ``r``, a share of the scale. Between the codes' ``low <= r <= high`` it goes up
where ``u >= (high - r) / (high - low)``, which is ``r / (1 - (1 - 2^(-1/8)) u) >= high``: so grown it is
rounded down. The upper 12 bits of a float count eighths of its binade, each of which ends within one code or
at it: the number is below or not below one power of two, and that is its code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import jit, tl
from ..dtypes import TINY
from ..sparse import CSC

CODES_PER_BINADE = 8
# What a scale is above the largest element, so that with rounding errors none is above the scale.
MARGIN = tl.constexpr(1 + 2**-20)
SHRINK = tl.constexpr(1 - 2 ** (-1 / 8))
# The smallest m above zero.
LOWEST = tl.constexpr(2 ** (-126 / 8))


class MatrixState(NamedTuple):
    """A ``[F, D]`` parameter and its Adam moments: what :func:`fused_update_` updates."""

    weight: Tensor  # [F, D] float32 (float64 on torch), bfloat16 if split: what products take
    m: Tensor  # [F, D] as the master, or int8
    v: Tensor  # [F, D] as the master, or uint8
    remainder: Tensor | None = None  # [F, D] int16, the lower half of a split master
    m_scale: Tensor | None = None  # [F] float32, of 8-bit moments
    v_scale: Tensor | None = None  # [F] float32

    @classmethod
    def start(
        cls, master: Tensor, *, split: bool = False, quantized_moments: bool = False
    ) -> "MatrixState":
        """Zero moments for ``master [F, D]``, which is used in place unless it is split.

        Raises ValueError for a split or 8-bit state of anything but float32.
        """
        if (split or quantized_moments) and master.dtype != torch.float32:
            raise ValueError(f"split masters, 8-bit moments: expected float32, got {master.dtype}")
        weight, remainder = split_master(master) if split else (master, None)
        if not quantized_moments:
            return cls(weight, torch.zeros_like(master), torch.zeros_like(master), remainder)
        m, v = (torch.zeros_like(master, dtype=d) for d in (torch.int8, torch.uint8))
        scales = (master.new_zeros(len(master)) for _ in range(2))
        return cls(weight, m, v, remainder, *scales)

    def master(self) -> Tensor:
        """The master weight ``[F, D]``; of a split one, a joined copy."""
        return self.weight if self.remainder is None else join_master(self.weight, self.remainder)

    def set_master_(self, master: Tensor) -> None:
        """Write ``master [F, D]`` float32, in the form it is stored in."""
        weight = master
        if self.remainder is not None:
            weight, remainder = split_master(master)
            self.remainder.copy_(remainder)
        self.weight.copy_(weight)

    def moments(self) -> tuple[Tensor, Tensor]:
        """``m`` and ``v`` ``[F, D]``, decoded if they are 8-bit."""
        if self.m_scale is None or self.v_scale is None:
            return self.m, self.v
        return decode_moment(self.m, self.m_scale), decode_moment(self.v, self.v_scale)


class BiasState(NamedTuple):
    """A bias and its Adam moments, all of one shape, float32 (float64 on torch)."""

    weight: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def start(cls, weight: Tensor) -> "BiasState":
        """Zero moments for ``weight``, which is used in place."""
        return cls(weight, torch.zeros_like(weight), torch.zeros_like(weight))


class Parameters(NamedTuple):
    W_enc: MatrixState
    b_enc: BiasState
    W_dec: MatrixState
    b_dec: Tensor  # [D]
    b_dec_moments: tuple[Tensor, ...] = ()  # m and v; without them b_dec is left alone
    first_row: int = 0  # which of all latents the first of these is


class AuxGradients(NamedTuple):
    """Gradient terms of ``n`` dead latents, which aux-k computed, and a way to find them."""

    W_enc: Tensor  # [n, D] float32 (float64 on torch)
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, D]
    slots: Tensor  # [F] int32: the row of each latent, -1 for none


class Batch(NamedTuple):
    """What the gradients of one batch are computed from."""

    values: Tensor  # [K], the CSR's
    csc: CSC
    x: Tensor  # [B, D]
    dY: Tensor  # [L, B, D], to be multiplied by dY_scale
    dY_scale: float
    aux: AuxGradients | None
    levels: Tensor | None = None  # [L] int32, where L > 1: latent f is of the first above it
    tied: bool = True  # x is centred by b_dec, which is the output's bias too

    def output_gradient(self, dtype: torch.dtype) -> Tensor:
        """The gradient ``[D]`` of a bias of the output."""
        return self.dY[0].sum(0, dtype=dtype) * self.dY_scale


class Adam(NamedTuple):
    """How to step."""

    lr: Tensor  # []
    step: Tensor  # [] int64, counts from 1
    clip: Tensor | None  # [], what gradients are multiplied by
    beta1: float
    beta2: float
    eps: float
    decoder_lr_ratio: float  # W_dec's learning rate is as many times lr


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """``(bfloat16 weight, int16 remainder)`` of a float32 tensor."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.contiguous().view(torch.int32))
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that :func:`split_master` split."""
    high = weight.view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


def _mix(h: Tensor) -> Tensor:
    # lowbias32 (Wellons), in 64-bit integers of which the lower 32 bits count.
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _uniform(block: Tensor, first: int, step: Tensor) -> Tensor:
    """A number in [0, 1) for each element of a moment's rows from ``first`` on."""
    rows, columns = (torch.arange(n, device=block.device) for n in block.shape)
    quads = columns[::4] // 4
    h = _mix(_mix(_mix(step.long()) ^ (rows + first))[:, None] ^ quads)
    h = h & 0xFFFF if block.dtype == torch.int8 else h >> 16
    return (h[:, columns // 4].to(torch.float32) + 0.5) / 2**16


def decode_moment(code: Tensor, scale: Tensor) -> Tensor:
    """The float32 moment ``[rows, D]`` of int8 (``m``) or uint8 (``v``) codes, scales ``[rows]``."""
    top = torch.iinfo(code.dtype).max
    signed = code.float()
    value = torch.exp2((signed.abs() - top) / CODES_PER_BINADE)
    return value * (signed.sign() * scale[:, None])


def encode_moment_(code: Tensor, scale: Tensor, value: Tensor, first: int, step: Tensor) -> None:
    """Write a block of rows ``value`` as ``code`` and ``scale``; the first is of latent ``first``."""
    top, size, u = torch.iinfo(code.dtype).max, value.abs(), _uniform(code, first, step)
    torch.amax(size, 1, out=scale)
    scale *= MARGIN.value
    inverse = 1 / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    grown = size * (inverse / (1 - SHRINK.value * u))
    eighths = (grown.view(torch.int32) >> 20).clamp_min(1017 - top)
    up = grown >= torch.exp2((eighths - 1015) / CODES_PER_BINADE)
    least = u * (LOWEST.value * scale)[:, None] if code.dtype == torch.int8 else 0
    near = torch.where(size > least, eighths + (top - 1016) + up, 0)
    code.copy_(near * value.sign())


@jit
def load_master(weight_ptr, remainder_ptr, at, mask):
    """The float32 master; ``weight_ptr`` is int16 where there is a remainder."""
    weight = tl.load(weight_ptr + at, mask=mask, other=0)
    if remainder_ptr is None:
        return weight
    else:
        low = tl.load(remainder_ptr + at, mask=mask, other=0)
        return ((weight.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@jit
def store_master(weight_ptr, remainder_ptr, at, mask, master):
    if remainder_ptr is None:
        tl.store(weight_ptr + at, master, mask=mask)
    else:
        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
        high = (bits + 0x8000) >> 16
        tl.store(weight_ptr + at, high.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + at, (bits - (high << 16)).to(tl.int16), mask=mask)


@jit
def mix(h):
    """lowbias32 (Wellons) of a uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@jit
def load_moment(ptr, scale_ptr, row, at, mask):
    """One row of a moment as it is stored, and its scale."""
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row)
    return tl.load(ptr + at, mask=mask, other=0), scale


@jit
def decoded_moment(moment, scale, TOP: tl.constexpr):
    """The float32 moment that :func:`load_moment` gave. TOP: 127 for m, 255 for v."""
    if moment.dtype == tl.float32:
        return moment
    else:
        code = moment.to(tl.float32)
        sign = tl.minimum(code, 1.0)
        if TOP == 127:
            sign = tl.maximum(sign, -1.0)
        return tl.exp2(tl.abs(code) * 0.125 - TOP * 0.125) * (sign * scale)


@jit
def store_moment(
    ptr, scale_ptr, row, first_row, at, columns, mask, moment, step,
    TOP: tl.constexpr,
):  # fmt: skip
    """Masked columns of ``moment`` are zero; the row is the latent ``first_row + row`` of all."""
    if scale_ptr is None:
        tl.store(ptr + at, moment, mask=mask)
    else:
        key = mix(step.to(tl.uint32)) ^ (first_row + row).to(tl.uint32)
        h = mix(mix(key) ^ (columns // 4).to(tl.uint32))
        h = h & 0xFFFF if TOP == 127 else h >> 16
        u = (h.to(tl.float32) + 0.5) * (1.0 / 65536)
        size = tl.abs(moment) if TOP == 127 else moment
        scale = tl.max(size, 0) * MARGIN
        tl.store(scale_ptr + row, scale)
        grown = size * ((1.0 / tl.maximum(scale, TINY)) / (1.0 - SHRINK * u))
        eighths = tl.maximum(grown.to(tl.int32, bitcast=True) >> 20, 1017 - TOP)
        # 2^23 and the number, by its bits: converting takes a slower unit. All of it is exact.
        number = (eighths | 0x4B000000).to(tl.float32, bitcast=True)
        above = tl.exp2(number * 0.125 - (8388608 + 1015) * 0.125)
        code = eighths + tl.where(grown >= above, TOP - 1015, TOP - 1016)
        if TOP == 127:
            code = tl.where(size > u * (LOWEST * scale), code, 0)
            code = tl.where(moment < 0, -code, code)
        else:
            code = tl.where(size > 0, code, 0)
        tl.store(ptr + at, code.to(ptr.dtype.element_ty), mask=mask)
