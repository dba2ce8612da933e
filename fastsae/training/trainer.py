"""The training loop: one stream of activations, one SAE or several side by side on it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import TrainConfig
from ..device import resolve_device
from ..errors import CheckpointError, ConfigError, Interrupted, StreamError
from ..files import require_writable
from ..reporting.tracking import Display
from ..sae.module import SAE
from . import checkpoint
from .initialize import load_origin
from .run import Run, Shared, resolve_precision

log = logging.getLogger(__name__)

INITIALIZATION_BATCHES = 8
"""Batches that the scaling constant and ``b_dec`` are estimated from; they are trained on too."""

Batches = tuple[Tensor, ...]
"""``[B, D]`` activations in raw units for each hooked layer; a row is the same token in all of them."""


@runtime_checkable
class Stream(Protocol):
    """Where activations come from.

    A stream may also have ``metadata`` (provenance that travels with the SAE, for each layer),
    ``seconds`` (time spent so far, by stage), ``counts`` (rows dropped so far, by reason) and
    ``held_out()`` (activations kept apart for the final evaluation, for each layer); the trainer uses
    what is there.
    """

    def next_batch(self) -> Batches | None:
        """``[B, D]`` activations in raw units for each layer, or None when there are no more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors": ..., "meta": ...}``: all that the batches after this point depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
        ConfigError: an impossible setting, several SAEs, or CUDA asked for and absent.
        StreamError: the iterable is empty, or a batch is not ``[B, D]`` with the same finite D.
        CheckpointError: ``out`` holds a run with other settings.
    """
    if len(config.runs) > 1:
        raise ConfigError(
            f"train gives one SAE and the settings ask for {len(config.runs)}; for all of them in one "
            f"pass use fastsae.Trainer(config, batches).fit(), which gives a list"
        )
    (sae,) = Trainer(config, batches).fit()
    return sae


class Trainer:
    """Trains an SAE for every layer, k and seed of ``config``, on one pass of the stream.

    Each has its own step, folder, metrics and checkpoints (a :class:`Run`), and is bit for bit the SAE
    that is trained alone on the same stream; another one costs its step.

    Args:
        config: the runs. With ``out=None`` nothing is written, unless the stream is the language
            model's, whose runs go to ``runs/``.
        stream: where activations come from: a :class:`Stream`, or an iterable of ``[B, D]`` tensors
            (with several layers, of a tuple of them). By default the language model and text of
            ``config``.

    Raises:
        FastsaeError: anything the user can mend, before anything is written.
    """

    def __init__(
        self, config: TrainConfig, stream: Stream | Iterable[Tensor | Batches] | None = None
    ) -> None:
        if stream is None and config.out is None:
            config = replace(config, out="runs")
        self.config = config
        self.device = resolve_device(config.device)
        self.runs = [Run(each, config.layers.index(each.layer)) for each in config.runs]
        for run in self.runs:
            if run.directory is not None:
                require_writable(run.directory)
                self._refuse_existing(run)
        fresh = not all(run.saved_steps() for run in self.runs)
        self._origin = load_origin(config) if config.init_from is not None and fresh else None
        if stream is None:
            from ..data.stream import open_stream

            stream = open_stream(config)
        # A single batch where batches are the user's: nothing is drawn ahead of training.
        self._lookahead = INITIALIZATION_BATCHES
        if not isinstance(stream, Stream):
            stream, self._lookahead = _Iterable(stream, len(config.layers)), 1
        self.stream: Stream = stream
        self._metadata: tuple[dict[str, Any], ...] = getattr(
            stream, "metadata", ({},) * len(config.layers)
        )
        self._pending: list[Batches] = []

    # --- the loop ---

    def fit(self) -> list[SAE]:
        """Train to the end, or resume and train to the end; the finished SAEs, as ``config.runs``.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived and everything was saved.
            FastsaeError: the text ended early, the disk is full, ...
        """
        self._set_precision()
        self._started = time.perf_counter()
        with ExitStack() as stack:
            # A run that exists is held before anything is done with it; a new one gets its folder when
            # the first activations have shown that there is something to train on.
            folders = [run.directory for run in self.runs if run.directory is not None]
            existing = [folder for folder in folders if folder.exists()]
            for folder in existing:
                stack.enter_context(checkpoint.locked(folder))
            training = self._begin()
            for folder in folders:
                if folder not in existing:
                    stack.enter_context(checkpoint.locked(folder))
            for run in self.runs:
                run.open(stack)
            display = stack.enter_context(self._display())
            stopped_by = stack.enter_context(_signals(enabled=bool(folders)))

            while self.tokens_seen < self.config.tokens:
                batches = self._next_batches()
                if batches is None:
                    self._text_ended(training)
                    break
                for run in training:
                    run.train_on(batches[run.layer_index])
                if self._crossed(self.config.log_every_tokens, len(batches[0])):
                    shared = self._shared()
                    display.show({run.name: run.log(shared) for run in training})
                display.advance(self.tokens_seen)
                if stopped_by:
                    self._save(training)
                    raise Interrupted(self._how_to_resume(), stopped_by[0])
                if self._crossed(self.config.checkpoint_every_tokens, len(batches[0])):
                    self._save(training)
            self._save(training)
            return self._finish(training)

    @property
    def tokens_seen(self) -> int:
        """Activations trained on by the runs that are not finished; all runs, if all are."""
        return min(run.tokens_seen for run in self.runs)

    def _next_batches(self) -> Batches | None:
        batches = self._pending.pop(0) if self._pending else self._draw()
        if batches is None:
            return None
        return tuple(batch.to(self.device, non_blocking=True) for batch in batches)

    def _draw(self) -> Batches | None:
        batches = self.stream.next_batch()
        if batches is None:
            return None
        for batch in batches:
            if batch.ndim != 2 or not batch.is_floating_point() or not len(batch):
                raise StreamError(
                    f"a batch must be a float tensor [B, D] with at least one row, got {batch.dtype} "
                    f"{tuple(batch.shape)}"
                )
        for run in self.runs:
            width = batches[run.layer_index].shape[1]
            if run.started and width != run.step.sae.d_in:
                raise StreamError(
                    f"a batch has width {width}, those before had {run.step.sae.d_in}"
                )
        return batches

    def _crossed(self, interval: int, batch: int) -> bool:
        seen = self.tokens_seen
        return seen // interval > (seen - batch) // interval

    def _set_precision(self) -> None:
        # bf16 operands are exact in TF32, so both ask the tensor cores for fp32 accumulation.
        precision = resolve_precision(self.config.precision, self.device)
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"

    def _shared(self) -> Shared:
        seconds = {"elapsed": time.perf_counter() - self._started}
        return Shared(
            seconds | getattr(self.stream, "seconds", {}), getattr(self.stream, "counts", {})
        )

    def _display(self) -> Display:
        # A progress bar is for runs; without a folder the program around us has the terminal.
        total = self.config.steps * self.config.batch_size
        return Display(self.config.tokens, total, self.tokens_seen, bar=self.config.out is not None)

    # --- where it begins ---

    def _begin(self) -> list[Run]:
        """Restore or start every run; returns those that have not seen all their tokens."""
        training = [run for run in self.runs if not self._is_finished(run)]
        step = self._common_step(training)
        restored = {
            run: self._restore(run, step if run in training else run.saved_steps()[-1])
            for run in self.runs
            if run not in training or step is not None
        }
        for run in training:
            if run.directory is not None:
                checkpoint.discard_after(run.checkpoints, step or 0)
        if training and step is None:
            self._start(training)
        else:
            self._restore_stream(restored[(training or self.runs)[0]])
            log.info("resumed at %s tokens", f"{self.tokens_seen:,}")
        return training

    def _is_finished(self, run: Run) -> bool:
        steps = run.saved_steps()
        if not steps:
            return False
        meta = checkpoint.load_meta(run.checkpoints / f"step_{steps[-1]}")
        return meta["tokens_seen"] >= self.config.tokens

    def _common_step(self, training: list[Run]) -> int | None:
        """The newest step that all of ``training`` have a checkpoint of.

        Later checkpoints of some were written by a process that was killed before it wrote the
        others; they will come again. Anything else is work that must not be lost.
        """
        if not training:
            return None
        common = set.intersection(*(set(run.saved_steps()) for run in training))
        step = max(common, default=None)
        names = {run.name for run in training}
        for run in training:
            for later in [found for found in run.saved_steps() if found > (step or 0)]:
                path = run.checkpoints / f"step_{later}"
                meta = checkpoint.load_meta(path)
                run.refuse_changes(path, meta["config"])
                if names <= set(meta["group"]):
                    continue
                where = "at the beginning" if step is None else f"at step {step}"
                raise CheckpointError(
                    f"{run.directory} has been trained to step {later} without the others, which stand "
                    f"{where}. Finish it by itself first: the same command with its own --layer, --k and "
                    f"--seed, and --stream-seed {self.config.resolved_stream_seed}. A finished run may be "
                    f"among the others. Or choose another --name"
                )
        return step

    def _restore(self, run: Run, step: int | None) -> checkpoint.Checkpoint:
        return run.restore(run.checkpoints / f"step_{step}", self._metadata[run.layer_index])

    def _restore_stream(self, saved: checkpoint.Checkpoint) -> None:
        prefix = "stream."
        tensors = {
            n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)
        }
        self.stream.load_state_dict({"tensors": tensors, "meta": saved.meta["stream"]})
        for _ in range(saved.meta["stream_skip"]):
            self.stream.next_batch()

    def _start(self, training: list[Run]) -> None:
        """Draw the first batches, initialise the SAEs on them, and keep them to train on."""
        self._stream_start = self.stream.state_dict()
        for _ in range(self._lookahead):
            batches = self._draw()
            if batches is None:
                break
            self._pending.append(batches)
        if not self._pending:
            raise StreamError("there is nothing to train on: the stream gave no batch at all")
        self._drawn_ahead = len(self._pending)
        rows = [torch.cat(layer) for layer in zip(*self._pending, strict=True)]
        for run in training:
            index = run.layer_index
            run.start(rows[index], self._metadata[index], self._origin)

    def _refuse_existing(self, run: Run) -> None:
        assert run.directory is not None
        if self.config.resume == "never" and run.directory.exists():
            raise ConfigError(
                f"{run.directory} exists and --resume is never. Choose another --name or --out, delete "
                f"that folder, or let --resume auto go on with it"
            )

    # --- where it ends ---

    def _save(self, training: list[Run]) -> None:
        # Until the first batches are trained on, the stream is ahead of the training.
        ahead = len(self._pending)
        stream = self._stream_start if ahead else self.stream.state_dict()
        skip = self._drawn_ahead - ahead if ahead else 0
        shared, group = self._shared(), [run.name for run in training]
        for run in training:
            run.save(stream, skip, shared, group)
        for run in self.runs:  # of a finished one too: it may have been killed before this
            if run.directory is not None:
                checkpoint.prune(run.checkpoints, self.config.keep_checkpoints)

    def _text_ended(self, training: list[Run]) -> None:
        seen, asked = self.tokens_seen, self.config.tokens
        if isinstance(self.stream, _Iterable):
            log.info("the batches ended after %s tokens of %s", f"{seen:,}", f"{asked:,}")
            return
        self._save(training)
        raise StreamError(
            f"the text ended after {seen:,} activations of the {asked:,} asked for. Everything is saved "
            f"in {self._folders()}: give the same command with --tokens {seen} to finish there, or "
            f"train on more text"
        )

    def _finish(self, training: list[Run]) -> list[SAE]:
        held_out = getattr(self.stream, "held_out", None)
        rows = held_out() if held_out else (None,) * len(self.config.layers)
        text = getattr(self.stream, "held_out_text", lambda: None)()
        now = self._shared()
        idle = replace(
            now, seconds={}
        )  # a run that was finished before took no time of this process
        return [
            run.finish(now if run in training else idle, rows[run.layer_index], text)
            for run in self.runs
        ]

    def _how_to_resume(self) -> str:
        return (
            f"stopped at {self.tokens_seen:,} of {self.config.tokens:,} tokens; everything is saved in "
            f"{self._folders()}. Give the same command again to go on"
        )

    def _folders(self) -> str:
        return ", ".join(str(run.directory) for run in self.runs)


class _Iterable:
    """An iterable of the user's as a stream: its state is how many batches were drawn."""

    def __init__(self, batches: Iterable[Tensor | Batches], layers: int) -> None:
        self._iterator = iter(batches)
        self._layers = layers
        self._drawn = 0

    def next_batch(self) -> Batches | None:
        drawn = next(self._iterator, None)
        if drawn is None:
            return None
        self._drawn += 1
        batches = drawn if isinstance(drawn, tuple) else (drawn,)
        if len(batches) != self._layers or len({len(batch) for batch in batches}) > 1:
            raise StreamError(
                f"a batch has shapes {[tuple(batch.shape) for batch in batches]}, expected one [B, D] "
                f"tensor for each of {self._layers} layers, all with the same B; give a tuple of them"
            )
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"drawn": self._drawn}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self._drawn < state["meta"]["drawn"]:
            if self.next_batch() is None:
                raise StreamError(
                    f"the run to resume had drawn {state['meta']['drawn']} batches, but the iterable "
                    f"ended after {self._drawn}; give the iterable from its beginning"
                )


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
