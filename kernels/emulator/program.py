"""One program of a launch: its threads in lockstep, its shared memory, its view of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arithmetic import UNSIGNED, Register
from .memory import WORD, Fault, Memory, Races, Shared

LANES = 32


class Program:
    """What the translated instructions call. ``count`` of them have been executed by every warp.

    A guard is a register of bools, or None where the instruction is not guarded; ``line`` is the PTX's.
    """

    def __init__(
        self,
        kernel: str,
        threads: int,
        memory: Memory,
        shared_bytes: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: list[Any],
        races: Races,
    ) -> None:
        self.kernel, self.threads, self.memory, self.races = kernel, threads, memory, races
        self.number = place[0] + grid[0] * (place[1] + grid[1] * place[2])
        self.shared = Shared(shared_bytes)
        self.parameters = parameters
        self.thread = np.arange(threads, dtype=np.uint32)
        self.warp = (np.arange(threads) // LANES).astype(np.int32)
        self.lane = self.thread % np.uint32(LANES)
        self.special = {"%tid.x": self.thread, "%laneid": self.lane}
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.uint32(place[i])
            self.special[f"%nctaid.{axis}"] = np.uint32(grid[i])
        self.stretch = 0  # since the last barrier
        self.barriers: dict[int, Any] = {}  # mbarriers, by address
        self.descriptors: dict[
            int, Any
        ] = {}  # of tensors, by the number that stands for the address
        self.count = 0
        self.flops = 0  # of matrix products

    # --- registers ---

    def all(self, value: Register) -> np.ndarray:
        """One value a thread."""
        return np.broadcast_to(np.asarray(value), (self.threads,))

    def active(self, guard: Register | None) -> np.ndarray:
        return np.ones(self.threads, bool) if guard is None else self.all(guard)

    def warps(self, value: Register) -> np.ndarray:
        return self.all(value).reshape(-1, LANES)

    def branches(self, guard: Register, line: int) -> bool:
        """Whether a branch is taken, by all threads or by none."""
        if np.all(guard):
            return True
        if np.any(guard):
            raise Fault(f"{self.kernel}, line {line}: threads of a program part at a branch")
        return False

    def _races(self, kinds: set[str], buffer: str, line: int) -> None:
        for kind in kinds:
            self.races.add(self.kernel, kind, buffer, f"line {line}")

    def _spread(self, found: list[np.ndarray], active: np.ndarray) -> list[Register]:
        if active.all():
            return found
        spread = []
        for values in found:
            whole = np.zeros(self.threads, values.dtype)
            whole[active] = values
            spread.append(whole)
        return spread

    # --- the tensors' memory ---

    def located(self, addresses: np.ndarray, size: int, line: int, *, writes: bool):
        """The buffers that ``addresses`` are in, which of them, and their offsets there. Raises Fault."""
        try:
            for buffer, here, offsets in self.memory.locate(addresses, size):
                if ((offsets + buffer.base) % size).any():
                    raise Fault(f"{size} bytes of {buffer.name} that are not aligned")
                yield buffer, here, offsets
        except Fault as fault:
            raise Fault(f"{self.kernel}, line {line}: {fault}") from None

    def load(
        self, address: Register, size: int, vector: int, guard: Register | None, line: int
    ) -> list[Register]:
        """``vector`` registers of ``size`` bytes each; None for each if no thread loads."""
        active = self.active(guard)
        if not active.any():
            return [None] * vector
        addresses = self.all(address)[active]
        found = [np.empty(len(addresses), UNSIGNED[8 * size]) for _ in range(vector)]
        for buffer, here, offsets in self.located(addresses, size * vector, line, writes=False):
            self._note_read(buffer, offsets, size * vector, self.warp[active][here], line)
            elements, skip = buffer.view(size)
            for i in range(vector):
                found[i][here] = elements[(offsets - skip) // size + i]
        return self._spread(found, active)

    def _note_read(self, buffer, offsets, size: int, warp: np.ndarray, line: int) -> None:
        for words in buffer.words(offsets, size):
            kinds = buffer.ledger.read(words, self.number, warp, self.stretch)
            self._races(kinds, buffer.name, line)

    def store(
        self, address: Register, values: Sequence[Register], size: int, guard: Register | None, line: int
    ) -> None:  # fmt: skip
        active = self.active(guard)
        if not active.any():
            return
        addresses, width = self.all(address)[active], size * len(values)
        new = [self.all(value)[active].astype(UNSIGNED[8 * size]) for value in values]
        for buffer, here, offsets in self.located(addresses, width, line, writes=True):
            elements, skip = buffer.view(size)
            places = [(offsets - skip) // size + i for i in range(len(new))]
            same = np.all(
                [elements[p] == v[here] for p, v in zip(places, new, strict=True)], axis=0
            )
            for words in buffer.words(offsets, width):
                warp = self.warp[active][here]
                kinds = buffer.ledger.write(words, self.number, warp, self.stretch, same)
                self._races(kinds, buffer.name, line)
            for place, value in zip(places, new, strict=True):
                elements[place] = value[here]
                if (elements[place] != value[here]).any():
                    kind = "threads of one instruction write different values"
                    self._races({kind}, buffer.name, line)

    def change(
        self, how: str, address: Register, value: Register, dtype: Any, guard: Register | None, line: int
    ) -> Register:  # fmt: skip
        """An atomic ``add``, ``max`` or ``min``; what stood there before, one thread after the other."""
        active = self.active(guard)
        size = np.dtype(dtype).itemsize
        before = np.zeros(self.threads, UNSIGNED[8 * size])
        addresses, values = self.all(address)[active], self.all(value)[active]
        for buffer, here, offsets in self.located(addresses, size, line, writes=True):
            for words in buffer.words(offsets, size):
                warp = self.warp[active][here]
                kinds = buffer.ledger.change(words, self.number, warp, self.stretch)
                self._races(kinds, buffer.name, line)
            elements, skip = buffer.view(size)
            places = np.nonzero(active)[0][here]
            found = _change(
                elements.view(dtype), (offsets - skip) // size, values[here].view(dtype), how
            )
            before[places] = found.view(UNSIGNED[8 * size])  # fmt: skip
        return before

    # --- shared memory ---

    def _shared(self, address: Register, size: int, active: np.ndarray, line: int) -> np.ndarray:
        at = self.all(address)[active].astype(np.int64)
        try:
            self.shared.check(at, size)
        except Fault as fault:
            raise Fault(f"{self.kernel}, line {line}: {fault}") from None
        return at

    def note_shared(self, at: np.ndarray, size: int, warp: np.ndarray, line: int, *, writes: bool) -> None:  # fmt: skip
        """Of ``size`` bytes at each of ``at``: who touches them, and whether they were ever written."""
        ledger = self.shared.ledger
        for i in range(size):
            if writes:
                self.shared.written[at + i] = True
            elif not self.shared.written[at + i].all():
                self._races({"shared memory is read that nobody wrote"}, "shared memory", line)
                break
        for i in range(max(1, size // WORD)):
            words = at // WORD + i
            if writes:
                same = np.zeros(len(words), bool)
                kinds = ledger.write(words, 0, warp, self.stretch, same)
            else:
                kinds = ledger.read(words, 0, warp, self.stretch)
            self._races(kinds, "shared memory", line)

    def load_shared(
        self, address: Register, size: int, vector: int, guard: Register | None, line: int
    ) -> list[Register]:
        active = self.active(guard)
        if not active.any():
            return [None] * vector
        at = self._shared(address, size * vector, active, line)
        self.note_shared(at, size * vector, self.warp[active], line, writes=False)
        elements = self.shared.view(size)
        return self._spread([elements[at // size + i] for i in range(vector)], active)

    def store_shared(
        self, address: Register, values: Sequence[Register], size: int, guard: Register | None, line: int
    ) -> None:  # fmt: skip
        active = self.active(guard)
        at = self._shared(address, size * len(values), active, line)
        self.note_shared(at, size * len(values), self.warp[active], line, writes=True)
        for i, value in enumerate(values):
            self.shared.view(size)[at // size + i] = self.all(value)[active].astype(
                UNSIGNED[8 * size]
            )

    def change_shared(
        self, how: str, address: Register, value: Register, dtype: Any, guard: Register | None, line: int
    ) -> Register:  # fmt: skip
        active = self.active(guard)
        size = np.dtype(dtype).itemsize
        at = self._shared(address, size, active, line)
        kinds = self.shared.ledger.change(at // WORD, 0, self.warp[active], self.stretch)
        self._races(kinds, "shared memory", line)
        before = np.zeros(self.threads, UNSIGNED[8 * size])
        elements = self.shared.view(size).view(dtype)
        found = _change(elements, at // size, self.all(value)[active].view(dtype), how)
        before[active] = found.view(UNSIGNED[8 * size])
        return before

    # --- between threads ---

    def barrier(self) -> None:
        self.stretch += 1

    def shuffle(
        self, how: str, value: Register, by: Register, bounds: Register
    ) -> tuple[Register, Register]:
        """The value of another lane, and whether there is one."""
        lane = np.arange(LANES)
        by, bounds = self.warps(by).astype(np.int64), self.warps(bounds).astype(np.int64)
        if (bounds >> 8).any():
            raise Fault(f"{self.kernel}: a shuffle within parts of a warp")
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by + 0 * lane}[how]
        there = source >= (bounds & 31) if how == "up" else (source >= 0) & (source < LANES)
        source = np.where(there, source, lane)
        found = np.take_along_axis(self.warps(value), source, 1)
        return found.reshape(-1), there.reshape(-1)

    def ballot(self, value: Register) -> Register:
        bits = self.warps(value).astype(np.uint64) << np.arange(LANES, dtype=np.uint64)
        return np.repeat(bits.sum(1).astype(np.uint32), LANES)

    def reduce(self, how: str, value: Register, dtype: Any) -> Register:
        reduced = {"add": np.sum, "max": np.max, "min": np.min}[how]
        values = reduced(self.warps(value).view(dtype), axis=1).astype(dtype)
        return np.repeat(values.view(np.uint32), LANES)


def _change(memory: np.ndarray, at: np.ndarray, values: np.ndarray, how: str) -> np.ndarray:
    """``memory[at]`` changed by one value after the other; what each found."""
    operation = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}[how]
    before = np.empty_like(values)
    if len(np.unique(at)) == len(at):
        before[:] = memory[at]
        memory[at] = operation(before, values)
        return before
    if how == "add":
        order = np.argsort(at, kind="stable")
        sums = np.cumsum(values[order]) - values[order]
        first = np.searchsorted(at[order], at[order])
        before[order] = memory[at[order]] + (sums - sums[first])
        np.add.at(memory, at, values)
        return before
    for i, (place, value) in enumerate(zip(at, values, strict=True)):
        before[i] = memory[place]
        memory[place] = operation(memory[place], value)
    return before
