"""What an instruction computes, thread by thread.

A register is an unsigned numpy array ``[threads]`` of its width, or one number where all threads have the
same; a predicate is of bools. The type that an opcode ends in says as what the bits are read.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

Register = Any  # np.ndarray or a numpy number
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

noise = 0.0
"""How much of its documented error an approximate instruction makes; 0: it is exact."""


class Unknown(Exception):
    """An instruction that the emulator does not know."""


def numpy_type(name: str) -> Any:
    """``s32``, ``u64``, ``b16``, ``f32``... as numpy has it."""
    kinds = {"s": SIGNED, "u": UNSIGNED, "b": UNSIGNED, "f": FLOAT}
    return kinds[name[0]][int(name[1:])]


def bits_of(value: Any, dtype: Any) -> Register:
    """``value`` as ``dtype``, its bits unsigned."""
    value = np.asarray(value).astype(dtype, copy=False)
    return value.view(UNSIGNED[8 * value.itemsize])[()]


def _typed(function: Callable[..., Any], name: str) -> Callable[..., Register]:
    dtype = numpy_type(name)
    return lambda *values: bits_of(function(*(v.view(dtype) for v in values)), dtype)


def merge(guard: Register, new: Register, old: Register) -> Register:
    """``new`` in the threads where the guard holds; None of a load that no thread made."""
    return old if new is None else np.where(guard, new, old).astype(new.dtype, copy=False)


def widen(value: Register, dtype: Any, signed: bool) -> Register:
    """A narrow element in a wider register."""
    if value is None:
        return None
    return (value.view(SIGNED[8 * value.itemsize]) if signed else value).astype(dtype)


# --- numbers ---


def _divide(a: Any, b: Any) -> Any:
    """Towards zero; what a division by zero gives is not defined."""
    b = np.where(b == 0, 1, b)
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _remainder(a: Any, b: Any) -> Any:
    return a - _divide(a, b) * b


def _shift(left: bool) -> Callable[[Any, Any], Any]:
    """By more than the width leaves nothing, or the sign alone."""

    def shift(a: Any, by: Any) -> Any:
        width = 8 * a.dtype.itemsize
        most = np.minimum(by, width - 1).astype(a.dtype)
        moved = np.left_shift(a, most) if left else np.right_shift(a, most)
        keeps = not left and np.issubdtype(a.dtype, np.signedinteger)
        return moved if keeps else np.where(by < width, moved, 0)

    return shift


def _approximate(function: Callable[..., Any], ulps: int) -> Callable[..., Any]:
    """``function``, off by a share of ``ulps`` that its result decides: the same each time, as on a GPU."""

    def inexact(*values: Any) -> Any:
        result = np.asarray(function(*values), np.float32)
        if not noise:
            return result
        mixed = (result.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> 40
        share = mixed.astype(np.float64) / 2**23 - 1
        return (result * (1 + share * ulps * noise * 2.0**-24)).astype(np.float32)

    return inexact


def _flushed(a: Any) -> Any:
    """Without subnormal numbers."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def _fma(a: Any, b: Any, c: Any) -> Any:
    wide = np.float64 if a.dtype == np.float32 else a.dtype
    return a.astype(wide) * b.astype(wide) + c.astype(wide)


def _high(a: Any, b: Any) -> Any:
    wide = np.int64 if a.dtype == np.int32 else np.uint64
    return (a.astype(wide) * b.astype(wide)) >> wide(32)


def _population(a: Any) -> Any:
    return np.bitwise_count(a)


SIMPLE: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "mul.lo": operator.mul,
    "add.rn": operator.add, "sub.rn": operator.sub, "mul.rn": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c, "mul.hi": _high, "fma.rn": _fma,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "neg": operator.neg, "abs": np.abs, "min": np.minimum, "max": np.maximum,
    "min.relu": lambda a, b: np.maximum(np.minimum(a, b), 0),
    "max.relu": lambda a, b: np.maximum(np.maximum(a, b), 0),
    "div": _divide, "rem": _remainder, "div.rn": operator.truediv, "sqrt.rn": np.sqrt,
    "rcp.rn": lambda a: 1 / a,
    "div.full": _approximate(operator.truediv, 2),
    "sqrt.approx": _approximate(np.sqrt, 1), "ex2.approx": _approximate(np.exp2, 2),
    "lg2.approx": _approximate(np.log2, 2),
    "popc": _population,
}  # fmt: skip
FOR_FLOATS = {"min": np.fmin, "max": np.fmax}

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "lo": operator.lt, "ls": operator.le,
    "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def _compare(how: str, name: str) -> Callable[[Register, Register], Register]:
    """Of floats, NaN compares as false; with ``u`` behind the comparison as true."""
    dtype = numpy_type(name)
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)

    def compare(a: Register, b: Register) -> Register:
        a, b = a.view(dtype), b.view(dtype)
        if how in ("nan", "num"):
            return unordered(a, b) == (how == "nan")
        result = COMPARISONS[how[:2]](a, b)
        if name[0] != "f":
            return result
        nan = unordered(a, b)
        return result | nan if len(how) == 3 else result & ~nan

    return compare


