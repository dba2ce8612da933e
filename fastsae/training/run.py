"""One run: one SAE in training, its counters and its metrics. The trainer drives one or several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import BEFORE, MAY_CHANGE_ON_RESUME, TrainConfig
from ..device import peak_memory_bytes, resolve_precision
from ..errors import CheckpointError, StreamError
from ..files import plain
from ..lm.held_out import HeldOutText
from ..reporting.run_folder import SUMMARY, RunFolder
from ..reporting.tracking import warn_of_idle_latents
from ..sae.io import load
from ..sae.module import SAE
from ..team import ALONE, Team
from . import checkpoint
from .initialize import new_sae
from .sharded import ShardedUpdate, latents_of
from .update import UPDATES, Update, UpdateResult

T = TypeVar("T")


@dataclass(frozen=True)
class StreamTotals:
    """What runs that train side by side have in common, since this process began."""

    seconds: dict[str, float]
    """Time spent in each stage of the stream, and ``elapsed`` in everything."""
    counts: dict[str, int]
    """Activations kept and dropped, by reason."""


class Run:
    """One SAE, from its first batch to its last.

    All processes of a team have all runs, and call what is not a property together. The SAE of a run is
    whole in the process ``host``, or in shards in all of them; the first process writes.

    Args:
        config: the settings of this SAE.
        streams: which of the stream's tensors it trains on: what it reads, and what it reconstructs.
        host: the process that has the SAE, where it is not in shards.

    Attributes: ``config``, ``streams``; ``folder``: where it is kept, or None if nothing is written;
    ``update``: there after :meth:`begin` or :meth:`restore`, None if another process has the SAE;
    ``tokens_seen``; ``step_count``.
    """

    update: Update | None

    def __init__(
        self, config: TrainConfig, streams: tuple[int, int], team: Team = ALONE, host: int = 0
    ) -> None:
        self.config = config
        self.streams = streams
        self.folder = RunFolder.of(config)
        self.tokens_seen = self.step_count = 0
        self._team, self._host = team, host
        self._shards = config.latent_shards or 1
        self._saved_step: int | None = None
        self._finite_step = 0  # the last one that was looked at
        self._seconds_before: dict[str, float] = {}  # by stage, of the processes before this one
        self._update_seconds = 0.0
        self._last: tuple[Tensor, UpdateResult] | None = None
        self._fired_tokens = 0

    @property
    def is_here(self) -> bool:
        """Whether this process trains the SAE, or shards of it."""
        return self._shards > 1 or self._team.rank == self._host

    @property
    def name(self) -> str:
        return self.config.run_name

    # --- where it begins ---

    def begin(self, sae: SAE | None, d_sae: int | None = None) -> None:
        """Train ``sae`` from here on: whole, this process's part of one of ``d_sae`` latents, or None where
        another process has it."""
        self.update = None
        if sae is None:
            return
        if self._shards > 1:
            assert d_sae is not None
            self.update = ShardedUpdate(sae, self.config, self._team, d_sae)
        else:
            self.update = UPDATES[self.config.step](sae, self.config)
        # Since the last line of metrics, for the density of each latent.
        self._fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)

    def part_of(self, d_sae: int) -> range | None:
        """The latents of ``d_sae`` that this process has; None for all."""
        if self._shards == 1:
            return None
        return latents_of(self._team.hosted(self._shards), self._shards, d_sae)

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
        saved = checkpoint.load(path, self._parts_here())
        self.refuse_changes(path, saved.meta["config"])
        metadata = metadata | saved.meta["metadata"]
        try:
            if not self.is_here:
                self.begin(None)
            elif self._shards > 1:
                self._restore_shards(saved, metadata)
            else:
                self._restore_whole(saved.tensors, metadata)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} does not fit this version: {error}"
            ) from error
        self._fired_tokens, self.tokens_seen = saved.meta["fired_tokens"], saved.meta["tokens_seen"]
        self.step_count = self._saved_step = self._finite_step = saved.meta["steps"]
        self._seconds_before = saved.meta["seconds"]
        self.folder.history, self.folder.wandb_id = saved.meta["history"], saved.meta["wandb_id"]
        return saved

    def _parts_here(self) -> list[str]:
        """The parts of a checkpoint that this process reads."""
        if not self.is_here:
            return ["stream"]
        shards = self._team.hosted(self._shards) if self._shards > 1 else range(0)
        whole = ["sae_weights"] if self._shards == 1 else []
        return ["stream", "state", *whole, *map(checkpoint.shard_name, shards)]

    def _restore_whole(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        d_in, d_sae = tensors["sae.W_enc"].shape
        d_out = tensors["sae.W_dec"].shape[1]
        self.begin(new_sae(self.config, d_in, d_sae, metadata, d_out))
        assert self.update is not None
        self.update.load_state_dict(tensors)
        self._fired.copy_(tensors["fired"])

    def _restore_shards(self, saved: checkpoint.Checkpoint, metadata: dict[str, Any]) -> None:
        d_sae = saved.meta["d_sae"]
        sae = new_sae(self.config, saved.meta["d_in"], d_sae, metadata, part=self.part_of(d_sae))
        self.begin(sae, d_sae)
        assert isinstance(self.update, ShardedUpdate)
        self.update.load_shared_state(saved.parts["state"])
        for shard, fired in self._fired_by_shard():
            tensors = saved.parts[checkpoint.shard_name(shard)]
            self.update.load_shard_state(shard, tensors)
            fired.copy_(tensors["fired"])

    def _fired_by_shard(self) -> Iterator[tuple[int, Tensor]]:
        assert isinstance(self.update, ShardedUpdate)
        first = 0
        for shard, latents in self.update.shards.items():
            yield shard, self._fired[first : first + len(latents)]
            first += len(latents)

    def refuse_changes(self, path: Path, saved: dict[str, Any]) -> None:
        """Raise CheckpointError if the settings ``saved`` in ``path`` would compute something else."""
        saved = BEFORE | saved
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
        self.step_count += 1
        self.tokens_seen += len(x)
        self._fired_tokens += len(x)
        if self.update is not None:
            result = self.update(x, None if self.config.target is None else target)
            self._fired += result.counts
            self._last = target, result
        self._update_seconds += time.perf_counter() - started

    @torch.no_grad()
    def require_finite(self) -> None:
        """Raise StreamError if the training has diverged; waits for the device."""
        if self.update is None:
            return
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
            f"{self.update.peak_lr:g}), --lr-warmup-tokens or --clip-norm 1. {kept}"
        )

    @torch.no_grad()
    def log(self, totals: StreamTotals) -> dict[str, Any]:
        """Write the metrics of the last step, and return them; waits for the device. Raises StreamError if
        the training has diverged."""
        self.require_finite()
        started = time.perf_counter()
        found: list[Any] = []
        if self.update is not None:
            assert self._last is not None
            histogram = self.update.density_histogram(self._fired, self._fired_tokens)
            found = [self.update.metrics(*self._last), self.update.decoder_norm_error(), histogram]
            self._fired.zero_()
        scores, norm_error, histogram = self._from_host(found)
        metrics = {
            **scores,
            **self._progress(totals),
            "decoder_norm_error": norm_error,
            "density_histogram": histogram,
            "density_tokens": self._fired_tokens,
        }
        self._fired_tokens = 0
        if self.folder is not None and self._team.is_first:
            self.folder.log(metrics)
        self._update_seconds += time.perf_counter() - started
        return metrics

    def _from_host(self, value: T) -> T:
        """``value`` of a process that has the SAE; shards know the same."""
        return value if self._shards > 1 else self._team.tell(value, self._host)

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
        sae, own = None, {}
        if self.update is not None:
            sae = self.update.sae
            own = {"metadata": sae.metadata, "d_in": sae.d_in, "d_sae": self.update.d_sae}
        own = self._from_host(own)
        meta = {
            "tokens_seen": self.tokens_seen,
            "steps": self.step_count,
            "config": self.config.to_dict(),
            **own,
            "group": list(group),
            "stream": stream["meta"],
            "stream_skip": drawn[0],
            "stream_ahead": drawn[1],
            "seconds": self._seconds(totals),
            "fired_tokens": self._fired_tokens,
            "history": self.folder.history,
            "wandb_id": self.folder.wandb_id,
        }
        parts = self._state_here()
        if self._team.is_first:
            parts["stream"] = {f"stream.{name}": t for name, t in stream["tensors"].items()}
        path = checkpoint.save(
            self.folder.checkpoints, self.step_count, sae, parts, meta, self._team, self._shards
        )
        self._saved_step = self.step_count
        if self.tokens_seen < self.config.tokens and self.folder.publishes:
            message = f"{self.name}: checkpoint at {self.tokens_seen:,} tokens"
            self.folder.publish(path, self._whole_sae(), message)

    def _state_here(self) -> dict[str, dict[str, Tensor]]:
        """What this process has of the state, by the parts of a checkpoint."""
        if not isinstance(self.update, ShardedUpdate):
            if self.update is None:
                return {}
            return {"state": self.update.state_dict() | {"fired": self._fired}}
        parts = {
            checkpoint.shard_name(shard): self.update.shard_state(shard) | {"fired": fired}
            for shard, fired in self._fired_by_shard()
        }
        return parts | ({"state": self.update.shared_state()} if self._team.is_first else {})

    def _whole_sae(self) -> SAE:
        """The SAE so far, all of it; from the last checkpoint where this process has not."""
        if self.update is not None and self._shards == 1:
            return self.update.sae
        assert self._saved_step is not None
        sae = load(self.saved(self._saved_step), self.config.device)
        sae.precision = resolve_precision(self.config.precision, sae.device)
        return sae

    def finish(
        self, totals: StreamTotals, held_out: HeldOutText | Sequence[Tensor] | None
    ) -> SAE | None:
        """The trained SAE, scaling folded in; saved with what it came to and what it may be evaluated on. None
        on all processes but the first."""
        found: list[Any] = []
        if self.update is not None:
            found = [self.update.alive_fraction(), self.update.alive_window]
        alive, window = self._from_host(found)
        if not self._team.is_first:
            return None
        sae = self._whole_sae().eval().fold_scaling()
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
                "lr": self.config.peak_lr(sae.d_sae, sae.d_out),
                **self._progress(totals),
                "peak_memory_bytes": peak_memory_bytes(sae.W_dec.device),
                "mean_to_spread": sae.metadata.get("mean_to_spread"),
            }
            self.folder.finish(sae, summary, own)
        warn_of_idle_latents(self.config, alive, window)
        return sae
