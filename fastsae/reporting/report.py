"""What follows the training of an SAE: its evaluation, ``report.html``, a picture, and the last push."""

from __future__ import annotations

import gc
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import FastsaeError
from ..evaluation.evaluate import Evaluation, Observer, evaluate, inference_modes
from ..files import write_json
from ..lm.held_out import Batch, HeldOutText
from ..lm.hooked import SplicedModel, layer_of
from ..lm.loading import load_pretrained
from ..sae.module import SAE
from .compare import RunSummary, plot
from .dashboard.write import Collector, write_report_page
from .run_folder import RunFolder
from .tracking import read_metrics, warn_of_outcome

log = logging.getLogger(__name__)

PICTURE = "training.png"
LINE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal for a bar."""


def report_runs(folders: Sequence[RunFolder]) -> None:
    """Report finished runs with :func:`report_run`; a language model that they share is loaded once.

    What fails costs a warning with the command that repeats it: the SAEs are saved.
    """
    gc.collect()  # the model that training cut holds itself by its hooks
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    load = lru_cache(maxsize=1)(load_pretrained)
    for folder in folders:
        try:
            report_run(folder, load_model=load)
        except (FastsaeError, OSError, RuntimeError, KeyboardInterrupt) as error:
            log.warning(
                "%s was not evaluated (%s: %s). The SAE is safe; evaluate it with\n  fastsae evaluate %s",
                folder.config.run_name, type(error).__name__, error, shlex.quote(str(folder.path)),
            )  # fmt: skip
            if isinstance(error, KeyboardInterrupt):
                raise


def report_run(
    folder: RunFolder,
    *,
    device: str | None = None,
    load_model: Callable[..., tuple[Any, Any]] = load_pretrained,
) -> Evaluation | None:
    """Evaluate a finished run on what was held out from its training, with its own language model.

    Writes ``evaluation.json``, ``report.html`` and ``training.png``, completes ``summary.json``, and
    pushes what the run is to push; the last two also if the evaluation fails.

    Args:
        device: where to compute; where the run was trained if absent.
        load_model: called as ``load_pretrained``.

    Returns:
        The evaluation; None if nothing was held out.

    Raises:
        FastsaeError, OSError, RuntimeError: the model cannot be loaded, memory is short, ...
    """
    config, path = folder.config, folder.path
    sae = folder.load_sae(config.device if device is None else device)
    summary, evaluation, model, collector = folder.summary(), None, None, None
    with folder.opened():
        try:
            held_out = folder.held_out()
            text = held_out if isinstance(held_out, HeldOutText) else None
            if text is not None:
                log.info(
                    "evaluating %s with the whole language model on %s tokens",
                    config.run_name, f"{text.tokens:,}",
                )  # fmt: skip
                loaded = load_model(
                    config.model,
                    quantization=config.quantization,
                    device=sae.W_dec.device,
                    revision=sae.metadata.get("model_revision", config.revision),
                )
                model = SplicedModel(*loaded, layer_of(sae.hook_name), config.model)
                collector = Collector(sae.d_sae, sae.W_dec.device)
            if held_out is not None:
                evaluation = _evaluate(folder, sae, held_out, model, collector)
                write_json(path / "evaluation.json", evaluation.to_json())
                summary |= _numbers(evaluation, sae)
            page = write_report_page(
                path, sae, evaluation, collector, model, text, title=config.run_name
            )
            summary["report"] = page.name
            log.info("%s", _describe(folder, summary))
            if evaluation is not None:
                warn_of_outcome(
                    config, summary["alive_fraction"], summary["evaluated_on"],
                    summary["explained_variance"], summary["pca_explained_variance"],
                )  # fmt: skip
        finally:
            run = RunSummary(config.run_name, "finished", read_metrics(path), summary)
            plot(path / PICTURE, [run])
            folder.summarize(sae, summary, f"Add the report of {config.run_name}")
    return evaluation


def _evaluate(
    folder: RunFolder,
    sae: SAE,
    held_out: HeldOutText | Tensor,
    model: SplicedModel | None,
    collector: Collector | None,
) -> Evaluation:
    # The summary has the numbers of the threshold even before there is one.
    modes = list(dict.fromkeys((*inference_modes(sae), "threshold")))
    with _progress(folder.config.run_name, len(held_out)) as progress:
        return evaluate(
            sae,
            held_out,
            modes,
            model=model,
            rows=folder.config.harvest_batch,
            outlier_norm=sae.metadata.get("outlier_norm"),
            observers=[progress] if collector is None else [collector, progress],
        )


@contextmanager
def _progress(name: str, rows: int) -> Iterator[Observer]:
    """An observer that shows how many of the ``rows`` of text are evaluated: a bar, or lines."""
    bar = tqdm(total=rows, desc=name, unit="row", leave=False, disable=not sys.stderr.isatty())
    told = time.monotonic()

    def show(batch: Batch, _measured: Tensor, _x: Tensor, _z: Tensor) -> None:
        nonlocal told
        done = batch.first + len(batch.lengths)
        bar.update(done - bar.n)
        if bar.disable and time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            log.info("  %s: %s of %s rows", name, f"{done:,}", f"{rows:,}")

    with bar:
        yield show


def _numbers(evaluation: Evaluation, sae: SAE) -> dict[str, Any]:
    """What ``summary.json`` has of an evaluation."""
    own, by_threshold = evaluation[sae.inference or "topk"], evaluation["threshold"]
    return {
        "explained_variance": own.explained_variance,
        "pca_explained_variance": evaluation.pca_explained_variance,
        "l0": own.l0,
        "alive_fraction": own.alive_fraction,
        "evaluated_on": f"{evaluation.tokens} held-out activations",
        "inference": sae.inference,
        "threshold_explained_variance": by_threshold.explained_variance,
        "threshold_l0": by_threshold.l0,
    }


def _describe(folder: RunFolder, s: dict[str, Any]) -> str:
    lines = [f"report of {folder.config.run_name}"]
    if s["explained_variance"] is not None:
        pca = s["pca_explained_variance"]
        lines += [
            f"  explained variance  {s['explained_variance']:.4f}   ({s['evaluated_on']})",
            *([] if pca is None else [f"  PCA, same k         {pca:.4f}"]),
            f"  L0                  {s['l0']:.2f}",
            f"  alive latents       {s['alive_fraction']:.1%} of {s['d_sae']:,}",
        ]
    lines += [
        f"  numbers, picture    {folder.path}/summary.json, {PICTURE}",
        f"  look at it          {folder.path / s['report']}",
    ]
    return "\n".join(lines)
