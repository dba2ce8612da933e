"""The training loop: one stream of activations, one SAE or several side by side on it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ..config import Sweep, TrainConfig
from ..data.lanes import IterableLanes, Lanes
from ..data.source import ActivationSource, Batches, IterableSource
from ..data.stream import Stream, open_stream
from ..device import check_precision, resolve_device, resolve_precision
from ..errors import CheckpointError, ConfigError, FastsaeError, StreamError
from ..reporting.report import report_runs
from ..reporting.run_folder import RunFolder
from ..reporting.tracking import Display
from ..sae.module import SAE
from ..team import Team, join, leave, membership
from . import checkpoint
from .initialize import initialize_sae, load_origin
from .parts import require_one_run, resolve_parts
from .run import Run, StreamTotals
from .signals import Signals

log = logging.getLogger(__name__)

LEAST_ROWS = 32
"""Activations, at least, that input scaling and ``b_dec`` are estimated from, however small batches are."""


def train(batches: Iterable[Any], config: TrainConfig) -> SAE:
    """Train an SAE on any iterable of activations.

    One pass, one batch a step, in this thread, and never a batch more than is trained on. Nothing is
    written unless ``config.out`` is set; then the run is saved and reported there, and a run that was
    stopped goes on (batches already trained on are drawn and passed over). An iterable that ends early
    ends the training normally. The settings of the language model and the text are not looked at.

    Args:
        batches: ``[B, D]`` tensors or arrays of any float dtype, on any device, also in the lists and
            dicts that loaders make of them. Rows that are not finite are dropped and counted.
        config: ``d_sae`` (or ``expansion``), ``k``, ``lr``, ``tokens``, ... ; ``batch_size`` is only
            used to describe the run, each batch is taken as it comes.

    Returns:
        The SAE in eval mode, input scaling folded into its weights.

    Raises:
        ConfigError: an impossible setting, several SAEs, or CUDA asked for and absent.
        StreamError: the iterable is empty, a batch is not ``[B, D]`` with the same D, most rows are not
            finite, or the training diverged.
        Exception: what the iterable raises, after saving what was trained, if there is an ``out``.
        CheckpointError: ``out`` holds a run with other settings.
    """
    if isinstance(config, Sweep):
        raise ConfigError(
            f"train gives one SAE and the settings ask for {len(config.runs)}; for all of them in one "
            f"pass use fastsae.Trainer(config, batches).fit(), which gives a list"
        )
    saes = train_and_report(config, batches)
    if saes:
        return saes[0]
    # Of several processes the first has it, and has written it by now.
    folder = RunFolder.of(config)
    assert folder is not None
    return folder.load_sae(config.device)


def train_and_report(
    config: TrainConfig | Sweep,
    source: ActivationSource | Iterable[Any] | None = None,
) -> list[SAE]:
    """Train as :class:`Trainer` does; then evaluate, report and publish what was written, if anything.

    Of several processes, the first does what follows the training, and returns the SAEs. SIGINT and SIGTERM
    end any of that with Interrupted, and the same call goes on.
    """
    with membership() as team, ExitStack() as scope:
        sweep = resolve_parts(_sweep(config, source), team)
        signals = scope.enter_context(_signals(_runs(sweep, team)))
        trainer = Trainer(sweep, source)
        saes, folders = trainer.fit(scope, signals), trainer.folders
        # The evaluation needs the memory of the model that was cut, of the buffer and the optimizers.
        del trainer, source
        leave()  # what follows needs nobody else, and may take longer than anybody waits
        if folders and team.is_first:
            report_runs(folders)
        return saes


def _sweep(config: TrainConfig | Sweep, source: object) -> Sweep:
    """What is asked for as a sweep, which is written if it is trained on the language model's stream."""
    if not isinstance(config, (TrainConfig, Sweep)):
        raise ConfigError(
            f"the settings are a {type(config).__name__}, expected a TrainConfig or a Sweep: it is "
            f"fastsae.train(batches, config), and fastsae.Trainer(config, batches)"
        )
    sweep = config if isinstance(config, Sweep) else Sweep(config)
    if sweep.base.reuse > 1 and source is not None and not isinstance(source, (Stream, Lanes)):
        raise ConfigError(
            f"reuse = {sweep.base.reuse} is for the activations of a language model, which a pool mixes; "
            f"batches of your own are each taken once: give them as often as you want them trained on"
        )
    if source is None and sweep.base.out is None:
        return Sweep(
            replace(sweep.base, out="runs"), sweep.layers, sweep.ks, sweep.seeds, sweep.hooks
        )
    return sweep


