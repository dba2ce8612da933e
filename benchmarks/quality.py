"""Are the SAEs that fastsae trains as good as those of SAELens and dictionary_learning?

    python benchmarks/quality.py --out benchmarks/results               train, compare, write
    python benchmarks/quality.py --out benchmarks/results --seeds 0     only that seed; others are kept
    python benchmarks/quality.py --table                                the table of the results (Markdown)

Every trainer gets the same batches of real activations (residual stream of the demo's language model
on the demo's text), in the same order; see ``trainers`` for what else is equal. What they trained is
converted through their own files and measured by ``fastsae.evaluate`` on documents that nobody trained
on. Seeds are paired: a seed gives one draw of the training activations, used by all, and each
trainer's initial weights. fastsae passes where its mean paired difference to a peer is at least -0.005,
or less than one standard error below 0.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from measure import Shape, environment
from results import HISTORY, RESULTS, Row, append, long_rows, read_csv
from torch import Tensor
from trainers import OURS, TRAINERS, Problem

from fastsae import SAE, evaluate
from fastsae.cli.presets import demo_config
from fastsae.data.stream import open_stream

RUNS = "quality_runs.csv"
MARGIN = 0.005
TRAINING_ROWS, HELD_OUT_ROWS = 1_500_000, 65_536
"""So many held-out tokens that a latent which fires once in 20,000 is seen to be alive: a trainer's own
counter calls it so, and dead ones are those that 25,600 tokens did not move."""


@dataclass(frozen=True)
class Case:
    """A size to compare at; ``dead_share`` is the part of the run after which a latent is dead."""

    layer: int
    d_sae: int
    k: int
    batch_size: int = 256
    steps: int = 1000
    lr: float = 3e-4
    dead_share: float = 0.1

    def problem(self, pool: Tensor, seed: int) -> Problem:
        """What every trainer gets: batches of rows of ``pool [n, D]``, drawn by the seed."""
        return Problem(
            Shape(self.batch_size, pool.shape[1], self.d_sae, self.k),
            draw_batches(pool, self.batch_size, self.steps, seed),
            steps=self.steps, lr=self.lr, seed=seed,
            dead_after=round(self.dead_share * self.batch_size * self.steps),
        )  # fmt: skip


CASES = {
    "layer 2, F 2048, k 16": Case(layer=2, d_sae=2048, k=16),
    "layer 3, F 1024, k 8": Case(layer=3, d_sae=1024, k=8),
    "layer 3, F 1024, k 8, lr 3e-3": Case(layer=3, d_sae=1024, k=8, lr=3e-3),
}
"""Two sizes at the recipe's lr, and one at ten times that, where latents die."""

saelens, dictionary = (TRAINERS[name].train_sae for name in ("SAELens", "dictionary_learning"))
VARIANTS: dict[str, Callable[[Problem], SAE]] = {
    OURS: TRAINERS[OURS].train_sae,
    "SAELens, defaults": saelens,
    "SAELens, scaled input": partial(saelens, normalize_activations="expected_average_only_in"),
    "dictionary_learning, defaults": dictionary,
    "dictionary_learning, scaled input": partial(dictionary, normalize_activations=True),
}
"""The trainers, each in the ways that are compared."""


# --- one run ---


