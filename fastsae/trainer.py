"""The training loop: batches from a stream, one step each, logged, checkpointed, resumable."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsae_kernels import reference

from . import checkpoint, hub, report
from .config import MAY_CHANGE_ON_RESUME, TrainConfig
from .device import resolve_device
from .errors import CheckpointError, ConfigError, StreamError
from .sae import SAE
from .step import STEPS
from .tracking import Tracker

log = logging.getLogger(__name__)

INITIALIZATION_BATCHES = 8
"""Batches that the scaling constant and ``b_dec`` are estimated from; they are trained on too."""


class Stream(Protocol):
    """Where activations come from.

    A stream may also have ``metadata`` (provenance that travels with the SAE, for each layer),
    ``seconds`` (time spent so far, by stage), ``counts`` (rows dropped so far, by reason) and
    ``held_out()`` (activations kept apart for the final evaluation, for each layer); the trainer uses
    what is there.
    """

    def next_batch(self) -> tuple[Tensor, ...] | None:
        """``[B, D]`` activations in raw units for each layer, or None when there are no more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors": ..., "meta": ...}``: all that the batches after this point depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """A signal ended the run; everything was saved. The text says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


def train(batches: Iterable[Tensor], config: TrainConfig) -> SAE:
    """Train an SAE on any iterable of activations.

    One pass, one batch a step, in this thread, and never a batch more than is trained on. Nothing is
    written unless ``config.out`` is set; then the run is saved there, and a run that was stopped goes
    on (batches already trained on are drawn and passed over). An iterable that ends early ends the
    training normally. The settings of the language model and the text are not looked at.

    Args:
        batches: ``[B, D]`` tensors of any float dtype, on any device.
        config: ``d_sae`` (or ``expansion``), ``k``, ``lr``, ``tokens``, ... ; ``batch_size`` is only
            used to describe the run, each batch is taken as it comes.

    Returns:
        The SAE in eval mode, input scaling folded into its weights.

    Raises:
        ConfigError: an impossible setting, or CUDA asked for and absent.
        StreamError: the iterable is empty, or a batch is not ``[B, D]`` with the same finite D.
        CheckpointError: ``out`` holds a run with other settings.
    """
    return Trainer(config, _Batches(batches)).fit()


