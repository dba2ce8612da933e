"""One run: one SAE in training, its counters and its metrics. The trainer drives one or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MAY_CHANGE_ON_RESUME, TrainConfig
from ..device import peak_memory_bytes
from ..errors import CheckpointError, StreamError
from ..files import plain
from ..lm.held_out import HeldOutText
from ..metrics import density_histogram
from ..reporting.run_folder import SUMMARY, RunFolder
from ..reporting.tracking import warn_of_idle_latents
from ..sae.module import SAE
from . import checkpoint
from .initialize import new_sae
from .update import UPDATES, Update, UpdateResult


@dataclass(frozen=True)
class StreamTotals:
    """What runs that train side by side have in common, since this process began."""

    seconds: dict[str, float]
    """Time spent in each stage of the stream, and ``elapsed`` in everything."""
    counts: dict[str, int]
    """Activations kept and dropped, by reason."""


class Run:
    """One SAE, from its first batch to its last.

    Args:
        config: the settings of this SAE.
        streams: which of the stream's tensors it trains on: what it reads, and what it reconstructs.

    Attributes: ``config``, ``streams``; ``folder``: where it is kept, or None if nothing is written;
    ``update``: there after :meth:`begin` or :meth:`restore`; ``step_count``.
    """

    update: Update

    def __init__(self, config: TrainConfig, streams: tuple[int, int]) -> None:
        self.config = config
        self.streams = streams
        self.folder = RunFolder.of(config)
        self.step_count = 0
        self._saved_step: int | None = None
        self._finite_step = 0  # the last one that was looked at
        self._seconds_before: dict[str, float] = {}  # by stage, of the processes before this one
        self._update_seconds = 0.0
        self._last: tuple[Tensor, UpdateResult] | None = None

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def d_in(self) -> int | None:
        """The width of the activations; None before the first ones came."""
        return self.update.sae.d_in if hasattr(self, "update") else None

    @property
    def tokens_seen(self) -> int:
        return self.update.tokens_seen

    # --- where it begins ---

    def begin(self, sae: SAE) -> None:
        """Train ``sae`` from here on."""
        self.update = UPDATES[self.config.step](sae, self.config)
        # Since the last line of metrics, for the density of each latent.
        self._fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self._fired_tokens = 0

    def saved_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return [] if self.folder is None else checkpoint.steps(self.folder.checkpoints)

    def saved(self, step: int) -> Path:
        """The checkpoint of ``step``."""
        assert self.folder is not None
        return self.folder.checkpoints / f"step_{step}"

    def saved_tokens(self) -> int:
        """The tokens that the newest checkpoint has seen."""
        newest = checkpoint.newest(self.folder.checkpoints) if self.folder else None
        return 0 if newest is None else checkpoint.load_meta(newest)["tokens_seen"]

    def is_finished(self) -> bool:
        """Whether the newest checkpoint has seen all tokens."""
        return self.saved_tokens() >= self.config.tokens

    def is_complete(self) -> bool:
        """Whether the folder holds the SAE of all tokens with its summary; its history is then known.

        Raises:
            CheckpointError: it belongs to a run with other settings.
        """
        if self.folder is None or not (self.folder.path / SUMMARY).exists():
            return False
        if self.folder.summary()["tokens_seen"] < self.config.tokens:
            return False
        saved = RunFolder.read(self.folder.path)
        self.refuse_changes(self.folder.path, plain(saved.config.to_dict()))
        self.folder.history, self.folder.wandb_id = saved.history, saved.wandb_id
        return True

    def restore(self, step: int, metadata: dict[str, Any]) -> checkpoint.Checkpoint:
        """Go back to the checkpoint of ``step``, which is returned for the stream's part of it.

        Raises:
            CheckpointError: it is damaged, or belongs to a run with other settings.
        """
        assert self.folder is not None
        path = self.saved(step)
        saved = checkpoint.load(path)
        self.refuse_changes(path, saved.meta["config"])
        d_in, d_sae = saved.tensors["sae.W_enc"].shape
        d_out = saved.tensors["sae.W_dec"].shape[1]
        self.begin(new_sae(self.config, d_in, d_sae, metadata | saved.meta["metadata"], d_out))
        try:
            self.update.load_state_dict(saved.tensors)
            self._fired.copy_(saved.tensors["fired"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} does not fit this version: {error}"
            ) from error
        self._fired_tokens = saved.meta["fired_tokens"]
        self.step_count = self._saved_step = self._finite_step = saved.meta["steps"]
        self._seconds_before = saved.meta["seconds"]
        self.folder.history, self.folder.wandb_id = saved.meta["history"], saved.meta["wandb_id"]
        return saved

    def refuse_changes(self, path: Path, saved: dict[str, Any]) -> None:
        """Raise CheckpointError if the settings ``saved`` in ``path`` would compute something else."""
        # Of runs from before there were these.
        saved = {"hook": TrainConfig.hook, "target": None, "skip": False} | saved
        changed = [
            f"{name}: {saved.get(name)!r} in the run, {value!r} now"
            for name, value in plain(self.config.to_dict()).items()
            if name not in MAY_CHANGE_ON_RESUME and value != saved.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive the run's own settings to go on with it, or another --name to start afresh"
            )

    # --- training ---

    def train_on(self, batches: Sequence[Tensor]) -> None:
        """One step on the stream's ``[B, D]`` in raw units."""
        started = time.perf_counter()
        x, target = (batches[i] for i in self.streams)
        result = self.update(x, None if self.config.target is None else target)
        self.step_count += 1
        self._fired += result.counts
        self._fired_tokens += len(x)
        self._last = target, result
        self._update_seconds += time.perf_counter() - started

    @torch.no_grad()
    def require_finite(self) -> None:
        """Raise StreamError if the training has diverged; waits for the device."""
        tensors = [*self.update.state_dict().values(), *(self._last[1][:3] if self._last else ())]
        # The least and the greatest of a tensor are NaN if anything in it is.
        ends = [end for t in tensors if t.is_floating_point() for end in t.aminmax()]
        if torch.stack([end.isfinite() for end in ends]).all():
            self._finite_step = self.step_count
            return
        last = checkpoint.newest(self.folder.checkpoints) if self.folder else None
        kept = f"Its last checkpoint is {last}" if last else "It has no checkpoint"
        raise StreamError(
            f"{self.name} diverged between step {self._finite_step:,} and step {self.step_count:,}: its loss or its "
            f"weights are no longer finite. Try again under another --name with a lower --lr (it is "
            f"{self.config.peak_lr:g}), --lr-warmup-tokens or --clip-norm 1. {kept}"
        )

    @torch.no_grad()
    def log(self, totals: StreamTotals) -> dict[str, Any]:
        """Write the metrics of the last step, and return them; waits for the device. Raises StreamError if
        the training has diverged."""
        self.require_finite()
        assert self._last is not None
        started = time.perf_counter()
        metrics = {
            **self.update.metrics(*self._last),
            **self._progress(totals),
            "decoder_norm_error": float((self.update.sae.W_dec.norm(dim=1) - 1).abs().max()),
            "density_histogram": density_histogram(self._fired, self._fired_tokens),
            "density_tokens": self._fired_tokens,
        }
        self._fired.zero_()
        self._fired_tokens = 0
        if self.folder is not None:
            self.folder.log(metrics)
        self._update_seconds += time.perf_counter() - started
        return metrics

    def _seconds(self, totals: StreamTotals) -> dict[str, float]:
        """Seconds spent so far, by stage, over the whole run."""
        now = {"step": self._update_seconds, **totals.seconds}
        before = self._seconds_before
        return {stage: before.get(stage, 0.0) + now.get(stage, 0.0) for stage in now | before}

    def _progress(self, totals: StreamTotals) -> dict[str, float | int]:
        """Where the run stands and how fast it is going."""
        seen, seconds = self.tokens_seen, self._seconds(totals)
        elapsed = seconds.pop("elapsed", 0.0)
        return {
            "tokens_seen": seen,
            "step": self.step_count,
            "tokens_per_second": seen / max(elapsed, 1e-9),
            **{f"tokens_per_second_{stage}": seen / s for stage, s in seconds.items() if s > 0},
            **{f"seconds_{stage}": s for stage, s in seconds.items()},
            "elapsed_seconds": elapsed,
            **totals.counts,
        }

    # --- what is written ---

    def save(
        self,
        stream: dict[str, Any],
        drawn: tuple[int, int],
        totals: StreamTotals,
        group: Sequence[str],
    ) -> None:
        """Write a checkpoint, if there is none of this step, and push it if the training goes on.

        Args:
            stream: state of the stream.
            drawn: batches to pass over after restoring it, and to draw after those, not trained on yet.
            group: names of the runs that train side by side, which are all saved at this step.
        """
        if self.folder is None or self.step_count == self._saved_step:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        saved = {"tokens_seen": self.tokens_seen, "step": self.step_count, "time": now}
        self.folder.history.append(saved)
        tensors = {f"stream.{name}": tensor for name, tensor in stream["tensors"].items()}
        meta = {
            "tokens_seen": self.tokens_seen,
            "steps": self.step_count,
            "config": self.config.to_dict(),
            "metadata": self.update.sae.metadata,
            "group": list(group),
            "stream": stream["meta"],
            "stream_skip": drawn[0],
            "stream_ahead": drawn[1],
            "seconds": self._seconds(totals),
            "fired_tokens": self._fired_tokens,
            "history": self.folder.history,
            "wandb_id": self.folder.wandb_id,
        }
        sae, state = self.update.sae, self.update.state_dict() | {"fired": self._fired} | tensors
        path = checkpoint.save(self.folder.checkpoints, self.step_count, sae, state, meta)
        self._saved_step = self.step_count
        if self.tokens_seen < self.config.tokens:
            message = f"{self.name}: checkpoint at {self.tokens_seen:,} tokens"
            self.folder.publish(path, sae, message)

    def finish(self, totals: StreamTotals, held_out: HeldOutText | Sequence[Tensor] | None) -> SAE:
        """The trained SAE, scaling folded in; saved with what it came to and what it may be evaluated on."""
        sae = self.update.sae.eval().fold_scaling()
        own: HeldOutText | Tensor | tuple[Tensor, Tensor] | None = None
        if isinstance(held_out, HeldOutText):
            own = held_out
        elif held_out is not None:
            x, target = (held_out[i] for i in self.streams)
            own = x if self.config.target is None else (x, target)
        if self.folder is not None:
            summary: dict[str, Any] = {
                **self.folder.last_scores(),
                "d_in": sae.d_in,
                "d_out": sae.d_out,
                "d_sae": sae.d_sae,
                "k": self.config.k,
                "lr": self.config.peak_lr,
                **self._progress(totals),
                "peak_memory_bytes": peak_memory_bytes(sae.W_dec.device),
                "mean_to_spread": sae.metadata.get("mean_to_spread"),
            }
            self.folder.finish(sae, summary, own)
        alive = float(self.update.alive.double().mean())
        warn_of_idle_latents(self.config, alive, self.update.alive_window)
        return sae
