"""Trainers in turns: every one in a process of its own, timed over runs of two lengths, behind its gate.

In every round each trainer takes its turn at both lengths, so that a machine's slow minute is
everybody's; ratios are those of a round, and what a run does once cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from measure import Shape, rounded, two_lengths
from trainers import OURS, missing
from worker import Worker

from fastsae import TrainConfig

ROUNDS = 5  # of a comparison whose ratios are published, at least
LEAST_SECONDS = 0.3  # of difference between the lengths: a clock and a scheduler do not matter
SIMILAR = 0.5  # of our explained variance: what a whole run must reach for its speed to count


@dataclass
class Measured:
    """One trainer at one size."""

    seconds: list[float] = field(default_factory=list)  # per step, or per token; one a round
    peak_mib: float = 0.0
    gate: dict[str, float] = field(default_factory=dict)  # what was measured for it
    refused: str | None = None  # why there is no time
    stages: dict[str, float] = field(default_factory=dict)  # of the last long run, in seconds

    def row(self, ratio: float | None) -> dict[str, Any]:
        """As results have it."""
        if self.refused is not None:
            return {"refused": self.refused}
        found = {"seconds": rounded(self.seconds), "peak_mib": self.peak_mib, "ratio": ratio}
        return found | {"gate": self.gate} | ({"stages": self.stages} if self.stages else {})


Started = tuple[dict[str, float], Callable[[], float]]
"""Of a trainer: what its gate found, and a call that gives the seconds per unit of one round."""


def in_turns(
    names: Sequence[str], start: Callable[[Worker, str], Started], rounds: int
) -> tuple[dict[str, Measured], dict[str, Worker]]:
    """``rounds`` of everybody who starts; the workers of those who came through are still open."""
    absent = {name: f"{package} is not installed" for name in names if (package := missing(name))}
    found = {name: Measured(refused=absent.get(name)) for name in names}
    workers = {name: Worker() for name in names if name not in absent}
    calls: dict[str, Callable[[], float]] = {}
    for turn in range(1 + rounds):
        for name in list(workers):
            try:
                if turn == 0:
                    found[name].gate, calls[name] = start(workers[name], name)
                else:
                    found[name].seconds.append(calls[name]())
            except RuntimeError as error:
                found[name] = Measured(refused=str(error))
                workers.pop(name).close()
    for name, worker in workers.items():
        found[name].peak_mib = worker.ask("peak_mib")
    return found, workers


def time_steps(
    shape: Shape,
    names: Sequence[str],
    *,
    device: str = "cpu",
    precision: str = "fp32",
    dead_share: float = 0.0,
    rounds: int = ROUNDS,
    short: int = 1,
    long: int = 3,
    narrow_gate: bool = False,
) -> dict[str, Measured]:
    """Seconds per training step; with ``rounds=0`` the gate and a few steps alone.

    ``narrow_gate`` asks for the reference's step with few tokens of small width: the full one takes longer
    than the timing, and does not fit most machines at the largest sizes.
    """
    about = {"device": device, "precision": precision, "dead_share": dead_share}

    narrow = Shape(min(shape.B, 64), min(shape.D, 64), shape.F, shape.k)

    def start(worker: Worker, name: str) -> Started:
        gate = worker.ask("check", name, narrow if narrow_gate else shape, **about)
        worker.ask("build", name, shape, **about)
        run = lambda steps: worker.ask("run", steps)
        # Whatever a trainer does once, at its first steps, is done by this.
        step = run(short) / short
        if step < LEAST_SECONDS:
            step = run(short) / short
        longer = max(long, short + min(100, round(LEAST_SECONDS / step)))

        def one_round() -> float:
            # A process that was idle finds its memory and caches cold: a step that is not counted wakes
            # it, or the shorter run, which comes first, would pay for the longer one too.
            run(1)
            return two_lengths(run, short, longer)

        return gate, one_round

    found, workers = in_turns(names, start, rounds)
    for worker in workers.values():
        worker.close()
    return found


def time_pipelines(
    config: TrainConfig, names: Sequence[str], *, rounds: int = ROUNDS, short: int, long: int
) -> dict[str, Measured]:
    """Seconds per token from the text of ``config`` to an SAE, over runs of ``short`` and ``long`` tokens."""
    stages: dict[str, dict[str, float]] = {}

    def start(worker: Worker, name: str) -> Started:
        worker.ask("open", name, config)

        def total(tokens: int) -> float:
            stages[name] = worker.ask("train", tokens)
            return stages[name]["total"]

        total(short)  # imports, and whatever happens once
        return {}, lambda: two_lengths(total, short, long)

    found, workers = in_turns(names, start, rounds)
    explained = {name: worker.ask("explained_variance") for name, worker in workers.items()}
    for name, variance in explained.items():
        workers[name].close()
        found[name].gate, found[name].stages = {"explained_variance": variance}, stages[name]
        if variance < SIMILAR * explained.get(OURS, variance):
            reason = f"explained variance {variance:.3f}, ours {explained[OURS]:.3f}"
            found[name] = Measured(refused=reason)
    return found


def ratios(found: dict[str, Measured]) -> dict[str, float]:
    """How many times as long as ours each takes: the median over the rounds, paired."""
    ours = found[OURS].seconds if OURS in found else []
    return {
        name: median(theirs / own for theirs, own in zip(m.seconds, ours, strict=True))
        for name, m in found.items()
        if ours and not m.refused
    }
