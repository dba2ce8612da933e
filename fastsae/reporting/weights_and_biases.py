"""Metrics to Weights & Biases, from a thread of their own."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from .background import Background

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long the service may take to answer when a run begins."""


class WandbRun:
    """One run on Weights & Biases.

    Everything but the constructor's choice of the id happens in the background, connecting included.
    When the service does not answer at the start, the run is written under ``directory`` for
    ``wandb sync``; when it fails later, what failed is counted and left out.

    Args:
        directory: where wandb keeps its files.
        run_id: the run to go on with; a new one is made if absent.
        mode: ``"online"`` or ``"offline"``.
        background: makes the calls.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        run_id: str | None,
        mode: str,
        background: Background,
    ) -> None:
        self.id = run_id or secrets.token_hex(4)
        self._run: Any = None
        self._background = background
        self._background.submit(lambda: self._start(directory, config, mode))

    def log(self, metrics: dict[str, Any]) -> None:
        self._background.submit(lambda: self._log(metrics))

    def summarize(self, summary: dict[str, Any]) -> None:
        self._background.submit(lambda: self._run and self._run.summary.update(summary))

    def close(self, exit_code: int) -> None:
        """End the run on the service, after what was logged."""
        self._background.submit(lambda: self._run and self._run.finish(exit_code=exit_code))

    # --- in the background ---

    def _start(self, directory: Path, config: TrainConfig, mode: str) -> None:
        import wandb

        if mode == "online" and (error := _unreachable()) is not None:
            log.warning(
                "Weights & Biases does not answer (%s); this run is written to the disk: send it with\n"
                "  wandb sync %s/wandb/offline-run-*-%s",
                error, directory, self.id,
            )  # fmt: skip
            mode = "offline"
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.run_name,
            id=self.id,
            resume="allow",
            config=config.to_dict(),
            dir=directory,
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # several SAEs may be in training
            settings=wandb.Settings(init_timeout=ANSWER_SECONDS, silent=True, console="off"),
        )
        # A resumed run repeats what was logged after its checkpoint: the axis is the tokens seen, not
        # wandb's own count, which refuses to go back.
        self._run.define_metric("*", step_metric="tokens_seen")

    def _log(self, metrics: dict[str, Any]) -> None:
        if self._run is None:
            return
        import numpy as np
        import wandb

        from .tracking import DENSITY_EDGES

        sent = dict(metrics)
        density = sent.pop("density_histogram", None)
        if density is not None:
            sent["log10_density"] = wandb.Histogram(
                np_histogram=(np.array(density), np.array(DENSITY_EDGES))
            )
        self._run.log(sent)


def wandb_mode(config: TrainConfig) -> str:
    """``config.wandb`` with ``auto`` decided: ``WANDB_MODE`` if set, online with a key, else disabled.

    Looked up without importing wandb, which takes seconds.
    """
    if config.wandb != "auto":
        return config.wandb
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _has_key() else "disabled"


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _unreachable() -> str | None:
    """Why the service cannot be reached; None if it answers, whatever it says."""
    try:
        urllib.request.urlopen(_address(), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(error)
    return None


def _has_key() -> bool:
    host = _address().partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
