"""Metrics to Weights & Biases, whose client queues what is logged and sends it in its own process."""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import secrets
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..metrics import DENSITY_EDGES
from .publish import HURRIED_SECONDS

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long the service may take to answer when a run begins."""

PATIENCE_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""


class WandbRun:
    """One run on Weights & Biases.

    Nothing here waits for the network but :meth:`close`, for a bounded time: a thread makes all calls,
    one after the other. When the service does not answer at the start, the run is written under
    ``directory`` for ``wandb sync``. Calls that fail are counted; the first error is told at once, the
    number at the end.

    Args:
        directory: where wandb keeps its files.
        run_id: the run to go on with; a new one is made if absent.
        mode: of ``wandb.init``.
        kept: what was logged before the run was resumed. It is logged again unless the service has it:
            parts of a run that were written to the disk replace each other when they are synced.
    """

    _hung = False  # whether the service kept the last run waiting in vain: it keeps no other

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        run_id: str | None,
        mode: str,
        kept: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.id = run_id or secrets.token_hex(4)
        self._folder = directory / "wandb"
        self._run: Any = None
        self._failed = 0
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._calls.put(partial(self._connect, directory, config, mode))
        for metrics in kept:
            self._calls.put(partial(self._log, metrics, kept=True))
        # A daemon: a connection that hangs must not keep a finished program from ending.
        self._thread = threading.Thread(target=self._work, name="fastsae wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, Any]) -> None:
        """Send one line of metrics, soon."""
        self._calls.put(partial(self._log, metrics))

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        """End the run on the service, after what was logged and with its final numbers."""
        hurried = failed or WandbRun._hung
        patience = min(PATIENCE_SECONDS, HURRIED_SECONDS) if hurried else PATIENCE_SECONDS
        self._calls.put(partial(self._end, summary, int(failed)))
        self._calls.put(None)
        self._thread.join(patience)
        WandbRun._hung = self._thread.is_alive()
        if WandbRun._hung or self._failed:
            log.warning(
                "Weights & Biases: %s%d calls failed. Everything is in metrics.jsonl; what was not sent "
                "lies in wandb/ beside it, and is sent by\n  %s",
                f"not finished within {patience:g} s; " if WandbRun._hung else "",
                self._failed, self._command("*run"),
            )  # fmt: skip

    def _command(self, parts: str) -> str:
        return f"wandb sync {shlex.quote(str(self._folder))}/{parts}-*-{self.id}"

    # --- in the background ---

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # whatever the client does, the run goes on
                self._failed += 1
                if self._failed == 1:
                    log.warning("Weights & Biases: %s: %s", type(error).__name__, error)

    def _log(self, metrics: dict[str, Any], kept: bool = False) -> None:
        if self._run is None or (kept and self._run.resumed):
            return
        import wandb

        sent = dict(metrics)
        density = sent.pop("density_histogram", None)
        if density is not None:
            histogram = (np.array(density), np.array(DENSITY_EDGES))
            sent["log10_density"] = wandb.Histogram(np_histogram=histogram)
        self._run.log(sent)

    def _connect(self, directory: Path, config: TrainConfig, mode: str) -> None:
        import wandb

        if mode == "online" and (error := _unreachable()) is not None:
            log.warning(
                "Weights & Biases does not answer (%s); this run is written to the disk: send it with\n"
                "  %s",
                error, self._command("offline-run"),
            )  # fmt: skip
            mode = "offline"
        run = wandb.init(
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
        run.define_metric("*", step_metric="tokens_seen")
        self._run = run

    def _end(self, summary: dict[str, Any], exit_code: int) -> None:
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)


# --- whether, and where ---


def wandb_mode(config: TrainConfig) -> str:
    """``config.wandb`` with ``auto`` decided: what wandb is set to, else online with a key, or disabled.

    Looked up without importing wandb, which takes seconds.
    """
    if config.wandb != "auto":
        return config.wandb
    settings = _settings()
    if mode := os.environ.get("WANDB_MODE") or settings.get("mode"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)  # wandb's older names
    return "online" if _has_key(settings) else "disabled"


def _settings() -> dict[str, str]:
    """What ``wandb login``, ``wandb offline``, ``wandb disabled`` and the like have written."""
    parser = configparser.ConfigParser(interpolation=None)
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(".wandb" if Path(".wandb").exists() else "wandb")
    try:
        parser.read([user / "settings", here / "settings"])
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _address(settings: dict[str, str]) -> str:
    return os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"


def _has_key(settings: dict[str, str]) -> bool:
    if os.environ.get("WANDB_API_KEY") or settings.get("api_key"):
        return True
    host = _address(settings).partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _unreachable() -> str | None:
    """Why the service cannot be reached; None if it answers, whatever it says."""
    try:
        urllib.request.urlopen(_address(_settings()), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(error)
    return None
