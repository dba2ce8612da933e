"""Inside our step on a GPU: profiles, the host, bits, and kernels launched in other ways; see ``gpu_step``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gates
import gpu_step
import pytest
import torch
from measure import Shape, rounded
from trainers import TRAINERS, Problem

from fastsae.training.update import Graphs
from fastsae_kernels.update import triton_impl

FORMS: dict[str, tuple[str, float]] = {
    "eager": ("fastsae", 0.0),
    "replayed": ("fastsae", 0.0),
    "eager, 38 % dead": ("fastsae", 0.38),
    "replayed, 38 % dead": ("fastsae", 0.38),
    "eager, 8-bit": ("fastsae, 8-bit", 0.0),
    "replayed, 8-bit": ("fastsae, 8-bit", 0.0),
}
REPEATED = 200  # steps whose bits are compared


def trainer(form: str, shape: Shape, device: str) -> Any:
    """It has taken steps enough for kernels to be compiled and the graph to be captured."""
    name, dead = FORMS[form]
    made = TRAINERS[name]
    made = made.eager() if form.startswith("eager") else made
    made = made(Problem.synthetic(shape, device, "bf16", dead))
    made.run(Graphs.EAGER_CALLS + 2)
    return made


def group(what: str, shape: Shape) -> str:
    return f"{what} | {shape} bf16"


def synchronized(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


@pytest.mark.parametrize("form", FORMS)
def bench_profile(report, shape, device, form):
    """Five steps, kernel by kernel."""
    step = trainer(form, shape, device)
    kernels = gpu_step.profiled(step.run, device)
    total = 1e-6 * sum(kernel["us"] for kernel in kernels) / gpu_step.STEPS
    report.add(
        kind="profile", group=f"{group('profile', shape)}, {form}", trainer="fastsae", form=form,
        steps=gpu_step.STEPS, kernels=kernels, clocks=gpu_step.clocks(),
        seconds=rounded([total]), rounds=gpu_step.STEPS,
    )  # fmt: skip
    assert kernels


@pytest.mark.parametrize("form", FORMS)
def bench_host(report, shape, device, form):
    """What the host does for a step, and the clocks while the device is busy."""
    step, synchronize = trainer(form, shape, device), synchronized(device)
    times = gpu_step.host_seconds(lambda: step.run(1), synchronize)
    step.run(REPEATED if device.startswith("cuda") else 1)
    clocks = gpu_step.clocks()
    synchronize()
    report.add(
        kind="host", group=group("host", shape), trainer="fastsae", form=form,
        seconds=rounded(times), clocks=clocks,
    )  # fmt: skip


def bench_capture(report, shape, device):
    """Seconds of each of the first calls: eager ones, the one that captures, and replays."""
    problem = Problem.synthetic(shape, device, "bf16")
    step, synchronize = TRAINERS["fastsae"](problem), synchronized(device)
    times = []
    for _ in range(Graphs.EAGER_CALLS + 3):
        start = time.perf_counter()
        step.run(1)
        synchronize()
        times.append(time.perf_counter() - start)
    about = {"calls": rounded(times), "eager_calls": Graphs.EAGER_CALLS}
    values = {"capturing call": (times[Graphs.EAGER_CALLS], "s")}
    report.add(
        kind="capture", group=group("capture", shape), trainer="fastsae", values=values, **about
    )


def bench_loaded(report, shape, device):
    """Registers, spills and shared memory of a step's kernels, as the driver loaded them."""
    if device == "cpu":
        pytest.skip("no kernel is loaded")
    step = trainer("eager", shape, device)
    with gpu_step.recorded() as launches:
        step.run(1)
    rows = [launch.about for launch in launches]
    report.add(kind="loaded", group=group("loaded", shape), trainer="fastsae", kernels=rows)
    assert not [row for row in rows if row["spilled"]]


@pytest.mark.parametrize("form", ["replayed", "replayed, 38 % dead", "replayed, 8-bit"])
def bench_bits(report, shape, device, form):
    """Replayed steps leave the bits of as many eager ones."""
    name, dead = FORMS[form]
    problem = Problem.synthetic(shape, device, "bf16", dead)
    steps = REPEATED if device.startswith("cuda") else gates.REPLAYED_STEPS
    gates.check_replays(TRAINERS[name], problem, steps)
    report.add(kind="bits", group=group("bits", shape), trainer="fastsae", form=form, equal=True)


def bench_variants(request, report, shape, device):
    """Each kernel over rows of a step with other numbers of warps, registers and stages; the update's as it can be tuned."""
    if device == "cpu":
        pytest.skip("no kernel is launched")
    about = {"kind": "variant", "group": group("variants", shape), "trainer": "fastsae"}
    launches: dict[str, gpu_step.Launch] = {}
    for form in ("eager", "eager, 38 % dead", "eager, 8-bit"):
        step = trainer(form, shape, device)
        with gpu_step.recorded() as found:
            step.run(1)
        launches = {str(each.about): each for each in found if each.repeatable} | launches
    timed = lambda call: gpu_step.timed(call, device)
    step = trainer("eager", shape, device)
    for way in gpu_step.tunings(triton_impl):
        with gpu_step.recorded() as found:
            step.run(1)
        of_the_update = [each for each in found if "coder_" in each.kernel.__name__]
        for row in gpu_step.sweep(of_the_update, timed, until=0):
            report.add(**about, **row | {"way": way})
    for row in gpu_step.sweep([*launches.values()], timed, request.config.fastsae_deadline):
        report.add(**about, **row)
