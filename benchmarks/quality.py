"""Which trainer makes the best SAE of the same tokens, and what each of our defaults is worth.

    python benchmarks/quality.py --model DIR --cache DIR      train, measure, write; what is there is kept
    python benchmarks/quality.py --cases demo --seeds 0       that part alone
    python benchmarks/quality.py --table                      tables of the results (Markdown)
    python benchmarks/quality.py --plot docs/learning_curves.png

Every trainer gets the same batches in the same order, without outliers, and is measured by the same code
on held-out tokens, selected per token (TopK with the same k), so at equal L0. A seed is one order of the
batches, paired over the trainers, and each trainer's initial weights. Peers are trained at their documented
learning rate and at the best of a grid, the one with the highest explained variance on a seed that is in
no table, or, where runs take an hour, on the first that is, which favours them (rates beyond a worse one are
not tried); counts of steps or tokens that they document (warm-up, dead window) are scaled to the run.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import quality_data
import torch
from measure import Shape, environment
from quality_data import Batches, Data
from results import HISTORY, RESULTS, Row, append, long_rows, read_csv
from trainers import OURS, TRAINERS, Problem, missing

from fastsae import SAE, BatchTopK, evaluate
from fastsae.cli.presets import demo_config

RUNS = "quality_study.csv"
CHOOSING = 100
"""The seed that is in no table."""
POINTS = (0.1, 0.2, 0.5, 1.0)
"""Shares of the run at which learning curves are measured."""
RATES = (1e-3, 3e-3, 1e-2)
"""Beside the trainer's own, which is 3e-4 in SAELens."""
COLUMNS = (
    "case", "trainer", "lr", "seed", "tokens", "explained_variance", "alive_fraction",
    "threshold_explained_variance", "threshold_l0", "loss_recovered", "probing", "f1", "mcc",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What to train on: activations, how many ``steps`` of ``batch_size``, the SAE's size."""

    data: Callable[[Settings, Case], Data]
    d_sae: int
    k: int
    steps: int
    batch_size: int = 1024
    levels: tuple[int, ...] = ()  # of the Matryoshka forms
    seeds: tuple[int, ...] = (0, 1, 2)
    choosing: int = CHOOSING  # the seed that chooses the peers' learning rates

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Settings:
    """Where a language model lies, and where activations may be kept."""

    model: Path | None = None
    cache: Path | None = None

    def smollm2(self, case: Case) -> Data:
        if self.model is None:
            raise SystemExit(
                "this case needs SmolLM2: python benchmarks/smollm2.py DIR, then --model DIR"
            )
        return quality_data.language_model(
            quality_data.smollm2(self.model, self.cache, case.tokens)
        )

    def demo(self, case: Case) -> Data:
        return quality_data.language_model(quality_data.demo(demo_config(), case.tokens))

    def features_1024(self, case: Case) -> Data:
        return quality_data.synthetic(1024, 128, case.tokens, self.cache)

    def features_4096(self, case: Case) -> Data:
        return quality_data.synthetic(4096, 512, case.tokens, self.cache)


CASES = {
    "SmolLM2": Case(Settings.smollm2, 9216, 32, 1960, levels=(576, 2304, 9216), choosing=0),
    "demo": Case(Settings.demo, 1024, 16, 750, levels=(64, 256, 1024)),
    "features 1024": Case(
        Settings.features_1024, 1024, 12, 1000, levels=(64, 256, 1024), seeds=(1, 2, 3)
    ),
    "features 4096": Case(
        Settings.features_4096,
        4096,
        40,
        1000,
        levels=(256, 1024, 4096),
        seeds=(1, 2, 3),
        choosing=1,
    ),
}


@dataclass(frozen=True)
class Variant:
    """A trainer with its options, at its own learning rate and those of ``rates``, on a ``share`` of the
    case's tokens. ``options`` are for its ``train_sae``; a value may be a function of the case."""

    trainer: str = OURS
    options: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    share: float = 1.0

    def problem(self, case: Case, pool: torch.Tensor, seed: int, lr: float | None) -> Problem:
        steps = round(self.share * case.steps)
        steps -= steps % 10  # so that every point of the curve is a step
        return Problem(
            Shape(case.batch_size, pool.shape[1], case.d_sae, case.k),
            Batches(pool, case.batch_size, steps, seed),
            steps=steps, lr=lr, seed=seed, dead_after=max(1, steps * case.batch_size // 10),
        )  # fmt: skip


CONSTANT_LR: dict[str, Any] = {"lr_warmup_tokens": 0, "lr_decay_tokens": 0}
FORMER: dict[str, Any] = {
    **CONSTANT_LR, "scale_by_norm": True, "lr": 3e-4, "latent_quota": 0.0,
    "dead_after_tokens": 10_000_000, "encoder_start": 1.0, "decoder_lr_ratio": 1.0,
    "adam_betas": (0.9, 0.999),
}  # fmt: skip
"""The defaults of the first version. It also kept outliers, which nobody gets here."""
levels = lambda case: list(case.levels)
VARIANTS = {
    OURS: Variant(),
    "fastsae, a third of the tokens": Variant(share=1 / 3),
    "fastsae, Matryoshka": Variant(options={"matryoshka": levels}),
    "fastsae, first version's defaults": Variant(options=FORMER),
    "SAELens": Variant("SAELens", rates=RATES),
    "SAELens, started at the mean": Variant("SAELens", {"start_at_mean": True}, rates=RATES),
    "SAELens, Matryoshka": Variant("SAELens", {"matryoshka_widths": levels}, rates=RATES),
    "dictionary_learning": Variant("dictionary_learning", rates=(3e-4, *RATES)),
    "sparsify": Variant("sparsify", rates=RATES),
    "default, scaled by the mean norm": Variant(options={"scale_by_norm": True}),
    "default, whole encoder": Variant(options={"encoder_start": 1.0}),
    "default, decoder at the same lr": Variant(options={"decoder_lr_ratio": 1.0}),
    "default, Adam's betas .9 .999": Variant(options={"adam_betas": (0.9, 0.999)}),
    "default, whole encoder, betas .7 .999": Variant(
        options={"encoder_start": 1.0, "adam_betas": (0.7, 0.999)}
    ),
    "default, lr 3e-4": Variant(options={"lr": 3e-4}),
    "default, constant lr": Variant(options=CONSTANT_LR),
    "default, no quota": Variant(options={"latent_quota": 0.0}),
    "default, dead after 10M": Variant(options={"dead_after_tokens": 10_000_000}),
    "default, plain objective": Variant(options={"objective": "plain"}),
}
"""Ours, the peers, and the defaults with one of them as the published recipe has it (or, of the encoder's start, as
the first version had it); and with two, which finds more of 4,096 known features."""


# --- one run ---


@lru_cache(maxsize=1)
def data_of(name: str, settings: Settings) -> Data:
    return CASES[name].data(settings, CASES[name])


def selecting(sae: SAE, k: float) -> SAE:
    """``sae`` as BatchTopK with its threshold, whatever format it was read from."""
    if not isinstance(sae.activation, BatchTopK):
        threshold = getattr(sae.activation, "threshold", torch.zeros(()))
        sae.activation = BatchTopK(k)
        sae.activation.threshold = threshold.detach().float().mean()
    sae.activation.inference = "topk"
    return sae.eval()


def run(variant: Variant, case: Case, data: Data, seed: int, lr: float | None) -> Iterator[Row]:
    """Train and measure: a row for each point of the learning curve, the last with every score."""
    if seed == data.drawn_with:
        raise SystemExit(
            f"an SAE of seed {seed} would begin with the true features, which were drawn with it; choose another"
        )
    problem = variant.problem(case, data.train, seed, lr)
    options = {k: v(case) if callable(v) else v for k, v in variant.options.items()}
    if "lr" in options:
        problem = replace(problem, lr=options.pop("lr"))
    points = {round(share * problem.steps) for share in POINTS[:-1]}
    rows: list[Row] = []

    def measure(done: int, sae: SAE) -> Row:
        scores = evaluate(selecting(sae, case.k), data.held_out, "topk")["topk"]
        found = {
            "explained_variance": scores.explained_variance,
            "alive_fraction": scores.alive_fraction,
        }
        return {"tokens": done * case.batch_size} | found

    def watch(done: int, current: Callable[[], SAE]) -> None:
        if done in points:
            rows.append(measure(done, current()))

    sae = TRAINERS[variant.trainer].train_sae(problem, watch, **options)
    yield from rows
    row = measure(problem.steps, sae)
    if variant.trainer != "sparsify":  # which has no threshold
        threshold = evaluate(sae, data.held_out, "threshold")["threshold"]
        row["threshold_explained_variance"] = threshold.explained_variance
        row["threshold_l0"] = threshold.l0
    yield row | data.scores(sae)


# --- all of them ---


def finals(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], Row]:
    """By case, trainer, learning rate and seed: the end of the run."""
    ends: dict[tuple[str, str, str, int], Row] = {}
    for row in rows:
        key = (row["case"], row["trainer"], row["lr"], int(row["seed"]))
        if key not in ends or int(row["tokens"]) > int(ends[key]["tokens"]):
            ends[key] = row
    return ends


def untried(tried: dict[str, float], rates: Iterable[float]) -> list[str]:
    """Learning rates to try next, until the best of ``tried``, which has their explained variance, has both
    neighbours of the grid beside it: beyond a worse one none is better. The trainer's own rate, "", comes first and
    has no place in the grid: as long as it is the best, all others may be."""
    grid = [str(rate) for rate in sorted(rates)]
    if "" not in tried:
        return [""]
    best = max(tried, key=tried.__getitem__)
    if best == "":
        return [lr for lr in grid if lr not in tried]
    at = grid.index(best)
    return [lr for lr in grid[max(at - 1, 0) : at + 2] if lr not in tried]


def tried_rates(rows: Iterable[Row], case: str, trainer: str) -> dict[str, float]:
    """Explained variance by learning rate, on the seed that chooses."""
    return {
        lr: float(row["explained_variance"])
        for (c, t, lr, seed), row in finals(rows).items()
        if (c, t, seed) == (case, trainer, CASES[case].choosing)
    }


def best_rate(rows: Iterable[Row], case: str, trainer: str) -> str | None:
    """The learning rate of the highest explained variance on the case's choosing seed, once it is known."""
    tried = tried_rates(rows, case, trainer)
    known = tried and not untried(tried, VARIANTS[trainer].rates)
    return max(tried, key=tried.__getitem__) if known else None


def wanted(
    rows: list[Row], case: str, trainer: str, seeds: Iterable[int]
) -> Iterator[tuple[str, int]]:
    """Learning rates and seeds still to be run: first what chooses, then what is published. Where a published
    seed chooses, the trainer's own rate is run on that one alone, unless it is the best."""
    done = {key[2:] for key in finals(rows) if key[:2] == (case, trainer)}
    choosing, rates = CASES[case].choosing, VARIANTS[trainer].rates
    if rates and (lrs := untried(tried_rates(rows, case, trainer), rates)):
        yield lrs[0], choosing
        return
    best = best_rate(rows, case, trainer) or ""
    published = ("", best) if choosing == CHOOSING else (best,)
    for seed in seeds:
        for lr in dict.fromkeys(published):
            if (lr, seed) not in done:
                yield lr, seed


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--model", type=Path, help="SmolLM2, as smollm2.py wrote it")
    parser.add_argument("--cache", type=Path, help="folder for activations, made once")
    parser.add_argument("--table", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--plot", type=Path, help="draw the learning curves there, train nothing")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--trainers", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, help="those of the tables if not given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / RUNS
    if args.table:
        print(tables(read_csv(path)) if path.exists() else f"no results in {args.out}")
        return
    if args.plot:
        plot(read_csv(path), args.plot)
        return
    settings, before = Settings(args.model, args.cache), read_runs(path)
    for name in args.cases:
        seeds = args.seeds or CASES[name].seeds
        for trainer in args.trainers:
            if package := missing(VARIANTS[trainer].trainer):
                print(f"{name} | {trainer}: left out, {package} is not installed")
                continue
            while todo := next(wanted(read_runs(path), name, trainer, seeds), None):
                lr, seed = todo
                data = data_of(name, settings)
                rate = float(lr) if lr else None
                found = list(run(VARIANTS[trainer], CASES[name], data, seed, rate))
                about = {"case": name, "trainer": trainer, "lr": lr, "seed": seed}
                add(path, [about | row for row in found])
                ev, alive = found[-1]["explained_variance"], found[-1]["alive_fraction"]
                print(
                    f"{name} | {trainer} | lr {lr or 'own'} | seed {seed}: EV {ev:.4f}, alive {alive:.4f}",
                    flush=True,
                )
    rows = read_runs(path)
    if len(rows) > len(before):
        to = HISTORY if args.out == RESULTS else args.out / HISTORY.name
        append(to, long_rows(environment("cpu"), history(rows)))
    print(tables(rows))


def read_runs(path: Path) -> list[Row]:
    return read_csv(path) if path.exists() else []


def add(path: Path, rows: list[Row]) -> None:
    """Append to the file; a run that is there is there whole."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            shown = {k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({name: shown.get(name, "") for name in COLUMNS})


# --- what is published ---


def published(rows: list[Row]) -> dict[tuple[str, str, str], dict[int, Row]]:
    """By case, trainer and learning rate ("own", the best of the grid, or all where the best is not known
    yet): the ends of its seeds."""
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    ends = finals(rows)
    bests = {key: best_rate(rows, *key) for key in {key[:2] for key in ends}}
    for (case, trainer, lr, seed), row in ends.items():
        best = bests[case, trainer]
        if seed == CHOOSING or (best is not None and lr not in ("", best)):
            continue
        label = lr or "own"
        found.setdefault((case, trainer, label), {})[seed] = row
    order = list(VARIANTS)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                list(CASES).index(item[0][0]),
                order.index(item[0][1]),
                item[0][2] != "own",
            ),
        )
    )


SHOWN = (
    "explained_variance",
    "alive_fraction",
    "loss_recovered",
    "probing",
    "f1",
    "mcc",
    "threshold_explained_variance",
    "threshold_l0",
)


def tables(rows: list[Row]) -> str:
    """Markdown: for each case the mean of every trainer over its seeds, and fastsae's paired difference."""
    all_runs, parts = published(rows), []
    for case in dict.fromkeys(case for case, _, _ in all_runs):
        mine = {key[1:]: seeds for key, seeds in all_runs.items() if key[0] == case}
        shown = [
            n for n in SHOWN if any(row[n] for seeds in mine.values() for row in seeds.values())
        ]
        parts += [f"**{case}**", ""]
        parts.append(
            "| trainer | lr | seeds | fastsae's difference | "
            + " | ".join(n.replace("_", " ") for n in shown)
            + " |"
        )
        parts.append("|---" * (4 + len(shown)) + "|")
        ours = mine.get((OURS, "own"), {})
        for (trainer, lr), seeds in mine.items():
            values = [[float(row[n]) for row in seeds.values() if row[n]] for n in shown]
            cells = [f"{mean(v):.4f}" if v else "" for v in values]
            parts.append(
                f"| {trainer} | {lr} | {len(seeds)} | {difference(ours, seeds) if trainer != OURS else ''} | "
                + " | ".join(cells)
                + " |"
            )
        parts.append("")
    return "\n".join(parts)


def difference(ours: dict[int, Row], theirs: dict[int, Row]) -> str:
    """Mean paired difference of explained variance over the seeds both have, and its standard error."""
    ev = lambda row: float(row["explained_variance"])
    gaps = [ev(ours[s]) - ev(theirs[s]) for s in sorted(ours.keys() & theirs.keys())]
    if not gaps:
        return ""
    return f"{mean(gaps):+.4f}" + (
        f" ± {stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else ""
    )


def history(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Means over the seeds, as rows of ``results``."""
    for (case, trainer, lr), seeds in published(rows).items():
        values = {n: [float(row[n]) for row in seeds.values() if row[n]] for n in SHOWN}
        means = {n.replace("_", " "): (mean(v), "") for n, v in values.items() if v}
        yield {
            "kind": "quality",
            "group": case,
            "trainer": f"{trainer}, lr {lr}",
            "rounds": len(seeds),
            "values": means,
        }


def plot(rows: list[Row], path: Path) -> None:
    """Learning curves: explained variance against tokens, one panel a case, mean of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        if int(row["seed"]) != CHOOSING:
            at = curves.setdefault((row["case"], row["trainer"], row["lr"]), {})
            at.setdefault(int(row["tokens"]), []).append(float(row["explained_variance"]))
    drawn = {
        (c, t, lr if lr != "own" else "")
        for c, t, lr in published(rows)
        if not t.startswith("default,")
    }
    end = lambda points: mean(points[max(points)])
    cases = [case for case in CASES if any(key[0] == case for key in drawn)]
    figure, axes = plt.subplots(1, len(cases), figsize=(5.2 * len(cases), 4.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        for i, trainer in enumerate(VARIANTS):
            rates = [lr for c, t, lr in drawn if (c, t) == (case, trainer)]
            if rates:
                points = max((curves[case, trainer, lr] for lr in rates), key=end)
                x = sorted(points)
                axis.plot(
                    [n / 1e6 for n in x],
                    [mean(points[n]) for n in x],
                    marker="o",
                    ms=3,
                    lw=2 if trainer == OURS else 1.2,
                    label=trainer,
                    color=f"C{i}",  # the same in every panel
                )
        axis.set(title=case, xlabel="million tokens", ylabel="explained variance (held out, TopK)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