class Trainer:
    """Trains one SAE as ``config`` says.

    Args:
        config: the run. With ``out=None`` nothing is written, unless the stream is the language
            model's, whose runs go to ``runs/``.
        stream: where activations come from; by default the language model and text of ``config``.

    Raises:
        FastsaeError: anything the user can mend, before anything is written.
    """

    def __init__(self, config: TrainConfig, stream: Stream | None = None) -> None:
        if len(config.layers) > 1:
            raise ConfigError(
                f"layer = {config.layers}: this version trains one SAE at a time; give one layer"
            )
        self.config = config
        self.device = resolve_device(config.device)
        self.directory: Path | None = None
        if stream is None and config.out is None:
            config = self.config = replace(config, out="runs")
        if config.out is not None:
            self.directory = Path(config.out) / config.run_name
            checkpoint.require_writable(self.directory)
            self._refuse_existing()
        if stream is None:
            from .stream import open_stream

            stream = open_stream(config)
        self.stream = stream
        self._metadata: dict[str, Any] = getattr(stream, "metadata", ({},))[0]
        # A single batch where batches are the user's: nothing is drawn ahead of training.
        self._lookahead = 1 if isinstance(stream, _Batches) else INITIALIZATION_BATCHES
        self._seconds: dict[str, float] = {}  # by stage, of the run before it was resumed
        self._step_seconds = 0.0
        self._saved_step: int | None = None
        self._wandb_id: str | None = None

    # --- the run ---

    def fit(self) -> SAE:
        """Train to the end, or resume and train to the end; returns the finished SAE.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived and the run was saved.
            FastsaeError: the text ended early, the disk is full, ...
        """
        self._set_precision()
        with ExitStack() as stack:
            # A run that exists is held before anything is done with it; a new one gets its folder when
            # the first activations have shown that there is something to train on.
            existed = self.directory is not None and self.directory.exists()
            if self.directory is not None and existed:
                stack.enter_context(checkpoint.locked(self.directory))
            if not self._restore():
                self._start()
            if self.directory is not None and not existed:
                stack.enter_context(checkpoint.locked(self.directory))
            tracker = stack.enter_context(
                Tracker(self.directory, self.config, self.step.tokens_seen, self._wandb_id)
            )
            self._wandb_id = tracker.wandb_id
            stopped_by = stack.enter_context(_signals(enabled=self.directory is not None))

            while self.step.tokens_seen < self.config.tokens:
                batch = self._next_batch()
                if batch is None:
                    self._text_ended()
                    break
                started = time.perf_counter()
                result = self.step(batch)
                self.steps += 1
                if self._crossed(self.config.log_every_tokens, len(batch)):
                    tracker.log(self.step.metrics(batch, result) | self._progress())
                self._step_seconds += time.perf_counter() - started
                tracker.advance(self.step.tokens_seen)
                if stopped_by:
                    self._save_checkpoint()
                    raise Interrupted(self._how_to_resume(), stopped_by[0])
                if self._crossed(self.config.checkpoint_every_tokens, len(batch)):
                    self._save_checkpoint()
            if self.directory is not None:
                self._save_checkpoint()
            return self._finish(tracker)

    def _start(self) -> None:
        """Draw the first batches, initialise an SAE on them, and keep them to train on."""
        self._stream_start = self.stream.state_dict()
        self._pending: list[Tensor] = []
        for _ in range(self._lookahead):
            batch = self._draw()
            if batch is None:
                break
            self._pending.append(batch)
        if not self._pending:
            raise StreamError("there is nothing to train on: the stream gave no batch at all")
        self._drawn_ahead = len(self._pending)
        sae = initial_sae(self.config, torch.cat(self._pending), self._metadata)
        self.step = STEPS[self.config.step](sae, self.config)
        self.steps = 0

    def _next_batch(self) -> Tensor | None:
        batch = self._pending.pop(0) if self._pending else self._draw()
        return None if batch is None else batch.to(self.device, non_blocking=True)

    def _draw(self) -> Tensor | None:
        layers = self.stream.next_batch()
        if layers is None:
            return None
        (batch,) = layers
        if batch.ndim != 2 or not batch.is_floating_point() or not len(batch):
            raise StreamError(
                f"a batch must be a float tensor [B, D] with at least one row, got {batch.dtype} "
                f"{tuple(batch.shape)}"
            )
        step = getattr(self, "step", None)
        if step is not None and batch.shape[1] != step.sae.d_in:
            raise StreamError(
                f"a batch has width {batch.shape[1]}, those before had {step.sae.d_in}"
            )
        return batch

    def _crossed(self, interval: int, batch: int) -> bool:
        seen = self.step.tokens_seen
        return seen // interval > (seen - batch) // interval

    def _set_precision(self) -> None:
        # bf16 operands are exact in TF32, so both ask the tensor cores for fp32 accumulation.
        precision = resolve_precision(self.config.precision, self.device)
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"

    def _text_ended(self) -> None:
        seen, asked = self.step.tokens_seen, self.config.tokens
        if isinstance(self.stream, _Batches):
            log.info("the batches ended after %s tokens of %s", f"{seen:,}", f"{asked:,}")
            return
        self._save_checkpoint()
        raise StreamError(
            f"the text ended after {seen:,} activations of the {asked:,} asked for. Everything is saved "
            f"in {self.directory}: give the same command with --tokens {seen} to finish the run there, or "
            f"train on more text"
        )

    # --- what is written ---

    def _timings(self) -> dict[str, float]:
        """Seconds spent so far, by stage, over the whole run."""
        now = {"step": self._step_seconds, **getattr(self.stream, "seconds", {})}
        return {stage: self._seconds.get(stage, 0.0) + value for stage, value in now.items()}

    def _progress(self) -> dict[str, float | int]:
        """Where the run stands and how fast it is going."""
        seen, timings = self.step.tokens_seen, self._timings()
        return {
            "tokens_seen": seen,
            "step": self.steps,
            "lr": self.config.lr,
            "tokens_per_second": seen / max(sum(timings.values()), 1e-9),
            **{f"seconds_{stage}": value for stage, value in timings.items()},
            **getattr(self.stream, "counts", {}),
        }

    def _refuse_existing(self) -> None:
        assert self.directory is not None
        if self.config.resume == "never" and self.directory.exists():
            raise ConfigError(
                f"{self.directory} exists and --resume is never. Choose another --name or --out, delete "
                f"that folder, or let --resume auto go on with it"
            )

    def _save_checkpoint(self) -> None:
        if self.directory is None or self.steps == self._saved_step:
            return
        # Until the first batches are trained on, the stream is ahead of the training.
        pending = len(self._pending)
        stream = self._stream_start if pending else self.stream.state_dict()
        tensors = {f"stream.{name}": tensor for name, tensor in stream["tensors"].items()}
        meta = {
            "tokens_seen": self.step.tokens_seen,
            "steps": self.steps,
            "config": self.config.to_dict(),
            "stream": stream["meta"],
            "stream_skip": self._drawn_ahead - pending if pending else 0,
            "seconds": self._timings(),
            "wandb_id": self._wandb_id,
        }
        checkpoint.save(
            self.directory / "checkpoints",
            self.steps,
            self.step.sae,
            self.step.state_dict() | tensors,
            meta,
            self.config.keep_checkpoints,
        )
        self._saved_step = self.steps

    def _restore(self) -> bool:
        """Go on from the newest checkpoint, if there is one."""
        path = checkpoint.newest(self.directory / "checkpoints") if self.directory else None
        if path is None:
            return False
        saved = checkpoint.load(path)
        self._refuse_changes(path, saved.meta["config"])
        d_sae, d_in = saved.tensors["sae.W_dec"].shape
        sae = new_sae(self.config, d_in, d_sae, self._metadata)
        self.step = STEPS[self.config.step](sae, self.config)
        try:
            self.step.load_state_dict(saved.tensors)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {path} does not fit this version: {error}"
            ) from error
        self.steps = self._saved_step = saved.meta["steps"]
        self._seconds, self._wandb_id = saved.meta["seconds"], saved.meta["wandb_id"]
        self._pending, self._drawn_ahead = [], 0
        prefix = "stream."
        tensors = {
            n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)
        }
        self.stream.load_state_dict({"tensors": tensors, "meta": saved.meta["stream"]})
        for _ in range(saved.meta["stream_skip"]):
            self.stream.next_batch()
        log.info("resumed at %s tokens from %s", f"{self.step.tokens_seen:,}", path)
        return True

    def _refuse_changes(self, path: Path, saved: dict[str, Any]) -> None:
        now = self.config.to_dict()
        changed = [
            f"{name}: {saved.get(name)!r} in the run, {value!r} now"
            for name, value in now.items()
            if name not in MAY_CHANGE_ON_RESUME and _plain(value) != saved.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive the run's own settings to go on with it, or another --name to start afresh"
            )

    def _how_to_resume(self) -> str:
        seen = self.step.tokens_seen
        return (
            f"stopped at {seen:,} of {self.config.tokens:,} tokens; everything is saved in "
            f"{self.directory}. Give the same command again to go on"
        )

    def _finish(self, tracker: Tracker) -> SAE:
        sae = self.step.sae.eval().fold_scaling()
        if self.directory is None:
            return sae
        sae.save(self.directory)
        held_out = getattr(self.stream, "held_out", None)
        (rows,) = held_out() if held_out else (None,)
        text = getattr(self.stream, "held_out_text", lambda: None)()
        summary = report.write_report(
            self.directory, sae, self.config, self._progress(), rows, text
        )
        tracker.summarize(summary)
        if self.config.hub_repo is not None:
            hub.push(self.directory, self.config.hub_repo, self.config.run_name)
        return sae


