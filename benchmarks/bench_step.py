"""Whole training steps: ours, plain torch, and every installed peer through its own trainer.

All trainers of a group are timed in turns, each in its own process (``steps.paired``), once; a test then
shows one trainer's times. So that pytest-benchmark's tables hold seconds per step, its clock here is
one that only a known duration moves.
"""

from __future__ import annotations

import functools

import pytest
import steps
from measure import Shape
from trainers import OURS, RUNNERS

NAMES = tuple(name for name in RUNNERS if name != "fastsae, autograd")
GRID = {
    "F": (4096, 8192, 16384, 32768, 65536, 131072),
    "k": (8, 16, 32, 64, 128, 256),
    "B": (256, 512, 1024, 2048, 4096),
}


class Clock:
    """Stands still but for :meth:`pass_`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@functools.cache
def measured(
    shape: Shape,
    device: str,
    precision: str,
    dead: float,
    names: tuple[str, ...],
    rounds: int,
    steps_apart: int,
    narrow_gate: bool,
):
    short = 5 if device.startswith("cuda") else 1
    return steps.paired(
        shape,
        names,
        device=device,
        precision=precision,
        dead_share=dead,
        rounds=rounds,
        short=short,
        long=short + steps_apart * short,
        narrow_gate=narrow_gate,
    )


def show(benchmark, found: dict[str, steps.Measured], name: str, **about) -> None:
    one = found[name]
    if one.refused and "not installed" in one.refused:
        pytest.skip(one.refused)
    assert one.refused is None, f"no time is given: {one.refused}"
    benchmark.extra_info.update(
        trainer=name,
        peak_mib=round(one.peak_bytes / 2**20, 1),
        ratio=steps.ratios(found).get(name),
        gate=one.gate,
        **about,
    )
    durations = iter(one.seconds)
    benchmark.pedantic(lambda: CLOCK.pass_(next(durations)), rounds=len(one.seconds))


def chosen(request) -> tuple[str, ...]:
    """The trainers of this session, in order; ours always, which the others are compared with."""
    asked = {
        item.callspec.params.get("name")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    return tuple(name for name in NAMES if name == OURS or name in asked)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dead", [0.0, 0.38], ids=["none dead", "38 % dead"])
@pytest.mark.parametrize("name", NAMES)
def bench_step(benchmark, request, shape, device, name, dead):
    precision = "bf16" if device.startswith("cuda") else "fp32"
    option = request.config.getoption
    found = measured(
        shape, device, precision, dead, chosen(request),
        option("--rounds"), option("--steps-apart"), option("--gate") == "narrow",
    )  # fmt: skip
    benchmark.group = f"training step | {shape} {precision}, {dead:.0%} dead"
    show(
        benchmark, found, name, kind="step", dead=dead, precision=precision, shape=str(shape),
        gate_shape=option("--gate"),
    )  # fmt: skip


def cases(shape: Shape):
    """The sizes of the cost curves: F, k and B in turn, the others as in ``shape``."""
    for axis, values in GRID.items():
        for value in values:
            yield axis, Shape(**{**vars(shape), axis: value})


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    "number",
    range(sum(map(len, GRID.values()))),
    ids=[f"{axis} {value}" for axis, values in GRID.items() for value in values],
)
def bench_scaling(benchmark, request, shape, device, number):
    if request.config.fastsae_scale in ("tiny", "small"):
        pytest.skip("cost curves: from the medium scale on")
    axis, size = list(cases(shape))[number]
    precision = "bf16" if device.startswith("cuda") else "fp32"
    found = {OURS: steps.alone(size, device=device, precision=precision)}
    benchmark.group = f"scaling over {axis} | D={shape.D} {precision}"
    show(benchmark, found, OURS, kind="scaling", axis=axis, **vars(size), precision=precision)
