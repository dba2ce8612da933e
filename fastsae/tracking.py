"""What a run tells while it trains: metrics.jsonl always, the terminal, Weights & Biases if wanted."""

from __future__ import annotations

import json
import logging
import netrc
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .config import TrainConfig

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Writes each set of metrics to every place that wants them; a context manager.

    Args:
        directory: the run's folder; with None nothing is written and only log lines appear.
        tokens_seen: where the run stands; metrics written after that point, by a run that was killed
            before its next checkpoint, are dropped, for they will come again.
        wandb_id: the Weights & Biases run to go on with.
    """

    def __init__(
        self,
        directory: Path | None,
        config: TrainConfig,
        tokens_seen: int,
        wandb_id: str | None = None,
    ) -> None:
        self._file = None
        self._wandb: Any = None
        self._bar = None
        self._tokens = config.tokens
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [m for m in read_metrics(directory) if m["tokens_seen"] <= tokens_seen]
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(directory, config, wandb_id)
        if sys.stderr.isatty():
            total = config.steps * config.batch_size
            self._bar = tqdm(total=total, initial=tokens_seen, unit="tok", unit_scale=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            _quietly(lambda: self._wandb.finish(exit_code=0 if error is None else 1))

    @property
    def wandb_id(self) -> str | None:
        """The id of the Weights & Biases run, kept in checkpoints."""
        return None if self._wandb is None else self._wandb.id

    def log(self, metrics: dict[str, float | int]) -> None:
        """Write one set of metrics, which holds ``tokens_seen``."""
        if self._file is not None:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        if self._wandb is not None:
            _quietly(lambda: self._wandb.log(metrics, step=metrics["step"]))
        if self._bar is not None:
            shown = {
                "ev": "explained_variance",
                "l0": "l0",
                "alive": "alive_fraction",
                "loss": "loss",
            }
            self._bar.set_postfix({short: f"{metrics[name]:.4g}" for short, name in shown.items()})
        else:
            log.info("%s", _line(metrics, self._tokens))

    def advance(self, tokens_seen: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(tokens_seen - self._bar.n)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Hand the run's final numbers to Weights & Biases."""
        if self._wandb is not None:
            _quietly(lambda: self._wandb.summary.update(summary))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run so far; a last line torn by a kill is left out."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def _line(m: dict[str, float | int], tokens: int) -> str:
    seen = m["tokens_seen"]
    return (
        f"{seen:>11,} / {tokens:,} tokens ({seen / tokens:6.1%})"
        f" | loss {m['loss']:.4g} | ev {m['explained_variance']:.4f} | l0 {m['l0']:.1f}"
        f" | alive {m['alive_fraction']:.1%} | {m['tokens_per_second']:,.0f} tok/s"
    )


def _start_wandb(directory: Path, config: TrainConfig, run_id: str | None) -> Any:
    mode = config.wandb
    if mode == "auto":
        # Looked up without importing wandb, which takes seconds.
        mode = "online" if os.environ.get("WANDB_API_KEY") or _has_wandb_key() else "disabled"
    if mode == "disabled":
        return None
    try:
        import wandb

        return wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.run_name,
            id=run_id,
            resume="allow" if run_id else None,
            config=config.to_dict(),
            dir=directory,
            mode=mode,
        )
    except Exception as error:  # tracking must never cost a run
        log.warning("Weights & Biases is off for this run: %s", error)
        return None


def _has_wandb_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _quietly(call: Any) -> None:
    try:
        call()
    except Exception as error:  # tracking must never cost a run
        log.warning("Weights & Biases: %s", error)
