"""The table and the picture of several runs, finished or running, from what they have written so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.table import columns
from ..files import is_held, read_json
from ..metrics import DENSITY_EDGES
from .tracking import METRICS_FILE, read_metrics

_COLUMNS = {
    "state": ("state", ""),
    "tokens_seen": ("tokens", ",.0f"),
    "explained_variance": ("ev", ".4f"),
    "held_out": ("ev held out", ".4f"),
    "l0": ("l0", ".1f"),
    "alive_fraction": ("alive", ".1%"),
    "dead": ("dead", ",.0f"),
    "objective": ("objective", ".4g"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "tokens_per_second_step": ("tok/s, step", ",.0f"),
}


@dataclass(frozen=True)
class RunSummary:
    """One run as it is now."""

    name: str
    state: str
    """``running``, ``finished`` or ``stopped``."""
    metrics: list[dict[str, Any]]
    """What ``metrics.jsonl`` holds, in order; empty before the first line."""
    summary: dict[str, Any]
    """``summary.json`` of a finished run, else empty."""

    @property
    def row(self) -> dict[str, Any]:
        """The newest numbers, by the names of ``metrics.jsonl``."""
        held_out = self.summary.get("explained_variance") if "inference" in self.summary else None
        newest = self.metrics[-1] if self.metrics else {}
        return {"state": self.state, **newest, "held_out": held_out}


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders among ``paths``; a folder of runs stands for all of them.

    Raises:
        ConfigError: a path does not exist, or holds no run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ConfigError(f"{path} does not exist; give folders of runs, as in runs/NAME")
        inside = sorted(file.parent for file in path.glob(f"*/{METRICS_FILE}"))
        if (path / METRICS_FILE).is_file():
            inside = [path]
        if not inside:
            raise ConfigError(
                f"{path} holds no {METRICS_FILE}, and no folder in it does: it is not a run, nor a "
                f"folder of runs"
            )
        found += [folder for folder in inside if folder not in found]
    return found


def read_run(directory: Path) -> RunSummary:
    """One run as it is now. Raises ConfigError if a file of it is not what a run writes."""
    summary_file = directory / "summary.json"
    try:
        metrics = read_metrics(directory)
        summary = read_json(summary_file) if summary_file.exists() else {}
        seen = [m["tokens_seen"] for m in metrics]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the files of {directory} are not those of a run ({type(error).__name__}: {error}); leave "
            f"it out"
        ) from error
    # A finished run that goes on, with more tokens, is not finished; nor is its summary of today.
    if seen and summary.get("tokens_seen", 0) < seen[-1]:
        summary = {}
    at_rest = "finished" if summary else "stopped"
    state = "running" if is_held(directory) else at_rest
    return RunSummary(directory.name, state, metrics, summary)


def table(runs: Sequence[RunSummary]) -> str:
    """One line a run; a dash where there is no number yet."""
    lines = [["run", *(head for head, _ in _COLUMNS.values())]]
    for run in runs:
        cells = ((run.row.get(name), form) for name, (_, form) in _COLUMNS.items())
        lines.append([run.name, *("-" if v is None else format(v, form) for v, form in cells)])
    return "\n".join(columns(lines, left=2))


def plot(path: Path, runs: Sequence[RunSummary]) -> None:
    """Draw what tells runs apart, or how one went, to a PNG; what was not recorded is left out.

    Over tokens: explained variance, the objective, latents active since the line before, and speed. Then
    the densities of the last line and, of several runs, explained variance against L0; of one, which
    has no L0 of its own while it trains, the threshold.
    """
    # The object interface: pyplot would keep global state in whoever imports us.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 3).flat)
    newest = [run.metrics[-1] for run in runs if run.metrics]
    window = max((metrics.get("density_tokens", 0) for metrics in newest), default=0)
    recent = f"the last {window:,} training tokens"
    curves = {
        "explained_variance": "Explained variance (training batches)",
        "objective": "Objective (training batches)",
        "active": f"Latents active in {recent}",
        "tokens_per_second": "Tokens per second, everything",
    }
    alone = len(runs) == 1
    if alone:
        curves["threshold"] = "Threshold (raw units)"
    else:
        _plot_scores(axes.pop(0), runs)
    for axis, (name, title) in zip(axes, curves.items(), strict=False):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("tokens", fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        values = [[_value(m, name) for m in run.metrics] for run in runs]
        for i, run in enumerate(runs):
            tokens = [m["tokens_seen"] for m in run.metrics]
            axis.plot(tokens, values[i], color=f"C{i % 10}", linewidth=1.4)
        if name in ("active", "tokens_per_second"):
            known = filter(math.isfinite, chain(*values))
            axis.set_ylim(0, 1.05 * max(known, default=1))
    density = axes[len(curves)]
    density.set_title(f"Feature density in {recent}", fontsize=10, loc="left")
    density.set_xlabel("log10 of the share of tokens a latent is active on", fontsize=9)
    density.set_ylabel("latents", fontsize=9)
    for i, run in enumerate(runs):
        if run.metrics and "density_histogram" in run.metrics[-1]:
            counts = run.metrics[-1]["density_histogram"]
            density.stairs(counts, DENSITY_EDGES, color=f"C{i % 10}", linewidth=1.4, fill=alone)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    if alone:
        _annotate(figure, *runs)
    else:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _value(m: dict[str, Any], name: str) -> float:
    value = sum(m.get("density_histogram", ())) if name == "active" else m.get(name)
    return math.nan if value is None else value


def _plot_scores(axis: Any, runs: Sequence[RunSummary]) -> None:
    axis.set_title("Explained variance against L0 (filled: held out)", fontsize=10, loc="left")
    axis.set_xlabel("L0 (active latents per token)", fontsize=9)
    for i, run in enumerate(runs):
        if not run.metrics:
            continue
        held_out = run.row["held_out"] is not None
        score = run.summary if held_out else run.metrics[-1]
        axis.plot(
            _value(score, "l0"), _value(score, "explained_variance"), "osD^v"[i // 10 % 5],
            color=f"C{i % 10}", label=run.name, fillstyle="full" if held_out else "none",
        )  # fmt: skip


def _annotate(figure: Any, run: RunSummary) -> None:
    """Add to the picture of one run what its summary knows: its size, and the baseline."""
    title, summary = run.name, run.summary
    if "d_sae" in summary:
        title += f": {summary['d_sae']:,} latents on {summary['d_in']:,} dimensions"
        figure.axes[2].axhline(summary["d_sae"], color="0.6", linestyle="--", linewidth=1.2)
        figure.axes[2].set_ylim(top=1.05 * summary["d_sae"])
    pca = summary.get("pca_explained_variance")
    if pca is not None:
        axis = figure.axes[0]
        axis.axhline(pca, color="C1", linestyle="--", linewidth=1.2)
        axis.annotate(
            f"PCA with as many components (held out): {pca:.3f}", (0.98, pca),
            xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=8, color="C1",
        )  # fmt: skip
    figure.suptitle(title, fontsize=11)