def _wide(name: str) -> Callable[..., Register]:
    narrow, wide = numpy_type(name), numpy_type(f"{name[0]}{2 * int(name[1:])}")

    def multiply(a: Register, b: Register, c: Register | None = None) -> Register:
        product = bits_of(a.view(narrow).astype(wide) * b.view(narrow).astype(wide), wide)
        return product if c is None else product + c

    return multiply


def permute(a: Register, b: Register, selector: Register) -> Register:
    """``prmt``: each byte of the result is one of the eight of ``a`` and ``b``, or its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for i in range(4):
        chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint8)
        sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
        byte = np.where(chosen & np.uint32(8), sign, byte)
        result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
    return result


def extract(name: str) -> Callable[[Register, Register, Register], Register]:
    """``bfe``: ``length`` bits from ``position`` on, the sign of them before them if they are signed."""

    def field(a: Register, position: Register, length: Register) -> Register:
        high = np.uint32(32) - position - length
        return bits_of((a << high).view(numpy_type(name)) >> (np.uint32(32) - length).astype(numpy_type(name)), numpy_type(name))  # fmt: skip

    return field


def _halves(function: Callable[[Any, Any], Any]) -> Callable[..., Register]:
    """On the two 16-bit halves of a register."""

    def both(a: Register, b: Register) -> Register:
        low, high = (
            function(x, y).astype(np.uint32) & np.uint32(0xFFFF)
            for x, y in ((a & np.uint32(0xFFFF), b & np.uint32(0xFFFF)), (a >> np.uint32(16), b >> np.uint32(16)))
        )  # fmt: skip
        return low | (high << np.uint32(16))

    return both


# --- conversions ---


def to_bfloat16(a: Any) -> Register:
    """Float32 to the nearest, ties to even."""
    a = np.asarray(a, np.float32)
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)[()]


def from_bfloat16(a: Register) -> Any:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def convert(opcode: str) -> Callable[..., Register]:
    """``cvt``: numbers of one type in another."""
    *modifiers, to, of = opcode.split(".")[1:]
    if to in ("bf16x2", "f16x2"):
        half = convert(f"cvt.rn.{to.removesuffix('x2')}.{of}")
        return lambda high, low: (
            half(low).astype(np.uint32) | (half(high).astype(np.uint32) << np.uint32(16))
        )
    read = from_bfloat16 if of == "bf16" else lambda a: a.view(numpy_type(of))
    if to == "bf16":
        return lambda a: to_bfloat16(read(a))
    target = numpy_type(to)
    rounding = next((m for m in modifiers if m in ("rni", "rzi", "rmi", "rpi")), None)

    def result(a: Register) -> Register:
        value = read(_narrowed(a, of))
        if rounding is not None:
            value = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](
                value
            )
            if to[0] != "f":
                limits = np.iinfo(target)
                value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
        # No register is of 8 bits: the number is extended to 16.
        wide = {"s8": np.int16, "u8": np.uint16}.get(to)
        return bits_of(value, target) if wide is None else bits_of(value.astype(target), wide)

    return result


def _narrowed(a: Register, name: str) -> Register:
    """The low bits of a register that is wider than what it holds."""
    width = 16 if name == "bf16" else int(name[1:])
    return a.astype(UNSIGNED[width], copy=False) if a.dtype.itemsize * 8 > width else a


@functools.cache
def operation(opcode: str) -> Callable[..., Register]:
    """What ``opcode`` computes of its operands. Raises Unknown."""
    base, _, name = opcode.rpartition(".")
    first = base.split(".")[0]
    if first == "cvt":
        return convert(opcode)
    if first == "setp":
        return _compare(base.split(".")[1], name)
    if first == "selp":
        return lambda a, b, chosen: merge(chosen, a, b)
    if base in ("mul.wide", "mad.wide"):
        return _wide(name)
    if first in ("shl", "shr"):
        move = _shift(first == "shl")
        return lambda a, by: bits_of(move(a.view(numpy_type(name)), by), numpy_type(name))
    if opcode == "prmt.b32":
        return permute
    if first == "bfe":
        return extract(name)
    if name == "s16x2" and base in ("add", "sub"):
        return _halves(SIMPLE[base])
    if name == "pred" and base in SIMPLE:
        return SIMPLE[base]
    if base == "popc":
        return lambda a: np.asarray(_population(a)).astype(np.uint32)[()]
    flushes, base = ".ftz" in base, base.replace(".ftz", "")
    function = (FOR_FLOATS if name[0] == "f" else {}).get(base) or SIMPLE.get(base)
    if function is None or name[0] not in "sbuf":
        raise Unknown(opcode)
    if flushes:
        exact = function
        function = lambda *values: _flushed(exact(*map(_flushed, values)))
    return _typed(function, name)
