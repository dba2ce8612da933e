"""Are the SAEs that fastsae trains as good as those of SAELens and dictionary_learning?

    python benchmarks/quality.py --out benchmarks/results               train, compare, write
    python benchmarks/quality.py --out benchmarks/results --seeds 0     only that seed; others are kept
    python benchmarks/quality.py --table                                the table of the results (Markdown)

Every trainer gets the same batches of real activations (residual stream of the demo's language model
on the demo's text), in the same order, for the same number of steps, with the same lr, k, Adam betas
and count of tokens after which a latent is dead; see ``peers.py``. What they trained is converted
through their own files and measured by ``fastsae.evaluate`` on activations of documents that nobody
trained on. Seeds are paired: a seed gives one draw of the training activations, used by all, and each
trainer's initial weights.

fastsae passes where its mean paired difference to a peer is at least -0.005, or less than one
standard error below 0.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import peers
import torch
from measure import cpu_name
from peers import Setting
from torch import Tensor

import fastsae
from fastsae import evaluate

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4)
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

    def setting(self, d_in: int, seed: int) -> Setting:
        tokens = self.batch_size * self.steps
        return Setting(
            d_in=d_in,
            d_sae=self.d_sae,
            k=self.k,
            batch_size=self.batch_size,
            steps=self.steps,
            dead_after_tokens=round(self.dead_share * tokens),
            lr=self.lr,
            seed=seed,
        )


CASES = {
    "layer 2, F 2048, k 16": Case(layer=2, d_sae=2048, k=16),
    "layer 3, F 1024, k 8": Case(layer=3, d_sae=1024, k=8),
    "layer 3, F 1024, k 8, lr 3e-3": Case(layer=3, d_sae=1024, k=8, lr=3e-3),
}
"""Two sizes at the recipe's lr, and one at ten times that, where latents die."""

Trainer = Callable[[list[Tensor], Setting], fastsae.SAE]


def train_fastsae(batches: list[Tensor], setting: Setting) -> fastsae.SAE:
    config = fastsae.TrainConfig(
        d_sae=setting.d_sae,
        k=setting.k,
        batch_size=setting.batch_size,
        tokens=setting.tokens,
        lr=setting.lr,
        dead_after_tokens=setting.dead_after_tokens,
        seed=setting.seed,
        device="cpu",
    )
    return fastsae.train(batches, config)


OURS = "fastsae"
TRAINERS: dict[str, Trainer] = {
    OURS: train_fastsae,
    "SAELens, defaults": peers.train_saelens,
    "SAELens, scaled input": functools.partial(
        peers.train_saelens, normalize_activations="expected_average_only_in"
    ),
    "dictionary_learning, defaults": functools.partial(
        peers.train_dictionary_learning, normalize_activations=False
    ),
    "dictionary_learning, scaled input": functools.partial(
        peers.train_dictionary_learning, normalize_activations=True
    ),
}


# --- one run ---


@functools.lru_cache(maxsize=1)
def activations(layer: int, rows: int, held_out: int) -> tuple[Tensor, Tensor]:
    """``rows`` activations to train on and ``held_out`` others, of other documents: both ``[n, D]``."""
    from fastsae.cli.presets import demo_config
    from fastsae.data.stream import open_stream

    stream = open_stream(
        demo_config(layer=layer, eval_tokens=held_out, batch_size=4096, seed=0, device="cpu")
    )
    found, parts = 0, []
    while found < rows and (layers := stream.next_batch()) is not None:
        (batch,) = layers
        parts.append(batch)
        found += len(batch)
    return torch.cat(parts)[:rows], stream.held_out()[0]


def draw_batches(pool: Tensor, setting: Setting) -> list[Tensor]:
    """The batches of a seed: rows of ``pool [n, D]`` without repetition, in random order."""
    if len(pool) < setting.tokens:
        sys.exit(
            f"the text gives {len(pool):,} activations, fewer than the {setting.tokens:,} of a run"
        )
    generator = torch.Generator().manual_seed(setting.seed)
    order = torch.randperm(len(pool), generator=generator)[: setting.tokens]
    return list(pool[order].split(setting.batch_size))


def measure(
    train: Trainer, batches: list[Tensor], setting: Setting, held_out: Tensor
) -> dict[str, Any]:
    """Train on ``batches`` and evaluate on ``held_out``, selecting over the batch and by threshold."""
    sae = train([batch.clone() for batch in batches], setting)
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


