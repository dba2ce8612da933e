"""Whole training steps: ours, plain torch, and every installed peer through its own trainer.

All trainers of a group are timed in turns, once; a test then reports one. Cost curves are of our own step.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from harness import Measured, ratios, time_steps
from measure import Shape
from trainers import OURS, TRAINERS, WAYS

NAMES = tuple(name for name in TRAINERS if name != "fastsae, autograd")
GRID = [
    *(("F", size) for size in (4096, 8192, 16384, 32768, 65536, 131072)),
    *(("k", size) for size in (8, 16, 32, 64, 128, 256)),
    *(("B", size) for size in (256, 512, 1024, 2048, 4096)),
]


measured = functools.cache(time_steps)


def settings(request, device: str) -> dict:
    """Options of ``time_steps``; on a GPU, whose steps take milliseconds, runs are ten times as long."""
    option, on_gpu = request.config.getoption, device.startswith("cuda")
    short = 10 if on_gpu else 1
    return {
        "device": device, "precision": "bf16" if on_gpu else "fp32", "rounds": option("--rounds"),
        "short": short, "long": short * (1 + option("--steps-apart")),
        "narrow_gate": option("--gate") == "narrow",
    }  # fmt: skip


def chosen(request, device: str) -> tuple[str, ...]:
    """The trainers of this session, in order; ours always, which the others are compared with."""
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    asked = {OURS, *(item.callspec.params.get("name") for item in items)}
    return tuple(name for name in NAMES if name in asked and (device != "cpu" or name not in WAYS))


def add(report, found: dict[str, Measured], name: str, **about) -> None:
    """Report one trainer's times; its test is skipped or fails where it has none."""
    one = found[name]
    if one.refused and "not installed" in one.refused:
        pytest.skip(one.refused)
    report.add(trainer=name, **about, **one.row(ratios(found).get(name)))
    assert one.refused is None, f"no time is given: {one.refused}"


@pytest.mark.parametrize("dead", [0.0, 0.38], ids=["none dead", "38 % dead"])
@pytest.mark.parametrize("name", NAMES)
def bench_step(request, report, shape, device, name, dead):
    if name in WAYS and device == "cpu":
        pytest.skip("timed on a GPU alone")
    options = settings(request, device)
    found = measured(shape, chosen(request, device), dead_share=dead, **options)
    about = {"shape": str(shape), "precision": options["precision"], "dead": dead}
    about["gate_shape"] = request.config.getoption("--gate")
    if name in (OURS, *WAYS) and device != "cpu":
        rates = request.getfixturevalue("rates")
        sizes = {"dead": round(dead * shape.F), "moment_bytes": 1 if "8-bit" in name else 4}
        about["roofline_seconds"] = least_seconds(shape, rates, **sizes) if rates else None
    group = f"training step | {shape} {options['precision']}, {dead:.0%} dead"
    add(report, found, name, kind="step", group=group, **about)


@pytest.mark.parametrize(("axis", "size"), GRID, ids=[f"{axis} {size}" for axis, size in GRID])
def bench_scaling(request, report, shape, device, axis, size):
    """F, k and B in turn, the others as they are."""
    if shape.F < 12288:
        pytest.skip("cost curves: from the medium scale on")
    size = replace(shape, **{axis: size})
    options = settings(request, device) | {"narrow_gate": True}
    found = measured(size, (OURS,), **options)
    group = f"scaling over {axis} | D={shape.D} {options['precision']}"
    about = {"axis": axis, "precision": options["precision"], **vars(size)}
    add(report, found, OURS, kind="scaling", group=group, **about)


def least_seconds(shape: Shape, rates: dict, *, dead: int = 0, moment_bytes: int = 4) -> float:
    """What our step costs on a GPU if nothing overlaps and nothing else costs anything.

    Weights, whose upper halves are the operands, and moments are read and written once, products run at
    the speed of large ones, and gathered rows come through L2. ``rates``: of ``measure.ceilings``.
    """
    per_weight = 2 * 4 + 2 * 2 * moment_bytes
    moved = 2 * shape.F * shape.D * per_weight + 2 * 4 * shape.B * shape.F
    # Decoding gathers a row of W_dec per active; the update one of dY, twice, and one of x.
    gathered = 4 * shape.K * shape.D * 2
    flops = 2 * shape.B * shape.D * shape.F + 5 * 2 * shape.B * shape.D * dead
    return moved / rates["bytes"] + gathered / rates["gather"] + flops / rates["flops_bf16"]