class _Batches:
    """An iterable of the user's as a stream: its state is how many batches were drawn."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._iterator = iter(batches)
        self._drawn = 0

    def next_batch(self) -> tuple[Tensor] | None:
        batch = next(self._iterator, None)
        self._drawn += batch is not None
        return None if batch is None else (batch,)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"drawn": self._drawn}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self._drawn < state["meta"]["drawn"]:
            if self.next_batch() is None:
                raise StreamError(
                    f"the run to resume had drawn {state['meta']['drawn']} batches, but the iterable "
                    f"ended after {self._drawn}; give the iterable from its beginning"
                )


def initial_sae(config: TrainConfig, rows: Tensor, metadata: dict[str, Any]) -> SAE:
    """A new SAE whose scaling constant and ``b_dec`` (geometric median) come from ``rows [N, D]``."""
    d_in = rows.shape[-1]
    sae = new_sae(config, d_in, config.resolve_d_sae(d_in), metadata)
    rows = rows.to(sae.W_dec.device, sae.W_dec.dtype)
    if not rows.isfinite().all():
        raise StreamError(
            "the first activations contain values that are not finite; drop those rows from the batches"
        )
    with torch.no_grad():
        if config.normalize == "scalar":
            constant = reference.scale_constant(rows)
            if not constant.isfinite():
                raise StreamError(
                    "the first activations are all zero: there is nothing to scale by"
                )
            sae.scale.copy_(constant)
        sae.b_dec.copy_(reference.geometric_median(sae.scale_input(rows)[0]))
    return sae


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
        generator=torch.Generator().manual_seed(config.seed),
    )
    sae.precision = resolve_precision(config.precision, device)
    return sae


def resolve_precision(precision: str, device: torch.device) -> Any:
    """``auto`` is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def _plain(value: Any) -> Any:
    """``value`` as it reads after a round trip through JSON."""
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _signals(enabled: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one takes its usual course."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        log.info("signal %s: finishing this step, then saving", signal.Signals(number).name)
        for known, handler in previous.items():
            signal.signal(known, handler)

    try:
        if enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the program around us handles signals
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
