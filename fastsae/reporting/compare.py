"""The table and the picture of several runs, finished or running, from what they have written so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..training import checkpoint
from .tracking import METRICS_FILE, read_metrics

_COLUMNS = {
    "state": ("state", ""),
    "tokens_seen": ("tokens", ",.0f"),
    "explained_variance": ("ev", ".4f"),
    "held_out": ("ev held out", ".4f"),
    "l0": ("l0", ".1f"),
    "alive_fraction": ("alive", ".1%"),
    "dead": ("dead", ",.0f"),
    "loss": ("loss", ".4g"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "tokens_per_second_step": ("tok/s, step", ",.0f"),
}


@dataclass(frozen=True)
class Entry:
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
        return {
            "state": self.state,
            **(self.metrics[-1] if self.metrics else {}),
            "held_out": held_out,
        }


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


def read_run(directory: Path) -> Entry:
    """One run as it is now. Raises ConfigError if a file of it is not what a run writes."""
    summary_file = directory / "summary.json"
    try:
        metrics = read_metrics(directory)
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
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
    state = "running" if checkpoint.is_locked(directory) else at_rest
    return Entry(directory.name, state, metrics, summary)


def table(entries: Sequence[Entry]) -> str:
    """One line a run; a dash where there is no number yet."""
    lines = [["run", *(head for head, _ in _COLUMNS.values())]]
    for entry in entries:
        cells = ((entry.row.get(name), form) for name, (_, form) in _COLUMNS.items())
        lines.append(
            [entry.name, *("-" if value is None else format(value, form) for value, form in cells)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot(path: Path, entries: Sequence[Entry]) -> None:
    """Draw explained variance against L0, and explained variance, alive latents and speed over tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    over_tokens = {
        "explained_variance": (axes[0, 1], "Explained variance (training batches)"),
        "alive_fraction": (axes[1, 0], "Alive latents (active in the last 1M tokens)"),
        "tokens_per_second": (axes[1, 1], "Tokens per second, everything"),
    }
    for i, entry in enumerate(entries):
        if not entry.metrics:
            continue
        color, marker = f"C{i % 10}", "osD^v"[i // 10 % 5]
        on_held_out = entry.row["held_out"] is not None
        score = entry.summary if on_held_out else entry.metrics[-1]
        axes[0, 0].plot(
            score["l0"], score["explained_variance"], marker, color=color, label=entry.name,
            fillstyle="full" if on_held_out else "none",
        )  # fmt: skip
        tokens = [m["tokens_seen"] for m in entry.metrics]
        for name, (axis, _) in over_tokens.items():
            axis.plot(tokens, [m[name] for m in entry.metrics], color=color, linewidth=1.4)
    axes[0, 0].set_title(
        "Explained variance against L0 (filled: held out; hollow: last training batch)",
        fontsize=10,
        loc="left",
    )
    axes[0, 0].set_xlabel("L0 (active latents per token)", fontsize=9)
    for axis, title in over_tokens.values():
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("tokens", fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