def _runs(sweep: Sweep, team: Team) -> list[Run]:
    streams = ([sweep.sites.index(site) for site in each.sites] for each in sweep.runs)
    count = len(sweep.runs)
    hosts = {i: rank for rank in range(team.size) for i in team.hosted(count, rank)}
    return [
        Run(each, (at[0], at[-1]), team, hosts[i])
        for i, (each, at) in enumerate(zip(sweep.runs, streams, strict=True))
    ]


def _signals(runs: Sequence[Run]) -> Signals:
    folders = [run.folder for run in runs if run.folder is not None]
    return Signals(lambda: _what_is_saved(runs, _paths(folders)), enabled=bool(folders))


def _what_is_saved(runs: Sequence[Run], where: str) -> str:
    seen, tokens = min(run.saved_tokens() for run in runs), runs[0].config.tokens
    if all(run.is_complete() for run in runs):
        return (
            f"stopped after the training; the SAE is saved in {where}. Give the same command again for the "
            f"evaluation, report and push that are missing"
        )
    if not seen:
        return "stopped before the first step; give the same command again to begin"
    return (
        f"stopped at {seen:,} of {tokens:,} tokens; everything is saved in {where}. Give the same command "
        f"again to go on"
    )


def _paths(folders: Iterable[RunFolder]) -> str:
    return ", ".join(str(folder.path) for folder in folders)


