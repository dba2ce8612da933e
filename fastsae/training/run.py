"""One run: one SAE in training, its folder, and what it tells. The trainer drives one or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import reference

from ..config import MAY_CHANGE_ON_RESUME, TrainConfig
from ..device import resolve_device
from ..errors import CheckpointError, StreamError
from ..lm.held_out import HeldOutText
from ..metrics import density_histogram
from ..reporting import report
from ..reporting.model_card import model_card
from ..reporting.publish import Publisher
from ..reporting.tracking import Tracker, read_metrics
from ..sae.io import save
from ..sae.module import SAE
from . import checkpoint
from .initialize import continue_from
from .update import STEPS, StepResult, TrainStep


@dataclass(frozen=True)
class Shared:
    """What runs that train side by side have in common, since this process began."""

    seconds: dict[str, float]
    """Time spent in each stage of the stream, and ``elapsed`` in everything."""
    counts: dict[str, int]
    """Activations kept and dropped, by reason."""


class Run:
    """One SAE, from its first batch to its report.

    Args:
        config: the settings of this SAE alone, see ``TrainConfig.runs``.

    Attributes: ``config``; ``layer_index``: which of the stream's tensors it trains on; ``directory``:
    its folder, or None if nothing is written; ``step``: there after :meth:`start` or :meth:`restore`.
    """

    step: TrainStep

    def __init__(self, config: TrainConfig, layer_index: int) -> None:
        self.config = config
        self.layer_index = layer_index
        self.directory = None if config.out is None else Path(config.out) / config.run_name
        self.steps = 0
        self._saved_step: int | None = None
        self._history: list[dict[str, Any]] = []  # of every checkpoint written
        self._seconds_before: dict[str, float] = {}  # by stage, of the processes before this one
        self._step_seconds = 0.0
        self._last: tuple[Tensor, StepResult] | None = None
        self._wandb_id: str | None = None
        self._tracker: Tracker | None = None
        self._publisher: Publisher | None = None

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def started(self) -> bool:
        return hasattr(self, "step")

    @property
    def tokens_seen(self) -> int:
        return self.step.tokens_seen

    # --- where it begins ---

    def start(self, rows: Tensor, metadata: dict[str, Any], origin: SAE | None = None) -> None:
        """Begin a new SAE on its first activations ``rows [N, D]``, or with the latents of ``origin``."""
        d_in = rows.shape[1]
        d_sae = self.config.resolve_d_sae(d_in) if origin is None else origin.d_sae
        sae = new_sae(self.config, d_in, d_sae, metadata)
        estimate_scaling(sae, rows)
        if origin is not None:
            assert self.config.init_from is not None
            continue_from(origin, sae, self.config.init_from)
        self._begin(sae)

    def restore(self, path: Path, metadata: dict[str, Any]) -> checkpoint.Checkpoint:
        """Go back to the checkpoint ``path``, which is returned for the stream's part of it.

        Raises:
            CheckpointError: it is damaged, or belongs to a run with other settings.
        """
        saved = checkpoint.load(path)
        self.refuse_changes(path, saved.meta["config"])
        d_sae, d_in = saved.tensors["sae.W_dec"].shape
        self._begin(new_sae(self.config, d_in, d_sae, metadata | saved.meta["metadata"]))
        try:
            self.step.load_state_dict(saved.tensors)
            self._fired.copy_(saved.tensors["fired"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} does not fit this version: {error}"
            ) from error
        self._fired_tokens = saved.meta["fired_tokens"]
        self.steps = self._saved_step = saved.meta["steps"]
        self._history = saved.meta["history"]
        self._seconds_before, self._wandb_id = saved.meta["seconds"], saved.meta["wandb_id"]
        return saved

    def _begin(self, sae: SAE) -> None:
        self.step = STEPS[self.config.step](sae, self.config)
        # Since the last line of metrics, for the density of each latent.
        self._fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self._fired_tokens = 0

    def refuse_changes(self, path: Path, saved: dict[str, Any]) -> None:
        """Raise CheckpointError if the settings ``saved`` in ``path`` would compute something else."""
        changed = [
            f"{name}: {saved.get(name)!r} in the run, {value!r} now"
            for name, value in self.config.to_dict().items()
            if name not in MAY_CHANGE_ON_RESUME and _plain(value) != saved.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive the run's own settings to go on with it, or another --name to start afresh"
            )

    # --- training ---

    def open(self, stack: ExitStack) -> None:
        """Open what the run is told to, until ``stack`` ends."""
        if self.directory is None:
            return
        self._tracker = stack.enter_context(
            Tracker(self.directory, self.config, self.tokens_seen, self._wandb_id)
        )
        self._wandb_id = self._tracker.wandb_id
        if self.config.hub_repository is not None:
            self._publisher = stack.enter_context(
                Publisher(self.directory, self.config.hub_repository, self.config.hub_private)
            )

    def train_on(self, x: Tensor) -> None:
        """One step on ``x [B, D]`` in raw units."""
        started = time.perf_counter()
        result = self.step(x)
        self.steps += 1
        self._fired += result.counts
        self._fired_tokens += len(x)
        self._last = x, result
        self._step_seconds += time.perf_counter() - started

    @torch.no_grad()
    def log(self, shared: Shared) -> dict[str, Any]:
        """Write the metrics of the last step, and return them; waits for the device."""
        assert self._last is not None
        started = time.perf_counter()
        metrics = {
            **self.step.metrics(*self._last),
            **self._progress(shared),
            "decoder_norm_error": float((self.step.sae.W_dec.norm(dim=1) - 1).abs().max()),
            "density_histogram": density_histogram(self._fired, self._fired_tokens),
            "density_tokens": self._fired_tokens,
        }
        self._fired.zero_()
        self._fired_tokens = 0
        if self._tracker is not None:
            self._tracker.log(metrics)
        self._step_seconds += time.perf_counter() - started
        return metrics

    def _seconds(self, shared: Shared) -> dict[str, float]:
        """Seconds spent so far, by stage, over the whole run."""
        now = {"step": self._step_seconds, **shared.seconds}
        before = self._seconds_before
        return {stage: before.get(stage, 0.0) + now.get(stage, 0.0) for stage in now | before}

    def _progress(self, shared: Shared) -> dict[str, float | int]:
        """Where the run stands and how fast it is going."""
        seen, seconds = self.tokens_seen, self._seconds(shared)
        elapsed = seconds.pop("elapsed", 0.0)
        return {
            "tokens_seen": seen,
            "step": self.steps,
            "tokens_per_second": seen / max(elapsed, 1e-9),
            **{f"tokens_per_second_{stage}": seen / s for stage, s in seconds.items() if s > 0},
            **{f"seconds_{stage}": s for stage, s in seconds.items()},
            "elapsed_seconds": elapsed,
            **shared.counts,
        }

    # --- what is written ---

    def save(self, stream: dict[str, Any], skip: int, shared: Shared, group: Sequence[str]) -> None:
        """Write a checkpoint, if there is none of this step.

        Args:
            stream: state of the stream; after restoring it, ``skip`` batches are passed over.
            group: names of the runs that train side by side, which are all saved at this step.
        """
        if self.directory is None or self.steps == self._saved_step:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._history.append({"tokens_seen": self.tokens_seen, "step": self.steps, "time": now})
        tensors = {f"stream.{name}": tensor for name, tensor in stream["tensors"].items()}
        meta = {
            "tokens_seen": self.tokens_seen,
            "steps": self.steps,
            "config": self.config.to_dict(),
            "metadata": self.step.sae.metadata,
            "group": list(group),
            "stream": stream["meta"],
            "stream_skip": skip,
            "seconds": self._seconds(shared),
            "fired_tokens": self._fired_tokens,
            "history": self._history,
            "wandb_id": self._wandb_id,
        }
        state = self.step.state_dict() | {"fired": self._fired} | tensors
        path = checkpoint.save(self.checkpoints, self.steps, self.step.sae, state, meta)
        self._saved_step = self.steps
        if self._publisher is not None:
            message = f"{self.name}: checkpoint at {self.tokens_seen:,} tokens"
            self._publisher.publish(path, self._card(), message)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        assert self.directory is not None
        return self.directory / "checkpoints"

    def saved_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return [] if self.directory is None else checkpoint.steps(self.checkpoints)

    def finish(
        self, shared: Shared, held_out: Tensor | None, text: HeldOutText | None = None
    ) -> SAE:
        """The trained SAE, scaling folded in; saved, evaluated on ``held_out [N, D]`` and on its ``text``,
        and published."""
        sae = self.step.sae.eval().fold_scaling()
        if self.directory is None:
            return sae
        save(sae, self.directory)
        progress = {"lr": float(self.step.lr), **self._progress(shared)}
        summary = report.write_report(self.directory, sae, self.config, progress, held_out, text)
        assert self._tracker is not None
        self._tracker.summarize(summary)
        if self._publisher is not None:
            self._publisher.publish(self.directory, self._card(summary), f"Add {self.name}")
        return sae

    def _card(self, summary: dict[str, Any] | None = None) -> str:
        assert self.directory is not None
        return model_card(
            self.config, self.step.sae, self._history, read_metrics(self.directory), summary
        )


def new_sae(config: TrainConfig, d_in: int, d_sae: int, metadata: dict[str, Any]) -> SAE:
    """The SAE of a run before it has seen any activation."""
    device = resolve_device(config.device)
    sae = SAE(
        d_in,
        d_sae,
        config.mean_active,
        normalize=config.normalize,
        metadata=metadata,
        device=device,
        generator=torch.Generator().manual_seed(config.initial_seed),
    )
    sae.precision = resolve_precision(config.precision, device)
    return sae


@torch.no_grad()
def estimate_scaling(sae: SAE, rows: Tensor) -> None:
    """Set the scaling constant and ``b_dec`` (the geometric median) of a new SAE from ``rows [N, D]``."""
    rows = rows.to(sae.W_dec.device, sae.W_dec.dtype)
    if not rows.isfinite().all():
        raise StreamError(
            "the first activations contain values that are not finite; drop those rows from the batches"
        )
    if sae.normalize == "scalar":
        constant = reference.scale_constant(rows)
        if not constant.isfinite():
            raise StreamError("the first activations are all zero: there is nothing to scale by")
        sae.scale.copy_(constant)
    sae.b_dec.copy_(reference.geometric_median(sae.scale_input(rows)[0]))


def resolve_precision(precision: str, device: torch.device) -> Any:
    """``auto`` is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def _plain(value: Any) -> Any:
    """``value`` as it reads after a round trip through JSON."""
    return list(value) if isinstance(value, tuple) else value
