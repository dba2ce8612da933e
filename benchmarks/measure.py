"""How things are measured here: shapes, clocks, two run lengths, peak memory, and on what hardware."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.device import peak_memory_bytes
from fastsae_kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "fastsae-triton", "torch", "triton", "numpy", "sae-lens", "dictionary-learning", "eai-sparsify",
    "llamascopium", "transformers", "pytest-benchmark",
)  # fmt: skip


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


def scale_for(device: str) -> str:
    """The largest of ``SCALES`` whose suite should take at most 9 minutes on this machine."""
    if device == "cuda":
        return "recipe"
    # It takes about as long as a thousand dense steps, of five products each.
    speed = product_flops(device)
    about = {name: 1000 * 10 * s.B * s.D * s.F / speed for name, s in SCALES.items()}
    return ["tiny", *(name for name, seconds in about.items() if seconds <= 540)][-1]


def product_flops(device: str, *sizes: tuple[int, int, int], dtype=torch.float32) -> float:
    """FLOP/s of the fastest product ``[m, n] @ [n, p]`` of ``sizes``, each the best of five."""
    best = 0.0
    for m, n, p in sizes or ((1024, 1024, 1024),):
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, n), (p, n)))
        spent = min(seconds(lambda a=a, b=b: a @ b.T, device) for _ in range(5))
        best = max(best, 2 * m * n * p / spent)
    return best


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of ``call``, the device's work included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def rounded(times: list[float]) -> list[float]:
    """To the four digits that results keep."""
    return [float(f"{time:.4g}") for time in times]


def two_lengths(run: Callable[[int], float], short: int, long: int) -> float:
    """Seconds per step: what ``run(long)`` took less what ``run(short)`` did, over the difference in steps.

    Whatever a run does once cancels: setting up, reading ahead, work put off to its end. A pair of which the
    longer run was the faster one is taken again, twice at most. Raises ValueError unless
    ``0 <= short < long``, RuntimeError where no pair was fit to use.
    """
    if not 0 <= short < long:
        raise ValueError(f"two run lengths: expected 0 <= short < long, got {short} and {long}")
    for _ in range(3):
        of_short, of_long = run(short), run(long)
        if of_long > of_short:
            return (of_long - of_short) / (long - short)
    raise RuntimeError(
        f"{long} steps took {of_long:.3g} s and {short} steps {of_short:.3g} s: the machine is "
        f"not quiet, or the runs are too short to time"
    )


FLUSHED = 2**28  # bytes that are written where no input shall be left in a cache


def call_seconds(
    call: Callable[[int], object], sets: int, device: str, cold: bool = True
) -> tuple[list[float], bool]:
    """Thirty times the seconds of ``call(i)`` on a GPU, ``i`` going round the ``sets`` of inputs.

    CUDA events around a replayed graph, which leaves the host's launches out (around the plain call where
    it cannot be captured: then False is returned too), if ``cold`` with the L2 cache flushed before each.
    """
    for i in range(sets):
        call(i)
    torch.cuda.synchronize()
    try:
        graphs = [torch.cuda.CUDAGraph() for _ in range(sets)]
        for i, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                call(i)
        replays, captured = [graph.replay for graph in graphs], True
    except RuntimeError:
        replays, captured = [lambda i=i: call(i) for i in range(sets)], False
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(33)]
    for sample, (begin, end) in enumerate(events):
        if cold:
            flush.zero_()
        begin.record()
        replays[sample % sets]()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in events[3:]], captured


def ceilings(device: str, shape: Shape) -> dict[str, float]:
    """What the machine can do: ``bytes`` per second of a copy (reads and writes), ``gather`` of 3 KB rows at
    random places of 75 MB, added up, ``gather_l2`` of 3 MB, which a GPU's L2 cache holds, ``flops_fp32`` and
    ``flops_bf16`` per second of matrix products."""
    on_gpu = device.startswith("cuda")
    source = torch.randn(2 ** (28 if on_gpu else 25), device=device)
    target = torch.empty_like(source)
    table = torch.randn(24576, 1536, device=device, dtype=torch.bfloat16)
    index = torch.randint(len(table), (2 ** (14 if on_gpu else 10), 64), device=device).int()
    if on_gpu and dispatch.HAS_TRITON:
        from gather import gather_rate
    else:
        add_up = lambda *of: torch.nn.functional.embedding_bag(of[1], of[0], mode="sum")
        gather_rate = lambda *of: of[1].numel() * table[0].nbytes / best(lambda: add_up(*of))
    side = 8192 if on_gpu else 2048
    sizes = ((side, side, side), (shape.B, shape.D, shape.F))
    best = lambda call: min(seconds(call, device) for _ in range(7))
    return {
        "bytes": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "gather": gather_rate(table, index),
        "gather_l2": gather_rate(table[:1024], index % 1024),
        "flops_fp32": product_flops(device, *sizes),
        "flops_bf16": product_flops(device, *sizes, dtype=torch.bfloat16),
    }


# --- memory ---


class PeakMemory:
    """The most memory that was needed since it was made, beyond what was held then.

    On CUDA what torch allocated; elsewhere the process's resident memory.
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        self._on_gpu = device.startswith("cuda")
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # Give back what was freed, and count anew, where the system can.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")

    @property
    def mib(self) -> float:
        """As results have it."""
        now = torch.cuda.max_memory_allocated() if self._on_gpu else _resident("VmHWM")
        return round(max(now - self._before, 0) / 2**20, 1)


def _resident(field: str) -> int:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
    return peak_memory_bytes(torch.device("cpu")) or 0


# --- data ---


def activations(shape: Shape, batches: int, device: str) -> list[Tensor]:
    """Batches ``[B, D]`` of sparse combinations of fixed directions, an offset and noise."""
    generator = torch.Generator().manual_seed(0)
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


def environment(device: str) -> dict[str, Any]:
    """Date, commit, hardware, threads and versions: what a figure is worth nothing without."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    kinds = {"AVX512": "AVX-512", "AVX2": "AVX2"}
    kind = kinds.get(torch.backends.cpu.get_cpu_capability(), platform.machine())
    hardware = f"{os.cpu_count()}-core {kind} CPU"  # without the maker's name
    if device.startswith("cuda"):
        versions["cuda"] = str(torch.version.cuda)
        major, minor = torch.cuda.get_device_capability()
        hardware = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    today = datetime.now(UTC).date().isoformat()
    about = {"date": today, "commit": commit(), "hardware": hardware}
    return about | {"threads": torch.get_num_threads(), "versions": versions}


def commit() -> str:
    """The commit that is measured, 7 digits; ``-dirty`` behind it where the code was changed since."""
    code = ("fastsae", "kernels", "benchmarks", ":!benchmarks/results")
    head = git("rev-parse", "--short=7", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return (head or "unknown") + ("-dirty" if changed else "")


def git(*arguments: str) -> str:
    """What git answers; nothing where it cannot."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()
