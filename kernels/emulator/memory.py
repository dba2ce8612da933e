"""Memory that tells who touched it: bounds, alignment, initialisation and races."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .arithmetic import UNSIGNED, Register

NOBODY, SEVERAL, ATOMIC = -1, -2, -3
WORD = 4
"""Bytes that are told apart, at most; a kernel's neighbours may share no more than an element."""


class Fault(RuntimeError):
    """What a GPU would do with this program is not defined, or not what was meant."""


@dataclass
class Races:
    """What was found, by kernel, kind and buffer: how often, and where first."""

    found: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(self, kernel: str, kind: str, buffer: str, where: str) -> None:
        self.found[kernel, kind, buffer] += 1
        self.first.setdefault((kernel, kind, buffer), where)


class Ledger:
    """Of each word: the program that wrote it last, its warp, and in which stretch between two barriers;
    the same of who read it."""

    def __init__(self, words: int) -> None:
        self._writer, self._write_warp, self._write_stretch = self._new(words)
        self._reader, self._read_warp, self._read_stretch = self._new(words)

    @staticmethod
    def _new(words: int) -> Iterator[np.ndarray]:
        return (np.full(words, NOBODY, np.int32) for _ in range(3))

    def read(self, at: np.ndarray, program: int, warp: np.ndarray, stretch: int) -> set[str]:
        races = set()
        if self._written_elsewhere(at, program).any():
            races.add("a program reads what another wrote")
        if self._written_beside(at, program, warp, stretch).any():
            races.add("a warp reads what another wrote, without a barrier")
        before = self._reader[at]
        self._reader[at] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        shared = (self._read_stretch[at] == stretch) & (self._read_warp[at] != warp)
        self._read_warp[at] = np.where(shared, SEVERAL, warp)
        self._read_stretch[at] = stretch
        return races

    def write(
        self, at: np.ndarray, program: int, warp: np.ndarray, stretch: int, same: np.ndarray
    ) -> set[str]:
        """``same``: where the value is the one that stands there."""
        races = set()
        elsewhere = self._written_elsewhere(at, program)
        if (elsewhere & ~same).any():
            races.add("two programs write")
        elif elsewhere.any():
            races.add("two programs write the same value")
        reader = self._reader[at]
        if ((reader == SEVERAL) | ((reader >= 0) & (reader != program))).any():
            races.add("a program writes what another read")
        beside = (self._read_stretch[at] == stretch) & (self._read_warp[at] != warp)
        if (beside & (reader != NOBODY)).any():
            races.add("a warp writes what another read, without a barrier")
        if self._written_beside(at, program, warp, stretch).any():
            races.add("two warps write, without a barrier")
        self._note_write(at, program, warp, stretch)
        return races

    def change(self, at: np.ndarray, program: int, warp: np.ndarray, stretch: int) -> set[str]:
        """By an atomic operation, which races with plain ones alone."""
        plain = (self._writer[at] != NOBODY) & (self._write_warp[at] != ATOMIC)
        beside = (self._write_stretch[at] == stretch) & (self._write_warp[at] != warp)
        other = (self._writer[at] != program) | beside
        races = {"an atomic operation beside a plain one"} if (plain & other).any() else set()
        self._note_write(at, program, np.full_like(at, ATOMIC), stretch)
        return races

    def _note_write(self, at: np.ndarray, program: int, warp: np.ndarray, stretch: int) -> None:
        self._writer[at], self._write_warp[at], self._write_stretch[at] = program, warp, stretch

    def _written_elsewhere(self, at: np.ndarray, program: int) -> np.ndarray:
        writer = self._writer[at]
        return (writer != NOBODY) & (writer != program)

    def _written_beside(
        self, at: np.ndarray, program: int, warp: np.ndarray, stretch: int
    ) -> np.ndarray:
        same = (self._writer[at] == program) & (self._write_stretch[at] == stretch)
        return same & (self._write_warp[at] != warp)


