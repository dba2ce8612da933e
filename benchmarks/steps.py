"""Whole training steps, ours and others', timed over runs of two lengths, only where the gate is passed.

    python benchmarks/steps.py                          all trainers at a size for this machine
    python benchmarks/steps.py --shape 1024,1536,24576,64 --rounds 3 --dead 0.38

``measure_step`` needs torch and fastsae alone and times what these can do; ``paired`` gives every trainer
a process of its own and takes turns, so that a machine's slow minute is everybody's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from statistics import median
from typing import Any

import gates
import torch
from measure import RECIPE, SCALES, PeakMemory, Shape, scale_for, two_lengths
from trainers import OURS, RUNNERS, missing
from worker import Worker, WorkerError, problem_of

IN_TORCH = (OURS, "fastsae, autograd", "torch, eager", "torch, compiled")
"""The trainers that need no peer's package."""


@dataclass
class Measured:
    """One trainer at one size."""

    seconds: list[float] = field(default_factory=list)  # per step, one a round
    peak_bytes: int = 0
    gate: dict[str, float] = field(default_factory=dict)
    refused: str | None = None  # why there is no time

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure_step(
    device: str = "cuda",
    shapes: Iterable[Shape | tuple] = (RECIPE,),
    *,
    precision: str = "bf16",
    dead_shares: Sequence[float] = (0.0, 0.38),
    names: Sequence[str] = IN_TORCH,
    rounds: int = 5,
    short: int = 5,
    long: int = 25,
) -> dict[str, Any]:
    """Times of whole steps in this process: ``{"rows": [...]}``, one row a trainer, shape and dead share.

    A row has ``trainer, B, D, F, k, precision, dead_share`` and either ``us`` (median of ``rounds``), ``us_all``
    and ``peak_mib``, or ``refused``: what the gate found, or the error. Trainers that need a package which
    is absent are refused too.
    """
    rows = []
    for shape in (s if isinstance(s, Shape) else Shape(*s) for s in shapes):
        for share in dead_shares:
            for name in names:
                row = {
                    "trainer": name, "B": shape.B, "D": shape.D, "F": shape.F, "k": shape.k,
                    "precision": precision, "dead_share": share,
                }  # fmt: skip
                try:
                    rows.append(
                        row
                        | _in_process(name, shape, device, precision, share, rounds, short, long)
                    )
                except Exception as error:
                    rows.append(row | {"refused": f"{type(error).__name__}: {str(error)[:300]}"})
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
    return {"rows": rows}


def _in_process(name, shape, device, precision, share, rounds, short, long) -> dict[str, Any]:
    if (package := missing(name)) is not None:
        raise RuntimeError(f"{package} is not installed")
    problem = problem_of(list(astuple(shape)), device, precision, share)
    gates.check(name, problem)
    with PeakMemory(device) as memory:
        runner = RUNNERS[name](problem)
        runner.run(max(short, 2))
        times = [1e6 * two_lengths(runner.run, short, long, device=device) for _ in range(rounds)]
    return {"us": median(times), "us_all": times, "peak_mib": memory.peak / 2**20}


def paired(
    shape: Shape,
    names: Sequence[str] = tuple(RUNNERS),
    *,
    device: str = "cpu",
    precision: str = "fp32",
    dead_share: float = 0.0,
    rounds: int = 3,
    short: int = 1,
    long: int = 3,
    narrow_gate: bool = False,
) -> dict[str, Measured]:
    """Every trainer in a process of its own; in every round each takes its turn at both lengths.

    ``narrow_gate`` asks for the reference's step at the same F and k, but few tokens of small width: the
    full one takes longer than the timing.
    """
    found: dict[str, Measured] = {}
    request = {
        "shape": list(astuple(shape)), "device": device, "precision": precision, "dead_share": dead_share
    }  # fmt: skip
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        lengths: dict[str, tuple[int, int]] = {}
        for name in names:
            found[name] = Measured()
            if (package := missing(name)) is not None:
                found[name].refused = f"{package} is not installed"
                continue
            worker = stack.enter_context(Worker())
            try:
                gate_shape = narrow(shape) if narrow_gate else shape
                found[name].gate = worker.ask(
                    do="check", name=name, **request | {"shape": list(astuple(gate_shape))}
                )
                worker.ask(do="build", name=name, **request)
                lengths[name] = _lengths(worker, short, long)
                workers[name] = worker
            except WorkerError as error:
                found[name].refused = str(error)
                worker.close()
        for _ in range(rounds):
            for name, worker in workers.items():
                if found[name].refused:
                    continue
                try:
                    found[name].seconds.append(_two_lengths_of(worker, *lengths[name]))
                except (WorkerError, RuntimeError) as error:
                    found[name] = Measured(refused=str(error))
        for name, worker in workers.items():
            if not found[name].refused:
                found[name].peak_bytes = worker.ask(do="peak")
    return found


