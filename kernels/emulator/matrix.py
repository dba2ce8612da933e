"""Matrix products, and the copies that feed them: what warps and groups of four warps do together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arithmetic import Register, from_bfloat16
from .memory import Fault
from .program import LANES, Program

ROW = 16  # bytes of a row of an 8 x 8 matrix of 16-bit numbers


def load_matrices(
    program: Program, address: Register, count: int, transposed: bool, line: int
) -> list[Register]:
    """``ldmatrix``: of each warp ``count`` 8 x 8 matrices, whose rows the lanes point at in turn."""
    at = _rows(program, address, count, line, writes=False)  # [warps, count, 8]
    bytes_ = program.shared.bytes[at[..., None] + np.arange(ROW)]
    matrices = np.ascontiguousarray(bytes_).view(np.uint16)  # [warps, count, 8, 8]
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    pairs = matrices.view(np.uint32)  # [warps, count, 8, 4]: of lane 4 r + c
    return [pairs[:, i].reshape(-1) for i in range(count)]


def store_matrices(
    program: Program, address: Register, values: list[Register], transposed: bool, line: int
) -> None:
    """``stmatrix``, the inverse of :func:`load_matrices`."""
    at = _rows(program, address, len(values), line, writes=True)
    for i, value in enumerate(values):
        pairs = np.ascontiguousarray(program.all(value)).view(np.uint16).reshape(-1, 8, 8)
        if transposed:
            pairs = np.ascontiguousarray(pairs.swapaxes(1, 2))
        rows = np.ascontiguousarray(pairs).view(np.uint8)
        program.shared.bytes[at[:, i, :, None] + np.arange(ROW)] = rows


def _rows(
    program: Program, address: Register, count: int, line: int, *, writes: bool
) -> np.ndarray:
    lanes = program.warps(address)[:, : 8 * count].astype(np.int64)
    if (lanes % ROW).any():
        raise Fault(f"{program.kernel}, line {line}: rows of a matrix that are not aligned")
    warps = np.repeat(np.arange(len(lanes), dtype=np.int32), 8 * count)
    program.note_shared(lanes.reshape(-1), ROW, warps, line, writes=writes)
    return lanes.reshape(len(lanes), count, 8)


def copy_async(
    program: Program, to: Register, of: Register, size: int, have: Register, guard: Register | None, line: int
) -> None:  # fmt: skip
    """``cp.async``: ``size`` bytes to shared memory, of which ``have`` are there and the rest is zero.

    It is done at once: whether it is waited for is not seen.
    """
    active = program.active(guard)
    there = active & (program.all(have) > 0)
    if not np.isin(program.all(have)[there], [size]).all():
        raise Fault(f"{program.kernel}, line {line}: part of an asynchronous copy")
    vector = max(1, size // 4)
    words = program.load(of, size // vector, vector, there, line)
    zero = np.zeros(program.threads, np.uint32)
    values = [
        zero if w is None else np.where(there, program.all(_whole(w, there)), 0) for w in words
    ]
    program.store_shared(to, values, size // vector, active, line)


def _whole(values: np.ndarray, active: np.ndarray) -> np.ndarray:
    if len(values) == len(active):
        return values
    whole = np.zeros(len(active), values.dtype)
    whole[active] = values
    return whole


# --- barriers in memory, and copies by descriptors ---


@dataclass
class Barrier:
    """``mbarrier``: a phase ends when all have arrived and all bytes that were announced are there."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


def begin_barrier(program: Program, address: Register, count: int, guard: Register | None) -> None:
    for at in program.all(address)[program.active(guard)]:
        program.barriers[int(at)] = Barrier(count, count)


def end_barrier(program: Program, address: Register, guard: Register | None) -> None:
    for at in program.all(address)[program.active(guard)]:
        program.barriers.pop(int(at), None)


def expect(program: Program, address: Register, size: int, guard: Register | None) -> None:
    """Arrive, and announce ``size`` bytes."""
    for at in program.all(address)[program.active(guard)]:
        barrier = program.barriers[int(at)]
        barrier.bytes, barrier.pending = barrier.bytes + size, barrier.pending - 1
        barrier.settle()


def wait(program: Program, address: Register, parity: Register, line: int) -> Register:
    """Whether the phase of ``parity`` has ended; copies are done at once, so it has or never will."""
    at, of = int(program.all(address)[0]), int(program.all(parity)[0])
    if program.barriers[at].phase == of:
        raise Fault(f"{program.kernel}, line {line}: waits for ever")
    return np.bool_(True)