@lru_cache(maxsize=1)
def activations(layer: int) -> tuple[Tensor, Tensor]:
    """Activations to train on, and others of other documents that are held out: both ``[n, D]``."""
    sizes = {"eval_tokens": HELD_OUT_ROWS, "batch_size": 4096}
    stream = open_stream(demo_config(layer=layer, seed=0, device="cpu", **sizes))
    batches = (layers[0] for layers in iter(stream.next_batch, None))
    enough = islice(batches, -(-TRAINING_ROWS // 4096))
    return torch.cat(list(enough))[:TRAINING_ROWS], stream.held_out()[0]


def draw_batches(pool: Tensor, size: int, steps: int, seed: int) -> list[Tensor]:
    """The batches of a seed: rows of ``pool [n, D]`` without repetition, in random order."""
    n = size * steps
    if len(pool) < n:
        sys.exit(f"the text gives {len(pool):,} activations, fewer than the {n:,} of a run")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return list(pool[order[:n]].split(size))


def scores(train: Callable[[Problem], SAE], problem: Problem, held_out: Tensor) -> Row:
    """Train on the problem's batches and evaluate on ``held_out``, over the batch and by threshold."""
    sae = train(replace(problem, batches=[batch.clone() for batch in problem.batches]))
    batch = evaluate(sae, held_out, "batch")["batch"]
    threshold = evaluate(sae, held_out, "threshold")["threshold"]
    return {
        "explained_variance": batch.explained_variance,
        "alive_fraction": batch.alive_fraction,
        "l0": batch.l0,
        "threshold_explained_variance": threshold.explained_variance,
        "threshold_l0": threshold.l0,
    }


# --- comparison ---

COMPARED = ("explained_variance", "alive_fraction", "threshold_explained_variance")
CRITERIA = ("explained_variance", "alive_fraction")


def compare(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Paired differences, fastsae less the peer, over the seeds that both have; one dict a case and peer."""
    runs = {(row["case"], row["trainer"], int(row["seed"])): row for row in rows}
    found = []
    for case, peer in dict.fromkeys((case, name) for case, name, _ in runs if name != OURS):
        seeds = sorted(s for c, t, s in runs if (c, t) == (case, peer) and (case, OURS, s) in runs)
        if not seeds:
            continue
        result: dict[str, Any] = {"case": case, "peer": peer, "seeds": seeds}
        for metric in COMPARED:
            pairs = [[float(runs[case, who, s][metric]) for who in (OURS, peer)] for s in seeds]
            differences, n = [ours - theirs for ours, theirs in pairs], len(seeds)
            error = stdev(differences) / n**0.5 if n > 1 else float("nan")
            result[metric] = {"difference": mean(differences), "standard_error": error}
        criteria = (result[metric].values() for metric in CRITERIA)
        result["passes"] = all(d >= -MARGIN or d + error >= 0 for d, error in criteria)
        found.append(result)
    return found


def means(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """By case and trainer: each score's mean over the seeds, and how many ``seeds`` there are."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["case"], row["trainer"]), []).append(row)
    return {
        key: {name: mean(float(run[name]) for run in mine) for name in (*COMPARED, "threshold_l0")}
        | {"seeds": len(mine)}
        for key, mine in runs.items()
    }


def table(rows: list[Row]) -> str:
    """Markdown: the mean of each trainer, and fastsae's paired difference to it."""
    comparisons = {(c["case"], c["peer"]): c for c in compare(rows)}
    lines = [
        "| size | trainer | explained variance | fastsae's difference | alive latents | fastsae's difference "
        "| by threshold: EV | L0 | not below |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, trainer), found in means(rows).items():
        verdict, differences = "", ["", ""]
        if to_ours := comparisons.get((case, trainer)):
            verdict = "yes" if to_ours["passes"] else "**no**"
            paired = [to_ours[name] for name in CRITERIA]
            differences = [f"{p['difference']:+.4f} ± {p['standard_error']:.4f}" for p in paired]
        lines.append(
            f"| {case} | {trainer} | {found['explained_variance']:.4f} | {differences[0]} "
            f"| {found['alive_fraction']:.4f} | {differences[1]} "
            f"| {found['threshold_explained_variance']:.4f} | {found['threshold_l0']:.2f} | {verdict} |"
        )
    return "\n".join(lines)


# --- files ---


def read_runs(out: Path) -> list[Row]:
    path = out / RUNS
    return read_csv(path) if path.exists() else []


def write_runs(out: Path, rows: list[Row]) -> None:
    """The runs in the order of cases, trainers and seeds, and the comparison with all that it rests on."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / RUNS).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "comparison": compare(rows),
        "margin": MARGIN,
        "cases": {name: asdict(case) for name, case in CASES.items()},
        "activations": {"training": TRAINING_ROWS, "held_out": HELD_OUT_ROWS},
        "environment": environment("cpu"),
    }
    (out / "quality.json").write_text(json.dumps(summary, indent=2) + "\n")


def merge(rows: list[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` in place of an older run of the same case, trainer and seed; in order."""
    cases, trainers = list(CASES), list(VARIANTS)
    key = lambda r: (cases.index(r["case"]), trainers.index(r["trainer"]), int(r["seed"]))
    return sorted([*(row for row in rows if key(row) != key(new)), new], key=key)


def history_rows(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Means over the seeds, as rows of ``results``."""
    for (case, trainer), found in means(rows).items():
        row = {"kind": "quality", "group": case, "trainer": trainer, "rounds": found.pop("seeds")}
        yield row | {"values": {name.replace("_", " "): (v, "") for name, v in found.items()}}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--trainers", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = read_runs(args.out)
    if args.table:
        print(table(rows) if rows else f"no results in {args.out}")
        return
    new = []
    for name in args.cases:
        case = CASES[name]
        pool, held_out = activations(case.layer)
        for seed in args.seeds:
            problem = case.problem(pool, seed)
            for trainer in args.trainers:
                result = scores(VARIANTS[trainer], problem, held_out)
                new.append({"case": name, "trainer": trainer, "seed": seed, **result})
                rows = merge(rows, new[-1])
                write_runs(args.out, rows)
                ev, alive = (f"{result[metric]:.4f}" for metric in CRITERIA)
                print(f"{name} | seed {seed} | {trainer}: EV {ev}, alive {alive}", flush=True)
    history = HISTORY if args.out == RESULTS else args.out / HISTORY.name
    append(history, long_rows(environment("cpu"), history_rows(new)))
    print(table(rows))


if __name__ == "__main__":
    main()
