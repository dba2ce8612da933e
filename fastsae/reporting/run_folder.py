"""The folder of a run: who may write to it, what is in it, and what is sent from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors.torch import load_file
from torch import Tensor

from ..config import BEFORE, TrainConfig
from ..device import resolve_device, resolve_precision
from ..errors import CheckpointError, ConfigError
from ..files import hold, read_json, require_writable, write_json, write_tensors
from ..lm.held_out import HeldOutText
from ..sae import io
from ..sae.module import SAE
from .model_card import model_card
from .publish import Publisher
from .tracking import Tracker, read_metrics

log = logging.getLogger(__name__)

RUN, SUMMARY, HELD_OUT = "run.json", "summary.json", "held_out.safetensors"


class RunFolder:
    """The folder of one run.

    While it trains: ``metrics.jsonl``, ``checkpoints/`` (written by ``training.checkpoint``). Once it is
    finished: the SAE; ``run.json``, its settings and history; ``held_out.safetensors``, what it was not
    trained on: rows of text, or activations where the text is not known; ``summary.json``, what came of
    it. The last is completed by ``report.report_run``, which also writes ``training.png``,
    ``evaluation.json`` and ``report.html``.

    Attributes: ``path``; ``config``; ``history``: ``tokens_seen``, ``step`` and ``time`` (UTC) of every
    checkpoint written; ``wandb_id``: of the run on Weights & Biases, if there is one.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.history: list[dict[str, Any]] = []
        self.wandb_id: str | None = None
        self._tracker: Tracker | None = None
        self._publisher: Publisher | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder | None:
        """Where a run writes to: a folder of its name in ``config.out``; None without that."""
        return None if config.out is None else cls(Path(config.out) / config.run_name, config)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """The folder of a finished run. Raises ConfigError if it is none."""
        try:
            content = read_json(path / RUN)
            folder = cls(path, TrainConfig(**BEFORE | content["config"]))
            folder.history, folder.wandb_id = content["history"], content["wandb_id"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not the folder of a finished run of this version ({error}); give one that "
                f"holds {RUN}"
            ) from error
        return folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    # --- who may write ---

    def require_usable(self) -> None:
        """Raise ConfigError if the run cannot be written here, or must not go on; writes nothing."""
        require_writable(self.path)
        if self.config.resume == "never" and self.path.exists():
            raise ConfigError(
                f"{self.path} exists and --resume is never. Choose another --name or --out, delete "
                f"that folder, or let --resume auto go on with it"
            )

    def locked(self) -> AbstractContextManager[object]:
        """Hold the folder for this process, until the context ends.

        Raises:
            CheckpointError: another process trains into it, or it cannot be written.
        """
        try:
            return hold(self.path)
        except Timeout:
            raise CheckpointError(
                f"another process is training into {self.path}. Wait for it, or give this run its own "
                f"--name"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.path}: {error.strerror or error}. Free some space or make the "
                f"folder writable, then give the same command again"
            ) from error

    def open(self, scope: ExitStack, tokens_seen: int) -> None:
        """Open the metrics and what they are sent to, until ``scope`` ends.

        Args:
            tokens_seen: where the run stands: metrics of later tokens will come again.
        """
        scope.callback(self._closed)
        tracker = Tracker(self.path, self.config, tokens_seen, self.wandb_id)
        self._tracker = scope.enter_context(tracker)
        self.wandb_id = tracker.wandb_id
        if self.config.hub_repository is not None:
            self._publisher = scope.enter_context(
                Publisher(self.path, self.config.hub_repository, self.config.hub_private)
            )

    def _closed(self) -> None:
        self._tracker = self._publisher = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold and open the folder of a finished run, if its training does not still have it open."""
        with ExitStack() as scope:
            if self._tracker is None:
                scope.enter_context(self.locked())
                metrics = read_metrics(self.path)
                self.open(scope, metrics[-1]["tokens_seen"] if metrics else 0)
            yield

    # --- what is written and sent ---

    def log(self, metrics: dict[str, Any]) -> None:
        """Keep one set of metrics, which holds ``tokens_seen``."""
        assert self._tracker is not None
        self._tracker.log(metrics)

    def last_scores(self) -> dict[str, Any]:
        """The scores of the last logged training batch, by the names that an evaluation has for its own."""
        scores: dict[str, Any] = {"explained_variance": None, "pca_explained_variance": None}
        if metrics := read_metrics(self.path):
            known = ("explained_variance", "l0", "alive_fraction")
            scores |= {name: metrics[-1][name] for name in known}
            scores["evaluated_on"] = "the last logged training batch"
        return scores

    @property
    def publishes(self) -> bool:
        """Whether there is where to push to."""
        return self._publisher is not None

    def publish(
        self, source: Path, sae: SAE, message: str, summary: dict[str, Any] | None = None
    ) -> None:
        """Push the SAE in ``source``, a checkpoint or this folder, if there is where to; returns when
        it is safe to delete."""
        if self._publisher is not None:
            card = model_card(self.config, sae, self.history, read_metrics(self.path), summary)
            self._publisher.publish(source, card, message)

    def finish(
        self,
        sae: SAE,
        summary: dict[str, Any],
        held_out: HeldOutText | Tensor | tuple[Tensor, Tensor] | None,
    ) -> None:
        """Write and send the finished SAE, with what it came to and what it can be evaluated on."""
        io.save(sae, self.path)
        text = {}
        if isinstance(held_out, HeldOutText):
            text = {"name": held_out.name, "documents_are": held_out.documents_are}
            tensors = {
                "tokens": torch.cat(held_out.marked_rows),
                "lengths": torch.tensor([len(row) for row in held_out.rows]),
                "documents": torch.tensor(held_out.documents),
                "special_ids": held_out.special_ids,
            }
            write_tensors(self.path / HELD_OUT, tensors)
        elif held_out is not None:
            rows = held_out if isinstance(held_out, tuple) else (held_out,)
            names = zip(("activations", "target"), rows, strict=False)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in names}
            write_tensors(self.path / HELD_OUT, tensors)
        run = {"config": self.config.to_dict(), "history": self.history, "wandb_id": self.wandb_id}
        write_json(self.path / RUN, {**run, "text": text})
        self.summarize(sae, summary, f"Add {self.config.run_name}")
        log.info("%s", _describe(self.path, self.config, summary))

    def summarize(self, sae: SAE, summary: dict[str, Any], message: str) -> None:
        """Write what came of the run, and send it with the SAE."""
        write_json(self.path / SUMMARY, summary)
        assert self._tracker is not None
        self._tracker.summarize(summary)
        self.publish(self.path, sae, message, summary)

    # --- what is read of a finished run ---

    def summary(self) -> dict[str, Any]:
        """What came of the run."""
        return read_json(self.path / SUMMARY)

    def load_sae(self, device: str) -> SAE:
        """The finished SAE, in the precision it was trained in. Raises FormatError or ConfigError."""
        sae = io.load(self.path, resolve_device(device))
        sae.precision = resolve_precision(self.config.precision, sae.W_dec.device)
        return sae

    def held_out(self) -> HeldOutText | Tensor | tuple[Tensor, Tensor] | None:
        """What the run was not trained on: text, or activations ``[N, D]``, of a transcoder with their targets;
        None if nothing was kept."""
        path = self.path / HELD_OUT
        if not path.exists():
            return None
        tensors = load_file(path)
        if "target" in tensors:
            return tensors["activations"], tensors["target"]
        if "activations" in tensors:
            return tensors["activations"]
        text = read_json(self.path / RUN)["text"]
        rows = tensors["tokens"].split(tensors["lengths"].tolist())
        documents, special = tensors["documents"].tolist(), tensors["special_ids"].tolist()
        return HeldOutText(rows, documents, special, text["name"], text["documents_are"])


def _describe(directory: Path, config: TrainConfig, s: dict[str, Any]) -> str:
    seconds = {n.removeprefix("seconds_"): v for n, v in s.items() if n.startswith("seconds_")}
    speeds = [f"{stage} {s['tokens_seen'] / v:,.0f}" for stage, v in seconds.items() if v > 0]
    peak = s["peak_memory_bytes"]
    lines = [
        f"finished {config.run_name}: {s['tokens_seen']:,} tokens in {s['step']:,} steps",
        f"  tokens per second   {s['tokens_per_second']:,.0f}   ({', '.join(speeds)})",
        *([f"  peak memory         {peak / 1e9:.2f} GB"] if peak is not None else []),
        f"  SAE                 {directory}/sae_weights.safetensors, cfg.json",
        f"  load it             fastsae.load({str(directory)!r})",
    ]
    return "\n".join(lines)
