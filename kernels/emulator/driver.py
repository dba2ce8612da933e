"""Triton's own launches, compiled for a GPU and run here on CPU tensors."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from . import arithmetic, ptx
from .arithmetic import FLOAT, SIGNED
from .matrix import Descriptor
from .memory import Fault, Memory, Races
from .program import LANES, Program
from .translate import translate

CAPABILITY = 90
SHARED_BYTES = 232448  # of a program, at most
Order = Literal["random", "reversed", "normal"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass
class Count:
    """What was executed of a kernel."""

    warps: int
    launches: int = 0
    programs: int = 0
    instructions: int = 0  # by each warp, added up over programs

    @property
    def each(self) -> float:
        """Instructions of a warp of a program."""
        return self.instructions / max(1, self.programs)


@dataclass
class Emulator:
    """How launches run, and what was seen of them.

    Args:
        order: of a launch's programs.
        seed: of the random order.
        noise: share of their documented error that approximate instructions make.
    """

    order: Order = "random"
    seed: int = 0
    noise: float = 0.0
    races: Races = field(default_factory=Races)
    counts: dict[str, Count] = field(default_factory=dict)

    def install(self, *, assemble: bool = False) -> None:
        """From now on Triton compiles for sm_90 and launches here; for the rest of the process.

        With ``assemble`` all the way to what a GPU runs, into the cache that one would read. Raises
        RuntimeError if kernels were decorated for the interpreter.
        """
        if knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: unset it before anything imports a kernel")
        self._random = random.Random(self.seed)
        arithmetic.noise = self.noise
        emulator = self

        def launch_here(compiled: Any) -> None:
            if compiled.module is None:
                compiled.function = Function(compiled)
                compiled.module = compiled
                compiled._run = lambda x, y, z, stream, function, packed, meta, enter, leave, *values: (
                    emulator.launch(function, (x, y, z), values)
                )  # fmt: skip

        backend: Any = CUDABackend
        kernel: Any = CompiledKernel
        here: Any = _Driver()
        if not assemble:
            # What is kept of a compilation ends with its PTX: another kind than a GPU wants, kept apart.
            knobs.cache.dir = f"{knobs.cache.dir}-emulated"
            backend.make_cubin = lambda *_: b""
        kernel._init_handles = launch_here
        driver.set_active(here)

    def launch(self, function: Function, grid: tuple[int, int, int], values: Any) -> None:
        """Run all programs, one after the other. Raises Fault."""
        parameters, tensors, descriptors = arguments_of(function, values)
        places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid)))]
        if self.order == "reversed":
            places.reverse()
        elif self.order == "random":
            self._random.shuffle(places)
        memory = Memory(tensors)
        count = self.counts.setdefault(function.name, Count(function.threads // LANES))
        with np.errstate(all="ignore"):
            for place in places:
                program = Program(
                    function.name, function.threads, memory, function.shared_bytes, place, grid,
                    parameters, self.races,
                )  # fmt: skip
                program.descriptors = descriptors
                function.run(program)
                count.instructions += program.count
        count.launches += 1
        count.programs += len(places)

    def table(self) -> list[str]:
        """What was executed, a kernel a line, as Markdown."""
        columns = ("kernel", "warps", "launches", "programs", "instructions a warp")
        lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * 4]
        for name, c in sorted(self.counts.items()):
            lines.append(
                f"| {name} | {c.warps} | {c.launches:,} | {c.programs:,} | {c.each:,.0f} |"
            )
        return lines


class Function:
    """A compiled kernel, translated when it first runs."""

    def __init__(self, compiled: Any) -> None:
        self._kernel = kernel = ptx.parse(compiled.asm["ptx"])
        self.compiled = compiled
        # Specialisations of one kernel are one kernel in the table.
        self.name, self.threads = compiled.name, kernel.threads
        self.signature = list(compiled.src.signature.items())
        self.descriptors = getattr(compiled.metadata, "tensordesc_meta", None) or []
        self.shared_bytes = compiled.metadata.shared

    @functools.cached_property
    def run(self) -> Callable[[Program], None]:
        return translate(self._kernel)


def arguments_of(
    function: Function, values: Any
) -> tuple[list[Any], list[tuple[str, Tensor]], dict[int, Descriptor]]:
    """The kernel's parameters, the tensors among the values, and the descriptors by their numbers."""
    parameters: list[Any] = []
    tensors: list[tuple[str, Tensor]] = []
    descriptors: dict[int, Descriptor] = {}
    for (name, kind), value in zip(function.signature, values, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            tensors += [] if value is None else [(name, value)]
            parameters.append(np.uint64(0 if value is None else value.data_ptr()))
        elif kind.startswith("tensordesc"):
            about = function.descriptors[len(descriptors)]
            rows, columns = about["block_size"]
            number = 0xDE5C0000 + len(descriptors)
            descriptors[number] = Descriptor(value.base, (rows, columns), about["swizzle"])
            parameters.append(np.uint64(number))
            parameters += [np.uint32(size) for size in value.shape]
            parameters += [np.uint64(stride) for stride in value.strides]
        elif kind.startswith("fp"):
            parameters.append(arithmetic.bits_of(float(value), FLOAT[int(kind[2:])]))
        elif kind in ("i1", "u1"):
            parameters.append(np.uint16(bool(value)))
        else:
            parameters.append(arithmetic.bits_of(int(value), SIGNED[int(kind[1:])]))
    # Two more, for memory of the compiler's own.
    return [*parameters, np.uint64(0), np.uint64(0)], tensors, descriptors


class _Driver:
    """What Triton asks of a GPU's driver."""

    launcher_cls = None

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": LANES}

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, LANES)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(CAPABILITY, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


__all__ = ["ORDERS", "Count", "Emulator", "Fault", "Order"]