@dataclass(frozen=True)
class Descriptor:
    """What a tensor descriptor says of ``tensor``: blocks ``[rows, columns]``, and how they lie."""

    tensor: Tensor
    block: tuple[int, int]
    swizzle: int


SWIZZLED = 3  # rows of 128 bytes, 16-byte pieces exchanged by the number of the row


def copy_block(
    program: Program, to: Register, descriptor: Register, place: list[Register], barrier: Register,
    guard: Register | None, line: int,
) -> None:  # fmt: skip
    """A block of a tensor to shared memory, zero outside of it."""
    for thread in np.nonzero(program.active(guard))[0]:
        one = lambda value, thread=thread: int(program.all(value)[thread])
        about = program.descriptors[one(descriptor)]
        column, row = (one(p.view(np.int32)) for p in place)
        rows, columns = about.block
        size = about.tensor.element_size()
        if about.swizzle != SWIZZLED or columns * size != 128:
            raise Fault(f"{program.kernel}, line {line}: a layout that the emulator does not know")
        block = torch.zeros(rows, columns, dtype=about.tensor.dtype)
        part = about.tensor[max(row, 0) : row + rows, max(column, 0) : column + columns]
        block[: part.shape[0], : part.shape[1]] = part
        base = one(to)
        if base % 1024:
            raise Fault(f"{program.kernel}, line {line}: the copy of a block is not aligned")
        flat = np.arange(rows)[:, None] * 128 + np.arange(128)
        at = base + (flat ^ (((flat >> 7) & 7) << 4))
        program.shared.bytes[at] = block.view(torch.uint8).numpy().reshape(rows, 128)
        program.shared.written[at] = True
        waiting = program.barriers[one(barrier)]
        waiting.bytes -= rows * 128
        waiting.settle()


# --- products ---

WARPGROUP = 4 * LANES


def multiply(
    program: Program, sums: list[Register], a: Register, b: Register, keep: Register,
    shape: tuple[int, int, int], kind: str, line: int,
) -> list[Register]:  # fmt: skip
    """``wgmma``: ``sums + A @ B`` of operands in shared memory, a product for each group of four warps.

    ``shape`` is ``(M, N, K)``; sums are of float32, in the order of numpy's product.
    """
    M, N, K = shape
    size = 4 if kind == "tf32" else 2
    result = [program.all(s).copy().view(np.float32) for s in sums]
    program.flops += 2 * M * N * K * (program.threads // WARPGROUP)
    descriptors, keeps = (program.all(a), program.all(b)), program.all(keep)
    for first in range(0, program.threads, WARPGROUP):
        group = slice(first, first + WARPGROUP)
        if any(len(np.unique(d[group])) > 1 for d in descriptors):
            raise Fault(f"{program.kernel}, line {line}: operands differ within a group of warps")
        A, B = (
            _numbers(_operand(program, int(d[first]), rows, K * size), kind)
            for d, rows in zip(descriptors, (M, N), strict=True)
        )
        product = A @ B.T
        thread = np.arange(WARPGROUP)
        row, column = thread // LANES * 16 + thread % LANES // 4, thread % 4 * 2
        for i, total in enumerate(result):
            block, half, pair = i // 4, i // 2 % 2, i % 2
            before = np.where(keeps[group], total[group], np.float32(0))
            total[group] = before + product[row + 8 * half, block * 8 + column + pair]
    return [total.view(np.uint32) for total in result]


def _operand(program: Program, descriptor: int, rows: int, columns: int) -> np.ndarray:
    """Bytes ``[rows, columns]`` of a matrix, as its descriptor says that it lies."""
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    width, mask = {1: (128, 7), 2: (64, 3), 3: (32, 1)}[descriptor >> 62]
    row = np.arange(rows)
    at = start + (row // 8 * stride + row % 8 * width)[:, None] + np.arange(columns)
    return np.ascontiguousarray(program.shared.bytes[at ^ (((at >> 7) & mask) << 4)])


def _numbers(operand: np.ndarray, kind: str) -> Any:
    if kind == "bf16":
        return from_bfloat16(operand.view(np.uint16))
    if kind == "f16":
        return operand.view(np.float16).astype(np.float32)
    return (operand.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)  # tf32