def compare(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences, fastsae less the peer, over the seeds that both have; one dict a case and peer."""
    runs = {(row["case"], row["trainer"], int(row["seed"])): row for row in rows}
    found = []
    for case in dict.fromkeys(case for case, _, _ in runs):
        for peer in dict.fromkeys(t for c, t, _ in runs if c == case and t != OURS):
            seeds = sorted(
                seed for c, t, seed in runs if (c, t) == (case, peer) and (case, OURS, seed) in runs
            )
            if not seeds:
                continue
            result: dict[str, Any] = {"case": case, "peer": peer, "seeds": seeds}
            for metric in COMPARED:
                differences = [
                    float(runs[case, OURS, seed][metric]) - float(runs[case, peer, seed][metric])
                    for seed in seeds
                ]
                n = len(differences)
                error = stdev(differences) / n**0.5 if n > 1 else float("nan")
                result[metric] = {"difference": mean(differences), "standard_error": error}
            result["passes"] = all(
                passes(result[m]["difference"], result[m]["standard_error"]) for m in CRITERIA
            )
            found.append(result)
    return found


def passes(difference: float, standard_error: float) -> bool:
    """Not below: at least -MARGIN, or less than a standard error below 0."""
    return difference >= -MARGIN or difference + standard_error >= 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the mean of each trainer, and fastsae's paired difference to it."""
    comparisons = {(c["case"], c["peer"]): c for c in compare(rows)}
    lines = [
        "| size | trainer | explained variance | fastsae's difference | alive latents | fastsae's difference "
        "| by threshold: EV | L0 | not below |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_trainer: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_trainer.setdefault((row["case"], row["trainer"]), []).append(row)
    for (case, trainer), runs in by_trainer.items():
        comparison = comparisons.get((case, trainer))
        means = {
            name: mean(float(run[name]) for run in runs) for name in (*COMPARED, "threshold_l0")
        }
        lines.append(
            f"| {case} | {trainer} "
            f"| {means['explained_variance']:.4f} | {_difference(comparison, 'explained_variance')} "
            f"| {means['alive_fraction']:.4f} | {_difference(comparison, 'alive_fraction')} "
            f"| {means['threshold_explained_variance']:.4f} | {means['threshold_l0']:.2f} "
            f"| {'' if comparison is None else 'yes' if comparison['passes'] else '**no**'} |"
        )
    return "\n".join(lines)


def _difference(comparison: dict[str, Any] | None, metric: str) -> str:
    if comparison is None:
        return ""
    return f"{comparison[metric]['difference']:+.4f} ± {comparison[metric]['standard_error']:.4f}"


# --- files ---


def read_runs(out: Path) -> list[dict[str, Any]]:
    path = out / "quality_runs.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_runs(out: Path, rows: list[dict[str, Any]]) -> None:
    """The runs in the order of cases, trainers and seeds, and the comparison with all that it rests on."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "quality_runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "comparison": compare(rows),
        "margin": MARGIN,
        "cases": {name: asdict(case) for name, case in CASES.items()},
        "activations": {"training": TRAINING_ROWS, "held_out": HELD_OUT_ROWS},
        "environment": environment(),
    }
    (out / "quality.json").write_text(json.dumps(summary, indent=2) + "\n")


def merge(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with ``new`` in place of an older run of the same case, trainer and seed; in order."""

    def key(row: dict[str, Any]) -> tuple[int, int, int]:
        return (
            list(CASES).index(row["case"]),
            list(TRAINERS).index(row["trainer"]),
            int(row["seed"]),
        )

    return sorted([*(row for row in rows if key(row) != key(new)), new], key=key)


def environment() -> dict[str, Any]:
    packages = ("torch", "numpy", "transformers", "sae-lens", "dictionary-learning", "glassllm")
    versions = {"fastsae": fastsae.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# --- command line ---


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--table", action="store_true", help="print the table of --out, train nothing"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = read_runs(args.out)
    if args.table:
        print(table(rows) if rows else f"no results in {args.out}")
        return
    for name in args.cases:
        case = CASES[name]
        pool, held_out = activations(case.layer, TRAINING_ROWS, HELD_OUT_ROWS)
        for seed in args.seeds:
            setting = case.setting(pool.shape[1], seed)
            batches = draw_batches(pool, setting)
            for trainer in args.trainers:
                result = measure(TRAINERS[trainer], batches, setting, held_out)
                rows = merge(rows, {"case": name, "trainer": trainer, "seed": seed, **result})
                write_runs(args.out, rows)
                print(
                    f"{name} | seed {seed} | {trainer}: EV {result['explained_variance']:.4f}, "
                    f"alive {result['alive_fraction']:.4f}",
                    flush=True,
                )
    print(table(rows))


if __name__ == "__main__":
    main()
