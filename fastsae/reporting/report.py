"""What follows the training of an SAE: its evaluation, ``report.html``, a picture, and the last push."""

from __future__ import annotations

import gc
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import FastsaeError
from ..evaluation.evaluate import Evaluation, evaluate, inference_modes, whole_passes
from ..files import write_json
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel
from ..lm.loading import load_pretrained
from ..sae.activation import Inference
from ..sae.module import SAE
from .compare import RunSummary, plot
from .dashboard.write import Collector, write_report_page
from .run_folder import RunFolder
from .tracking import read_metrics, warn_of_baseline

log = logging.getLogger(__name__)

PICTURE = "training.png"
SHARE = 0.1
"""What an evaluation may cost beside its training, in weights that tokens are multiplied by."""
FEWEST_ROWS = 16
"""Evaluated however short the training was. Rows are what the bootstrap draws: by Student's t and (n - 1) / n in the
variance, its 95 % intervals are 11 % too narrow with 16 of them, and 22 % with 8."""


def report_runs(folders: Sequence[RunFolder]) -> None:
    """Report finished runs as their ``report`` asks; a language model that they share is loaded once.

    A run that has its report already is left alone. What fails costs a warning with the command that
    repeats it: the SAEs are saved.
    """
    gc.collect()  # the model that training cut holds itself by its hooks
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    load = lru_cache(maxsize=1)(load_pretrained)
    for folder in folders:
        config, command = folder.config, f"fastsae evaluate {shlex.quote(str(folder.path))}"
        if config.report == "none":
            log.info("%s is not evaluated (--report none); that is\n  %s", config.run_name, command)
            continue
        if {"full": "report", "quick": "inference"}[config.report] in folder.summary():
            log.info("%s has its report; for another one\n  %s", config.run_name, command)
            continue
        try:
            report_run(folder, page=config.report == "full", load_model=load)
        except (FastsaeError, OSError, RuntimeError) as error:
            log.warning(
                "%s was not evaluated (%s: %s). The SAE is safe; evaluate it with\n  %s",
                config.run_name, type(error).__name__, error, command,
            )  # fmt: skip


def report_run(
    folder: RunFolder,
    *,
    device: str | None = None,
    page: bool = True,
    load_model: Callable[..., tuple[Any, Any]] = load_pretrained,
) -> Evaluation | None:
    """Evaluate a finished run on what was held out from its training, with its own language model.

    Of held-out text no more is measured than costs ``SHARE`` of the training, but ``FEWEST_ROWS`` rows. Writes
    ``evaluation.json``, ``report.html`` and ``training.png``, completes ``summary.json``, and pushes what the
    run is to push; the last three also if the evaluation fails.

    Args:
        device: where to compute; where the run was trained if absent.
        page: write ``report.html``.
        load_model: called as ``load_pretrained``.

    Returns:
        The evaluation; None if nothing was held out.

    Raises:
        FastsaeError, OSError, RuntimeError: the model cannot be loaded, memory is short, ...
    """
    config, path = folder.config, folder.path
    sae = folder.load_sae(config.device if device is None else device)
    # The summary has the numbers of the threshold even before there is one.
    modes = list(dict.fromkeys((*inference_modes(sae), "threshold")))
    summary, evaluation, model, collector, text = folder.summary(), None, None, None, None
    with folder.opened():
        try:
            measured = held_out = folder.held_out()
            if isinstance(held_out, HeldOutText):
                loaded = load_model(
                    config.model,
                    quantization=config.quantization,
                    device=sae.W_dec.device,
                    revision=sae.metadata.get("model_revision", config.revision),
                )
                model = SplicedModel(*loaded, config.site, config.model, *config.sites[1:])
                affordable = summary["tokens_seen"] * _affordable_share(model, modes)
                measured = text = held_out.part(affordable, FEWEST_ROWS)
                log.info(
                    "evaluating %s with the whole language model on %s of %s held-out tokens",
                    config.run_name, f"{text.tokens:,}", f"{held_out.tokens:,}",
                )  # fmt: skip
                collector = Collector(sae.d_sae, sae.W_dec.device) if page else None
            if measured is not None:
                evaluation = evaluate(
                    sae,
                    measured,
                    modes,
                    model=model,
                    rows=config.harvest_batch,
                    outlier_norm=sae.metadata.get("outlier_norm"),
                    observers=[] if collector is None else [collector],
                )
                write_json(path / "evaluation.json", evaluation.to_json())
                summary |= _numbers(evaluation, sae, held_out)
            if page:
                written = write_report_page(
                    path, sae, evaluation, collector, model, text, title=config.run_name
                )
                summary["report"] = written.name
            log.info("%s", _describe(folder, summary))
            if evaluation is not None:
                found = evaluation[sae.inference or "topk"].explained_variance
                lr = config.peak_lr(sae.d_sae, sae.d_out)
                warn_of_baseline(config, lr, found, evaluation.pca_explained_variance)
        finally:
            if not isinstance(sys.exception(), KeyboardInterrupt):
                run = RunSummary(config.run_name, "finished", read_metrics(path), summary)
                plot(path / PICTURE, [run])
                folder.summarize(sae, summary, f"Add the report of {config.run_name}")
    return evaluation


def _affordable_share(model: SplicedModel, modes: Sequence[Inference]) -> float:
    """Tokens to evaluate for each that was trained on. That this is counted, not timed, makes it the same
    in every run; what the SAE takes is left out, which is more in the training."""
    cut, whole = model.work
    return SHARE * cut / (cut + whole_passes(modes) * whole)


def _numbers(
    evaluation: Evaluation, sae: SAE, held_out: HeldOutText | Tensor | tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """What ``summary.json`` has of an evaluation of some of ``held_out``."""
    own, by_threshold = evaluation[sae.inference or "topk"], evaluation["threshold"]
    inner = {str(m): value for m, value in own.levels.items()}
    return {
        "explained_variance": own.explained_variance,
        **({"explained_variance_by_level": inner} if len(inner) > 1 else {}),
        "pca_explained_variance": evaluation.pca_explained_variance,
        "l0": own.l0,
        "alive_fraction": own.alive_fraction,
        "evaluated_on": f"{evaluation.tokens} held-out activations",
        "evaluated_tokens": evaluation.tokens,
        "held_out_tokens": held_out.tokens
        if isinstance(held_out, HeldOutText)
        else evaluation.tokens,
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
            *(
                f"  first {int(m):<13,} {value:.4f}"
                for m, value in s.get("explained_variance_by_level", {}).items()
            ),
            *([] if pca is None else [f"  PCA, same k         {pca:.4f}"]),
            f"  L0                  {s['l0']:.2f}",
            f"  alive latents       {s['alive_fraction']:.1%} of {s['d_sae']:,}",
        ]
    lines += [
        f"  numbers, picture    {folder.path}/summary.json, {PICTURE}",
        *([f"  look at it          {folder.path / s['report']}"] if "report" in s else []),
    ]
    return "\n".join(lines)
