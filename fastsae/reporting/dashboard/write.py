"""The report of an SAE: ``report.html``, which opens anywhere, with a page for every latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...evaluation.evaluate import Evaluation
from ...lm.held_out import HeldOutText
from ...lm.hooked import SplicedModel
from ...sae.module import SAE
from ..tracking import read_metrics
from .collect import Collector
from .geometry import TokenNames, logit_effects, neighbours, random_cosines
from .page import write_latents, write_page

__all__ = ["Collector", "write_report_page"]

PAGE = "report.html"
_CURVES = ("explained_variance", "objective", "l0", "alive_fraction", "threshold")


def write_report_page(
    directory: Path,
    sae: SAE,
    evaluation: Evaluation | None = None,
    collector: Collector | None = None,
    model: SplicedModel | None = None,
    text: HeldOutText | None = None,
    *,
    title: str | None = None,
    page: str = PAGE,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the report of ``sae`` to ``directory``; returns the path of the page.

    Args:
        directory: if it holds the ``metrics.jsonl`` of a run, its curves are shown.
        evaluation: numbers to show; the distributions are those of its first mode.
        collector, text: passages; ``collector`` has observed the evaluation of ``text``.
        model: for the tokens that a latent promotes and suppresses.
        extra: more data for the page, such as a contrast.

    The data of the latents lie beside the page in ``PAGE`` less its ending plus ``_data``.
    """
    near = neighbours(sae)
    effects = None if model is None else logit_effects(sae, model)
    names = None if model is None else TokenNames(model.tokenizer)
    folder = directory / f"{Path(page).stem}_data"
    latents = write_latents(folder, collector, near, effects, text, names)
    metrics = read_metrics(directory)
    data: dict[str, Any] = {
        "facts": _facts(sae),
        "curves": {
            "tokens": [m["tokens_seen"] for m in metrics],
            **{name: [m.get(name) for m in metrics] for name in _CURVES},
        },
        "cosines": {
            "found": _histogram(near.values[:, 0]) if near.values.numel() else None,
            "random": _histogram(random_cosines(sae)) if near.values.numel() else None,
        },
        "latents": latents,
        **(extra or {}),
    }
    if evaluation is not None:
        data["evaluation"] = evaluation.to_json()
        # k per token says nothing: the mode in which L0 varies most is shown.
        mode = max(evaluation.scores, key=lambda m: int((evaluation[m].l0_counts > 0).sum()))
        data["l0"] = {"mode": mode, "counts": evaluation[mode].l0_counts.tolist()}
    return write_page(directory / page, title or directory.resolve().name, data)


def _facts(sae: SAE) -> dict[str, Any]:
    return {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "activation": type(sae.activation).__name__,
        "model": sae.metadata.get("model_name"),
        "hook": " to ".join(filter(None, (sae.hook_name, sae.metadata.get("hook_name_out"))))
        or None,
    }


def _histogram(values: torch.Tensor, bins: int = 40) -> dict[str, list[float]]:
    edges = torch.linspace(-0.2, 1, bins + 1)
    counts = torch.histogram(values.float().clamp(-0.2, 1), edges).hist
    return {"edges": edges.tolist(), "counts": counts.tolist()}