def narrow(shape: Shape) -> Shape:
    """``shape`` with few tokens and a small width, at which the dense reference takes a second."""
    return Shape(min(shape.B, 64), min(shape.D, 64), shape.F, shape.k)


def alone(shape: Shape, *, device: str, precision: str, rounds: int = 2) -> Measured:
    """Our step at one size of a cost curve; the gate is at the same F and k, but narrow and of few tokens.

    The reference is dense: at the width and batch of the largest sizes it would not fit most machines.
    """
    short, long = (5, 25) if device.startswith("cuda") else (1, 3)
    found = Measured()
    with Worker() as worker:
        try:
            about = {"device": device, "precision": precision, "dead_share": 0.0}
            found.gate = worker.ask(
                do="check", name=OURS, shape=list(astuple(narrow(shape))), **about
            )
            worker.ask(do="build", name=OURS, shape=list(astuple(shape)), **about)
            lengths = _lengths(worker, short, long)
            for _ in range(rounds):
                found.seconds.append(_two_lengths_of(worker, *lengths))
            found.peak_bytes = worker.ask(do="peak")
        except (WorkerError, RuntimeError) as error:
            return Measured(refused=str(error))
    return found


LEAST_SECONDS = 0.3
"""What the two lengths must differ by, so that a clock and a scheduler do not matter."""


def _lengths(worker: Worker, short: int, long: int) -> tuple[int, int]:
    """``short`` and ``long``, the latter longer where a step of this trainer takes milliseconds.

    Whatever a trainer does once, at its first steps, is done by this.
    """
    step = worker.ask(do="run", steps=short) / short
    if step < LEAST_SECONDS:
        step = worker.ask(do="run", steps=short) / short
    return short, max(long, short + min(100, round(LEAST_SECONDS / step)))


def _two_lengths_of(worker: Worker, short: int, long: int) -> float:
    # A process that was idle finds its memory and caches cold: a step that is not counted wakes it, or the
    # shorter run, which comes first, would pay for the longer one too.
    worker.ask(do="run", steps=1)
    # The worker has the clock.
    return two_lengths(
        lambda steps: worker.ask(do="run", steps=steps),
        short,
        long,
        timed=lambda call, device: call(),
    )


def ratios(found: dict[str, Measured]) -> dict[str, float]:
    """How many times as long as ours each takes: the median over the rounds, paired."""
    ours = found[OURS]
    return {
        name: median(theirs / own for theirs, own in zip(m.seconds, ours.seconds, strict=True))
        for name, m in found.items()
        if not m.refused and not ours.refused
    }


def table(found: dict[str, Measured]) -> str:
    lines = []
    times = ratios(found)
    for name, m in found.items():
        if m.refused:
            lines.append(f"{name:22} no time: {m.refused}")
        else:
            lines.append(
                f"{name:22} {m.median:9.4f} s/step  {times.get(name, float('nan')):6.2f}x"
                f"  peak {m.peak_bytes / 2**20:8.0f} MiB  {m.gate or ''}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=Shape.parse, help="B,D,F,k")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that are dead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    args = parser.parse_args()
    shape = args.shape or SCALES[scale_for(args.device)]
    print(f"{shape}, {args.precision}, {args.dead:.0%} dead")
    print(
        table(
            paired(
                shape, args.only, device=args.device, precision=args.precision,
                dead_share=args.dead, rounds=args.rounds,
            )
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