class Trainer:
    """Trains an SAE, or every SAE of a sweep, on one pass of the stream.

    Each has its own update, folder, metrics and checkpoints (a :class:`Run`), and is bit for bit the SAE
    that is trained alone on the same stream; another one costs its step.

    Args:
        config: one SAE, or a sweep. With ``out=None`` nothing is written, unless the stream is the
            language model's, whose runs go to ``runs/``.
        source: where activations come from: an :class:`ActivationSource`, or an iterable of ``[B, D]``
            tensors, as ``train`` takes them (with several layers, of a tuple of them). By default the
            language model and text of ``config``.

    Raises:
        FastsaeError: anything the user can mend, before anything is written.
    """

    def __init__(
        self,
        config: TrainConfig | Sweep,
        source: ActivationSource | Iterable[Any] | None = None,
    ) -> None:
        self.team = team = join()
        sweep = resolve_parts(_sweep(config, source), team)
        self.config = sweep.runs[0]
        """What the runs have in common, and the first one's layer, k and seed."""
        self.device = resolve_device(self.config.device)
        check_precision(self.config.precision, self.device)
        if team.size > 1:
            require_one_run(sweep, team)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            parts = self.config.lanes, self.config.latent_shards
            log.info("%d processes, %d lanes of text, %d latent shards", team.size, *parts)
        self.runs = _runs(sweep, team)
        self._complete = team.on_first(self._is_complete)
        if self._complete:  # the SAEs are there: neither model nor text is opened
            return
        fresh = not team.on_first(lambda: all(run.saved_steps() for run in self.runs))
        self._origin = load_origin(sweep) if self.config.init_from is not None and fresh else None
        if source is None:
            source = open_stream(self.config, sweep.sites, team)
        elif not isinstance(source, ActivationSource):
            factor = self.config.outlier_norm or math.inf
            kept = None if math.isinf(factor) else factor
            source = IterableSource(source, len(sweep.sites), kept)
            if (self.config.lanes or 1) > 1:
                source = IterableLanes(source, team, self.device)
        elif team.size > 1 and not isinstance(source, (Lanes, IterableLanes)):
            raise ConfigError(
                f"{team.size} processes train together, and a {type(source).__name__} gives each of them what it "
                f"likes: give an iterable of batches, of which every process has its own, or train on the "
                f"language model's stream"
            )
        self.source = source
        self._metadata = source.metadata or ({},) * len(sweep.sites)
        self._pending: list[Batches] = []  # drawn to initialise on, not trained on yet

    def _is_complete(self) -> bool:
        for folder in self.folders:
            folder.require_usable()
        return all(run.is_complete() for run in self.runs)

    @property
    def folders(self) -> list[RunFolder]:
        """Those of the runs, if anything is written."""
        return [run.folder for run in self.runs if run.folder is not None]

    # --- the loop ---

    def fit(self, scope: ExitStack | None = None, signals: Signals | None = None) -> list[SAE]:
        """Train to the end, or resume and train to the end; the finished SAEs, in the order of the sweep. Of
        several processes, the first returns them, when they are written, and the others none.

        Each is saved with a ``summary.json``; ``report_runs(trainer.folders)`` evaluates them.

        Args:
            scope: keeps the runs' folders locked and open until it ends; the end of the training, if
                absent.
            signals: those of a scope that is wider than the training.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived and everything was saved.
            FastsaeError: the text ended early, the training diverged, the disk is full, ...
            Exception: what the source raises; everything was saved before, and a note says where.
        """
        self._started = time.perf_counter()
        self._set_precision()
        with ExitStack() as own:
            signals = signals or own.enter_context(_signals(self.runs))
            if self._complete:
                return self._trained_already(own if scope is None else scope)
            training = self._open_runs(own if scope is None else scope)
            display = own.enter_context(self._display())

            with signals.deferred():
                while self.tokens_seen < self.config.tokens and not self._stopped(signals):
                    batches = self._next_batches(training)
                    if batches is None:
                        self._source_ended(training)
                        break
                    for run in training:
                        run.train_on(batches)
                    if self._crossed(self.config.log_every_tokens, len(batches[0])):
                        totals = self._totals()
                        display.show({run.name: run.log(totals) for run in training})
                    display.advance(self.tokens_seen)
                    if self._crossed(self.config.checkpoint_every_tokens, len(batches[0])):
                        self._save(training)
                self._save(training)
            return self._finish(training)

    @property
    def tokens_seen(self) -> int:
        """Activations trained on by the runs that are not finished; all runs, if all are."""
        return min(run.tokens_seen for run in self.runs)

    def _stopped(self, signals: Signals) -> bool:
        """Whether a signal has arrived, at any process: then all of them save and stop."""
        received = max(number for (number,) in self.team.agree(signals.received or 0))
        if received:  # else one may have arrived meanwhile: next time
            signals.received = received
        return bool(received)

    def _next_batches(self, training: list[Run]) -> Batches | None:
        try:
            batches = self._pending.pop(0) if self._pending else self.source.next_batch()
        except Exception as error:
            self._save_before(error, training)
            raise
        if batches is None:
            return None
        return tuple(batch.to(self.device, non_blocking=True) for batch in batches)

    def _crossed(self, interval: int, batch: int) -> bool:
        seen = self.tokens_seen
        return seen // interval > (seen - batch) // interval

    def _set_precision(self) -> None:
        # bf16 operands are exact in TF32, so both ask the tensor cores for fp32 accumulation.
        precision = resolve_precision(self.config.precision, self.device)
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"

    def _totals(self) -> StreamTotals:
        elapsed = time.perf_counter() - self._started
        return StreamTotals({"elapsed": elapsed} | self.source.seconds, self.source.counts)

    def _display(self) -> Display:
        # A progress bar is for runs; without a folder the program around us has the terminal.
        total = self.config.steps * self.config.batch_size
        bar = bool(self.folders) and self.team.is_first
        return Display(self.config.tokens, total, self.tokens_seen, bar=bar)

    def _trained_already(self, scope: ExitStack) -> list[SAE]:
        """The SAEs of runs that are complete, sent again to where they are to be."""
        if not self.team.is_first:
            return []
        log.info("trained already, and saved in %s", _paths(self.folders))
        saes = []
        for folder in self.folders:
            scope.enter_context(folder.opened())
            saes.append(folder.load_sae(self.config.device))
            folder.summarize(saes[-1], folder.summary(), f"Add {folder.config.run_name}")
        return saes

    # --- where it begins ---

    def _open_runs(self, scope: ExitStack) -> list[Run]:
        """Lock and open the folder of every run until ``scope`` ends, and begin or resume it; returns the
        runs that have not seen all their tokens."""
        # A run that exists is held before anything is done with it; a new one gets its folder when
        # the first activations have shown that there is something to train on.
        existing = self.team.on_first(lambda: self._lock_existing(scope))
        finished = self.team.on_first(lambda: [run.is_finished() for run in self.runs])
        training = [run for run, done in zip(self.runs, finished, strict=True) if not done]
        step = self.team.on_first(lambda: self._common_step(training))
        self._begin_or_resume(training, step)
        error = "log(error)" if self.config.objective == "log" else "error"
        log.info("what is minimised: %s + %g aux", error, self.config.aux_weight)
        self.team.on_first(lambda: self._open_folders(scope, existing))
        return training

    def _lock_existing(self, scope: ExitStack) -> list[str]:
        """The names of the runs that exist, which are held until ``scope`` ends."""
        existing = [run for run in self.runs if run.folder and run.folder.path.exists()]
        for run in existing:
            assert run.folder is not None
            scope.enter_context(run.folder.locked())
        return [run.name for run in existing]

    def _open_folders(self, scope: ExitStack, existing: list[str]) -> None:
        for run in self.runs:
            if run.folder is not None:
                if run.name not in existing:
                    scope.enter_context(run.folder.locked())
                run.folder.open(scope, run.tokens_seen)

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
                path = run.saved(later)
                meta = checkpoint.load_meta(path)
                run.refuse_changes(path, meta["config"])
                if names <= set(meta["group"]):
                    continue
                where = "at the beginning" if step is None else f"at step {step}"
                raise CheckpointError(
                    f"{path.parents[1]} has been trained to step {later} without the others, which stand "
                    f"{where}. Finish it by itself first: the same command with its own --layer, --hook, --k and "
                    f"--seed, and --stream-seed {self.config.resolved_stream_seed}. A finished run may be "
                    f"among the others. Or choose another --name"
                )
        return step

    def _begin_or_resume(self, training: list[Run], step: int | None) -> None:
        """Restore ``training`` from ``step``, or give them new SAEs; and the others from their end."""
        restored: dict[Run, checkpoint.Checkpoint] = {}
        last = self.team.on_first(lambda: [max(run.saved_steps(), default=0) for run in self.runs])
        for run, newest in zip(self.runs, last, strict=True):
            if run not in training:
                restored[run] = run.restore(newest, self._metadata_of(run))
            elif step is not None:
                restored[run] = run.restore(step, self._metadata_of(run))
        for run in training:
            if run.folder is not None and self.team.is_first:
                checkpoint.discard_after(run.folder.checkpoints, step or 0)
        if training and step is None:
            self._begin(training)
        else:
            self._resume_source(restored[(training or self.runs)[0]])
            log.info("resumed at %s tokens", f"{self.tokens_seen:,}")

    def _begin(self, training: list[Run]) -> None:
        """Draw the first batches, initialise SAEs on them, and keep them to train on."""
        self._source_start = self.source.state_dict()
        drawn, few = 0, min(LEAST_ROWS, self.config.tokens)
        while len(self._pending) < self.source.initialization_batches or drawn < few:
            batches = self.source.next_batch()
            if batches is None:
                break
            self._keep(batches)
            drawn += len(batches[0])
        if not self._pending:
            raise StreamError("there is nothing to train on: the stream gave no batch at all")
        self._drawn_ahead = len(self._pending)
        rows = [torch.cat(layer) for layer in zip(*self._pending, strict=True)]
        fewest = min(run.config.k for run in training)
        if int(fewest * len(self._pending[0][0])) < 1:
            raise ConfigError(
                f"k = {fewest:g} active latents per token select none in a batch of "
                f"{len(self._pending[0][0])}; raise k, or the batch size to {math.ceil(1 / fewest)}"
            )
        for run in training:
            if not run.is_here:
                run.begin(None)
                continue
            x, target = (rows[i] for i in run.streams)
            d_sae = (
                run.config.resolve_d_sae(x.shape[1]) if self._origin is None else self._origin.d_sae
            )
            metadata, part = self._metadata_of(run), run.part_of(d_sae)
            sae = initialize_sae(run.config, x, self._origin, metadata, target, part=part)
            run.begin(sae, d_sae)

    def _metadata_of(self, run: Run) -> dict[str, Any]:
        own, target = (self._metadata[i] for i in run.streams)
        if run.config.target is None:
            return own
        names = ("hook_name", "hf_hook_name")
        return own | {f"{name}_out": target[name] for name in names if name in target}

    def _keep(self, batches: Batches) -> None:
        # A source may fill the same memory again for its next batch.
        self._pending.append(tuple(batch.clone() for batch in batches))

    def _resume_source(self, saved: checkpoint.Checkpoint) -> None:
        prefix = "stream."
        tensors = {
            n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)
        }
        self.source.load_state_dict({"tensors": tensors, "meta": saved.meta["stream"]})
        self._source_start = self.source.state_dict()
        skip, ahead = saved.meta["stream_skip"], saved.meta["stream_ahead"]
        for i in range(skip + ahead):
            batches = self.source.next_batch()
            if i >= skip and batches is not None:
                self._keep(batches)
        self._drawn_ahead = skip + len(self._pending)

    # --- what is saved, and where it ends ---

    def _save(self, training: list[Run]) -> None:
        # Until the first batches are trained on, the source is ahead of the training.
        ahead = len(self._pending)
        position = self._source_start if ahead else self.source.state_dict()
        skip = self._drawn_ahead - ahead if ahead else 0
        for run in training:
            run.require_finite()
        totals, group = self._totals(), [run.name for run in training]
        for run in training:
            run.save(position, (skip, ahead), totals, group)
        if self.team.is_first:
            # Of a finished one too: it may have been killed before this.
            for folder in self.folders:
                checkpoint.prune(folder.checkpoints, self.config.keep_checkpoints)

    def _save_before(self, error: Exception, training: list[Run]) -> None:
        """Save what was trained before the stream raised ``error``, and note on it where; of several
        processes, the others do not know of it."""
        if not self.folders or self.team.size > 1:
            return
        try:
            self._save(training)
            error.add_note(_what_is_saved(self.runs, _paths(self.folders)))
        except FastsaeError as other:
            error.add_note(f"It could not be saved: {other}")

    def _source_ended(self, training: list[Run]) -> None:
        seen, asked = self.tokens_seen, self.config.tokens
        if self.source.may_end_early:
            log.info(
                "the batches ended after %s tokens of %s; learning rate and dead window were those of a run "
                "of the latter: give tokens = %s for a run that knows its length",
                f"{seen:,}", f"{asked:,}", seen,
            )  # fmt: skip
            return
        self._save(training)
        raise StreamError(
            f"the text ended after {seen:,} activations of the {asked:,} asked for"
            f"{f' ({self.source.ended})' if self.source.ended else ''}. Everything is saved "
            f"in {_paths(self.folders)}: give the same command with --tokens {seen} to finish there, or "
            f"train on more text"
        )

    def _finish(self, training: list[Run]) -> list[SAE]:
        text = rows = None
        if self.team.is_first:
            text = self.source.held_out_text()
            rows = self.source.held_out() if text is None and self.folders else None
        totals = self._totals()
        # A run that was finished before took no time of this process.
        idle = replace(totals, seconds={})
        saes = [
            run.finish(totals if run in training else idle, text if rows is None else rows)
            for run in self.runs
        ]
        self.team.wait()  # the others may read what the first has written
        return [sae for sae in saes if sae is not None]
