"""What a run tells while it trains: metrics.jsonl always, the terminal, Weights & Biases if wanted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import TrainConfig
from ..files import plain, to_json, write_text
from .weights_and_biases import WandbRun, wandb_mode

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Keeps the metrics of one run: ``metrics.jsonl``, and Weights & Biases; a context manager.

    Args:
        directory: the run's folder.
        tokens_seen: where the run stands; metrics written after that point, by a run that was killed
            before its next checkpoint, are dropped, for they will come again.
        wandb_id: the Weights & Biases run to go on with.
    """

    def __init__(
        self, directory: Path, config: TrainConfig, tokens_seen: int, wandb_id: str | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [m for m in read_metrics(directory) if m["tokens_seen"] <= tokens_seen]
        write_text(path, "".join(to_json(m) + "\n" for m in kept))
        self._file = path.open("a", encoding="utf-8")
        self._summary: dict[str, Any] = {}
        mode = wandb_mode(config)
        self._wandb = (
            None if mode == "disabled" else WandbRun(directory, config, wandb_id, mode, kept)
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(self._summary, failed=kind is not None)

    @property
    def wandb_id(self) -> str | None:
        """The id of the Weights & Biases run, kept in checkpoints."""
        return None if self._wandb is None else self._wandb.id

    def log(self, metrics: dict[str, Any]) -> None:
        """Keep one set of metrics, which holds ``tokens_seen``; a number that is not finite is null."""
        metrics = plain(metrics)
        self._file.write(to_json(metrics) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Hand the run's final numbers to Weights & Biases, at the end."""
        self._summary = plain(summary)


class Display:
    """What the terminal shows of one or several runs: a progress bar, or lines where there is none.

    Args:
        tokens: the target of every run.
        total: the same, rounded up to whole batches.
        bar: draw a progress bar if this is a terminal.
    """

    def __init__(self, tokens: int, total: int, tokens_seen: int, *, bar: bool) -> None:
        self._tokens = tokens
        self._bar = None
        if bar and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=tokens_seen, unit="tok", unit_scale=True)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, metrics: dict[str, dict[str, Any]]) -> None:
        """Show one set of metrics for each run, by its name; a single run goes without."""
        if self._bar is not None:
            shown = {
                "ev": "explained_variance",
                "l0": "l0",
                "alive": "alive_fraction",
                "objective": "objective",
            }
            self._bar.set_postfix(
                {
                    short: _range([m[name] for m in metrics.values()])
                    for short, name in shown.items()
                }
            )
            return
        width = max(map(len, metrics))
        for name, m in metrics.items():
            prefix = f"{name:<{width}} | " if len(metrics) > 1 else ""
            log.info("%s", prefix + _line(m, self._tokens))

    def advance(self, tokens_seen: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(tokens_seen - self._bar.n)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run so far; a last line torn by a kill is left out."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line, parse_constant=lambda _: None))
        except json.JSONDecodeError:
            break
    return metrics


def warn_of_idle_latents(config: TrainConfig, alive_fraction: float, window: int) -> None:
    """Warn, with what to try, if most latents were not active in the last ``window`` tokens of a run."""
    if alive_fraction < 0.5:
        log.warning(
            "%s: only %.1f%% of the latents were active within the last %s tokens. Train on more tokens (now "
            "%s), with fewer latents (--d-sae, --expansion), or with a smaller --dead-after-tokens (now %s)",
            config.run_name, 100 * alive_fraction, f"{window:,}", f"{config.tokens:,}",
            f"{config.dead_after:,}",
        )  # fmt: skip


def warn_of_baseline(config: TrainConfig, lr: float, explained: float, pca: float | None) -> None:
    """Warn, with what to try, if PCA of as many components explains more of the variance."""
    if pca is not None and explained < pca:
        log.warning(
            "%s: PCA with k = %g components explains more of the variance (%.3f) than this SAE (%.3f). Train "
            "on more tokens (now %s), with a larger --lr (now %g), or drop outliers (--outlier-norm)",
            config.run_name, config.k, pca, explained, f"{config.tokens:,}", lr,
        )  # fmt: skip


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}-{high}"


def _line(m: dict[str, Any], tokens: int) -> str:
    seen = m["tokens_seen"]
    return (
        f"{seen:>11,} / {tokens:,} tokens ({seen / tokens:6.1%})"
        f" | objective {m['objective']:.4g} | ev {m['explained_variance']:.4f} | l0 {m['l0']:.1f}"
        f" | alive {m['alive_fraction']:.1%} of the last {m['alive_window_tokens']:,} tokens"
        f" | {m['tokens_per_second']:,.0f} tok/s"
    )
