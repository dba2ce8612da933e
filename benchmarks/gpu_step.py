"""The whole training step at the recipe's shape, against its roofline and the same mathematics in torch.

ours: eager launches, one CUDA graph, 8-bit moments; with no latent dead, and with 38 % dead. Each is
checked against the reference first. Then the trainers of ``steps.measure_step`` (plain torch, eager and
compiled, and the peers' packages where installed), the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median, quantiles

import gates
import torch
from gpu import Report
from gpu_kernels import ceilings
from measure import RECIPE, Shape, two_lengths
from steps import IN_TORCH, measure_step
from trainers import OURS, Fastsae
from worker import problem_of

DEAD_SHARES = (0.0, 0.38)
BATCHES = (1024, 4096)


class Graphed(Fastsae):
    """``--cuda-graph``."""

    def config(self):
        return dataclasses.replace(super().config(), cuda_graph=True)


class Quantized(Graphed):
    """``--cuda-graph --moments 8bit``."""

    exact = False  # moments round when they are stored

    def config(self):
        return dataclasses.replace(super().config(), moments="8bit")


WAYS = {"fastsae, eager": Fastsae, "fastsae, graph": Graphed, "fastsae, graph, 8-bit": Quantized}


def least_microseconds(
    shape: Shape, ceiling: dict[str, float], *, dead: int = 0, moment_bytes: int = 4
) -> float:
    """What the step costs at the measured ceilings if nothing overlaps and nothing else costs anything.

    Weights and moments are read and written once (masters fp32, their bf16 copy written), the
    encoder's and aux-k's products run at the speed of large ones, and every gathered row comes through
    L2. ``ceiling``: bytes/s of ``copy`` and ``gather``, FLOP/s of ``gemm``.
    """
    per_weight = 2 * 4 + 2 + 2 * 2 * moment_bytes
    moved = 2 * shape.F * shape.D * per_weight + 2 * 4 * shape.B * shape.F
    # Decoding gathers a row of W_dec per active; the update one of dY, twice, and one of x.
    gathered = 4 * shape.K * shape.D * 2
    flops = 2 * shape.B * shape.D * shape.F + 5 * 2 * shape.B * shape.D * dead
    seconds = moved / ceiling["copy"] + gathered / ceiling["gather"] + flops / ceiling["gemm"]
    return 1e6 * seconds


def time_ours(
    report: Report,
    shape: Shape,
    share: float,
    ceiling: dict[str, float],
    *,
    device: str = "cuda",
    lengths: tuple[int, int] = (20, 120),
    rounds: int = 7,
    ways: Sequence[str] = tuple(WAYS),
) -> None:
    """One row a way: median and spread of the time of a step, and its share of the roofline."""
    problem = problem_of(list(dataclasses.astuple(shape)), device, "bf16", share)
    for name in ways:
        way = WAYS[name]
        row = {"kernel": f"step, {share:.0%} dead", "B": shape.B, "provider": name}
        try:
            if way.exact:
                gates.check_step(way, problem)
            else:
                gates.check_reconstruction(way, gates.settled(problem))
            runner = way(problem)
            runner.run(20)  # compile, settle the number of dead latents, capture
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [1e6 * two_lengths(runner.run, *lengths, device=device) for _ in range(rounds)]
        except Exception as error:  # the other ways are still worth measuring
            report.add(**row, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        roof = least_microseconds(
            shape,
            ceiling,
            dead=round(share * shape.F),
            moment_bytes=1 if way is Quantized else 4,
        )
        spread = quantiles(times, n=5)
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        report.add(
            **row, us=median(times), us_p20=spread[0], us_p80=spread[-1], roof=roof,
            share=roof / median(times), peak_mib=peak,
        )  # fmt: skip


def run(report: Report) -> None:
    ceiling = ceilings(report)
    for B in BATCHES:
        shape = dataclasses.replace(RECIPE, B=B)
        for share in DEAD_SHARES:
            if report.out_of_time():
                report.add(stopped=f"out of time before B = {B}, {share:.0%} dead")
                return
            time_ours(report, shape, share, ceiling)
    others = [name for name in (*IN_TORCH, "SAELens", "dictionary_learning") if name != OURS]
    for name in others:
        if report.out_of_time():
            report.add(stopped=f"out of time before {name}")
            return
        for row in measure_step("cuda", (RECIPE,), names=(name,))["rows"]:
            label = {"kernel": f"step, {row['dead_share']:.0%} dead", "B": row["B"]}
            if "us" in row:
                spread = quantiles(row["us_all"], n=5)
                label |= {"us": row["us"], "us_p20": spread[0], "us_p80": spread[-1]}
                label |= {"peak_mib": row["peak_mib"], "roof": "", "share": ""}
            else:
                label["refused"] = row["refused"]
            report.add(**label, provider=row["trainer"])
