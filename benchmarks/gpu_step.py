"""Inside a step on a GPU: its kernels by time, as they were loaded, and launched in other ways; its host.

``bench_gpu`` reports what these find.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from measure import call_seconds
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastsae_kernels import segments

STEPS, SHOWN = 5, 60
WARPS, REGISTERS, STAGES = (2, 4, 8, 16), (64, 72, 80, 96, 128, 168), (1, 2, 3, 4)
"""Ways to launch a kernel: one of them is changed at a time, then warps and registers together."""


def profiled(run: Callable[[int], None], device: str) -> list[dict[str, Any]]:
    """The ``SHOWN`` kernels of ``STEPS`` steps that take longest: name, count, microseconds of all of them.

    ``run(n)`` takes n steps. On a CPU operations, not kernels.
    """
    on_gpu = device.startswith("cuda")
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    with profile(activities=kinds) as trace:
        run(STEPS)
        synchronize()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in trace.key_averages():
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            time_ = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.key] += time_
            count[event.key] += event.count
    return [
        {"name": name, "count": count[name], "us": round(us, 2)}
        for name, us in spent.most_common(SHOWN)
    ]


def host_seconds(step: Callable[[], object], synchronize: Callable[[], None]) -> list[float]:
    """Ten times the host's seconds for a step: of few at once, so that it never waits for a place in the
    device's queue."""
    found = []
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        found.append((time.perf_counter() - start) / STEPS)
    synchronize()
    return found


def clocks() -> str:
    """What nvidia-smi says of clocks, power and temperature just now; nothing where it is not."""
    asked = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- launches ---


def repeatable(options: dict[str, Any]) -> bool:
    """Of a launch with these options; see ``Launch.repeatable``."""
    return "D" in options


@dataclass
class Launch:
    """A launch of a Triton kernel, as it was and to be done again."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # the grid among them
    compiled: Any

    @property
    def about(self) -> dict[str, Any]:
        """The kernel as the driver loaded it."""
        c = self.compiled
        return {
            "kernel": self.kernel.__name__, "grid": str(self.options.get("grid")),
            "warps": c.metadata.num_warps, "stages": c.metadata.num_stages,
            "registers": c.n_regs, "spilled": c.n_spills, "shared": c.metadata.shared,
        }  # fmt: skip

    @property
    def repeatable(self) -> bool:
        """Whether it may be launched on its own any number of times. Kernels over rows of width D may; those
        that count leave other integers each time, of which others make places."""
        return repeatable(self.options)

    def again(self, **changed: Any) -> Any:
        """Launch it with other options. Raises what the compiler or the driver raises."""
        return self.kernel.run(*self.arguments, **self.options | changed)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches in the block."""
    launches: list[Launch] = []
    type_ = type(segments.long_segments_kernel)
    real = type_.run

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = real(kernel, *arguments, **options)
        launches.append(Launch(kernel, arguments, options, compiled))
        return compiled

    with mock.patch.object(type_, "run", run):
        yield launches


def ways(compiled: Any, options: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Options other than those that a kernel was ``compiled`` with; ``maxnreg``: registers of a thread at most."""
    has = compiled.metadata
    warps = [n for n in WARPS if n != has.num_warps]
    yield from ({"num_warps": n} for n in warps)
    yield from ({"maxnreg": n} for n in REGISTERS if n != options.get("maxnreg"))
    yield from ({"num_stages": n} for n in STAGES if n != has.num_stages)
    yield from ({"num_warps": n, "maxnreg": most} for n in warps for most in REGISTERS)


def timed(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median seconds of a launch with a cold and with a warm L2 cache; what it is that was launched."""
    compiled = call()
    about = {"registers": compiled.n_regs, "spilled": compiled.n_spills}
    for name, cold in (("cold_seconds", True), ("warm_seconds", False)):
        times, _ = call_seconds(lambda _: call(), 1, device, cold=cold)
        about[name] = statistics.median(times)
    return about


def sweep(
    launches: list[Launch], time_of: Callable[[Callable[[], Any]], dict[str, Any]], until: float
) -> Iterator[dict[str, Any]]:
    """Each kernel as it is and in other ways, those that take longest first; a row each, also of one that
    fails. Begins none after ``until`` of the monotonic clock."""

    def row(launch: Launch, way: dict[str, int]) -> dict[str, Any]:
        found = {"kernel": launch.kernel.__name__, "way": way}
        try:
            return found | time_of(lambda: launch.again(**way))
        except Exception as error:  # one way that does not compile is no reason to leave out others
            return found | {"refused": f"{type(error).__name__}: {str(error)[:300]}"}

    base = [(launch, row(launch, {})) for launch in launches]
    yield from (found for _, found in base)
    longest = sorted(base, key=lambda one: -one[1].get("cold_seconds", 0.0))
    for launch, _ in longest:
        for way in ways(launch.compiled, launch.options):
            if time.monotonic() > until:
                return
            yield row(launch, way)


def tunings(module: Any) -> Iterator[dict[str, int]]:
    """Each number of the module's ``TUNING``, where it has one, at a quarter, a half, twice and four times what it
    is, and set so meanwhile."""
    tuning = getattr(module, "TUNING", None)
    for name, value in [] if tuning is None else list(vars(tuning).items()):
        for other in sorted({value // 4, value // 2, 2 * value, 4 * value} - {0}):
            with mock.patch.object(tuning, name, other):
                yield {name: other}