class Unwatched(Ledger):
    """Sees no race: for runs that only count."""

    def __init__(self, words: int) -> None:
        """Takes no memory."""

    def read(self, *_: Any, **__: Any) -> set[str]:
        return set()

    write = change = read


class Buffer:
    """The memory of the tensors of a launch that share it, from ``base`` on."""

    def __init__(self, base: int, size: int, name: str, element: int, ledger: type[Ledger]) -> None:
        self.base, self.size, self.name = base, size, name
        raw: Any = (ctypes.c_char * size).from_address(base)
        self.bytes = np.frombuffer(raw, np.uint8)
        self.word = min(element, WORD)
        self.ledger = ledger(size // self.word + 2)

    def words(self, offsets: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Numbers of the words of ``size`` bytes at ``offsets``, one after the other."""
        first = (offsets + self.base % self.word) // self.word
        return (first + i for i in range(max(1, size // self.word)))

    def view(self, size: int) -> tuple[np.ndarray, int]:
        """The elements of ``size`` bytes, and the offset of the first aligned one."""
        skip = -self.base % size
        count = max(0, self.size - skip) // size
        return self.bytes[skip : skip + count * size].view(UNSIGNED[8 * size]), skip


class Memory:
    """All that the tensors of a launch span: nothing else may be touched."""

    def __init__(self, tensors: list[tuple[str, Tensor]], ledger: type[Ledger] = Ledger) -> None:
        spans = []
        for name, tensor in tensors:
            if tensor.numel():
                ends = sum(
                    (s - 1) * by for s, by in zip(tensor.shape, tensor.stride(), strict=True)
                )
                element = tensor.element_size()
                spans.append((tensor.data_ptr(), (ends + 1) * element, name, element))
        merged: list[tuple[int, int, str, int]] = []
        for base, size, name, element in sorted(spans):
            if merged and base < merged[-1][0] + merged[-1][1]:
                b, s, n, e = merged[-1]
                names = n if name in n.split(" and ") else f"{n} and {name}"
                merged[-1] = b, max(s, base + size - b), names, min(e, element)
            else:
                merged.append((base, size, name, element))
        self.buffers = [Buffer(*span, ledger) for span in merged]
        self._bases = [buffer.base for buffer in self.buffers]

    def locate(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Buffer, Any, np.ndarray]]:
        """Buffers, which of ``addresses`` lie in each, and the offsets. Raises Fault outside of all."""
        left = np.ones(len(addresses), bool)
        while left.any():
            lowest = int(addresses[left].min())
            i = bisect_right(self._bases, lowest) - 1
            if i < 0:
                raise Fault(f"{size} bytes at {lowest:#x}, before every tensor")
            buffer = self.buffers[i]
            end = buffer.base + buffer.size
            if lowest >= end:
                raise Fault(f"{size} bytes, {lowest - end} past the end of {buffer.name}")
            here = left & (addresses >= np.uint64(buffer.base)) & (addresses < np.uint64(end))
            offsets = (addresses[here] - np.uint64(buffer.base)).astype(np.int64)
            if (offsets + size > buffer.size).any():
                raise Fault(f"{size} bytes that reach over the end of {buffer.name}")
            yield buffer, here, offsets
            left &= ~here


class Shared:
    """The memory that the threads of a program share. What was not written is not zero."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = np.full(-(-size // 8) * 8 + 8, 0xCD, np.uint8)
        self.written = np.zeros(len(self.bytes), bool)
        self.ledger = Ledger(len(self.bytes) // WORD)

    def check(self, at: np.ndarray, size: int) -> None:
        if (at % size).any():
            raise Fault(f"{size} bytes of shared memory that are not aligned")
        if len(at) and int(at.max()) + size > self.size:
            past = int(at.max()) + size - self.size
            raise Fault(f"{size} bytes of shared memory, {past} past its end")

    def view(self, size: int) -> Register:
        return self.bytes.view(UNSIGNED[8 * size])
