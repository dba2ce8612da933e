"""How things are measured here: shapes, two run lengths, peak memory, and what hardware it was."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = (
    "fastsae-triton",
    "torch",
    "triton",
    "numpy",
    "sae-lens",
    "dictionary-learning",
    "eai-sparsify",
    "llamascopium",
    "transformers",
    "pytest-benchmark",
)


@dataclass(frozen=True)
class Shape:
    """``B`` tokens, ``D`` model width, ``F`` latents, ``k`` active per token."""

    B: int
    D: int
    F: int
    k: float

    @property
    def K(self) -> int:
        """Active entries of a batch."""
        return int(self.k * self.B)

    def __str__(self) -> str:
        return f"B={self.B} D={self.D} F={self.F} k={self.k:g}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``B,D,F,k``."""
        B, D, F, k = text.split(",")
        return cls(int(B), int(D), int(F), float(k))


RECIPE = Shape(1024, 1536, 24576, 64)
SCALES = {
    "tiny": Shape(128, 64, 1024, 8),
    "small": Shape(512, 384, 6144, 32),
    "medium": Shape(1024, 768, 12288, 64),
    "recipe": RECIPE,
}
"""Sizes from which ``pytest benchmarks`` picks what the machine can do in its time."""

DENSE_STEPS = 800
"""About how many dense training steps, of five products each, the whole suite takes as long as."""


def scale_for(device: str, seconds: float = 540) -> str:
    """The largest of ``SCALES`` whose suite should take at most ``seconds`` on this machine."""
    if device == "cuda":
        return "recipe"
    speed = product_flops(device)
    fitting = [
        name for name, s in SCALES.items() if DENSE_STEPS * 10 * s.B * s.D * s.F / speed <= seconds
    ]
    return fitting[-1] if fitting else "tiny"


def product_flops(
    device: str, *sizes: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> float:
    """FLOP/s of the fastest product ``[m, n] @ [n, p]`` of ``sizes``, each the best of five."""
    best = 0.0
    for m, n, p in sizes or ((1024, 1024, 1024),):
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, n), (p, n)))
        spent = min(seconds(lambda a=a, b=b: a @ b.T, device) for _ in range(5))
        best = max(best, 2 * m * n * p / spent)
    return best


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of ``call``, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def two_lengths(
    run: Callable[[int], object],
    short: int,
    long: int,
    timed: Callable[..., float] = seconds,
    device: str = "cpu",
) -> float:
    """Seconds per step: a run of ``long`` steps less one of ``short``, over the difference in steps.

    Whatever a run does once cancels: setting up, reading ahead, work put off to its end. Raises
    ValueError unless ``0 <= short < long``, RuntimeError where the longer run was the faster one.
    """
    if not 0 <= short < long:
        raise ValueError(f"two run lengths: expected 0 <= short < long, got {short} and {long}")
    spent_short = timed(lambda: run(short), device)
    spent_long = timed(lambda: run(long), device)
    if spent_long <= spent_short:
        raise RuntimeError(
            f"{long} steps took {spent_long:.3g} s and {short} steps {spent_short:.3g} s: the machine "
            f"is not quiet, or the runs are too short to time"
        )
    return (spent_long - spent_short) / (long - short)


# --- memory ---


class PeakMemory:
    """The most memory a block needs beyond what was held before it, in bytes: ``.peak``.

    On CUDA what torch allocated; elsewhere the process's resident memory.
    """

    peak: int = 0

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _return_freed_memory()
            _reset_peak()
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        self.update()

    def update(self) -> int:
        on_gpu = self.device.startswith("cuda")
        now = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
        self.peak = max(now - self._before, 0)
        return self.peak


def _return_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- data ---


def activations(shape: Shape, batches: int, device: str, seed: int = 0) -> list[Tensor]:
    """Batches ``[B, D]`` of sparse combinations of fixed directions, an offset and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * shape.D, shape.D, generator=generator)
    directions = torch.nn.functional.normalize(directions)
    offset = 0.2 * torch.randn(shape.D, generator=generator)
    found = []
    for _ in range(batches):
        strength = torch.randn(shape.B, len(directions), generator=generator) - 2
        noise = torch.randn(shape.B, shape.D, generator=generator)
        found.append((strength.clamp_min_(0) @ directions * 3 + offset + 0.05 * noise).to(device))
    return found


# --- what it was measured on ---


def environment(device: str) -> dict:
    """Hardware, threads, versions and date: what a figure is worth nothing without."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def cpu_name() -> str:
    """How many cores of what kind, without the maker's name: ``2-core AVX-512 CPU``."""
    capability = torch.backends.cpu.get_cpu_capability()
    kind = {"AVX512": "AVX-512 ", "AVX2": "AVX2 "}.get(capability, f"{platform.machine()} ")
    return f"{os.cpu_count()}-core {kind}CPU"


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
