"""What a finished run says of itself: summary.json, a few lines, and a picture."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config import TrainConfig
from ..device import peak_memory_bytes
from ..errors import FastsaeError
from ..evaluation.evaluate import evaluate
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel, layer_of
from ..sae.activation import BatchTopK
from ..sae.module import SAE
from .dashboard.write import Collector, write_report_page
from .tracking import read_metrics

log = logging.getLogger(__name__)

PICTURE = "training.png"


def write_report(
    directory: Path,
    sae: SAE,
    config: TrainConfig,
    progress: dict[str, float | int],
    held_out: Tensor | None,
    text: HeldOutText | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run, write ``summary.json``, ``report.html`` and the picture, and say where.

    Args:
        directory: the run's folder, which holds ``metrics.jsonl``.
        progress: tokens seen, steps and speed of the whole run.
        held_out: activations ``[N, D]`` that were not trained on. Without them the summary gives the
            last training metrics, and says so in ``evaluated_on``.
        text: the held-out text itself, for what the whole language model loses and for the passages of
            each latent in ``report.html``; the model is loaded anew, whole, for that.

    Returns:
        The content of ``summary.json``.
    """
    metrics = read_metrics(directory)
    summary: dict[str, Any] = {"explained_variance": None, "pca_explained_variance": None}
    density = None
    if held_out is not None:
        assert isinstance(sae.activation, BatchTopK)
        own = sae.inference or "topk"
        evaluation = evaluate(sae, held_out, list(dict.fromkeys((own, "threshold"))))
        result, by_threshold = evaluation[own], evaluation["threshold"]
        density = result.density.numpy()
        summary |= {
            "explained_variance": result.explained_variance,
            "pca_explained_variance": evaluation.pca_explained_variance,
            "l0": result.l0,
            "alive_fraction": result.alive_fraction,
            "evaluated_on": f"{len(held_out)} held-out activations",
            "inference": sae.inference,
            "threshold_explained_variance": by_threshold.explained_variance,
            "threshold_l0": by_threshold.l0,
        }
    elif metrics:
        summary |= {
            name: metrics[-1][name] for name in ("explained_variance", "l0", "alive_fraction")
        }
        summary["evaluated_on"] = "the last logged training batch"
    summary |= {"d_in": sae.d_in, "d_sae": sae.d_sae, "k": config.k, **progress}
    summary["peak_memory_bytes"] = peak_memory_bytes(sae.W_dec.device)
    plot_run(
        directory / PICTURE,
        metrics,
        title=f"{config.run_name}: {sae.d_sae:,} latents on {sae.d_in} dimensions",
        k=config.mean_active,
        density=density,
        pca_explained_variance=summary["pca_explained_variance"],
    )
    # Said before the page is made: a large language model reads the held-out text for a while.
    log.info("%s", _describe(directory, config, summary))
    summary["report"] = _write_page(directory, sae, config, text)
    aside = directory / ".summary.partial"
    aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, directory / "summary.json")
    return summary


def _write_page(
    directory: Path, sae: SAE, config: TrainConfig, text: HeldOutText | None
) -> str | None:
    """Write ``report.html``; a failure is logged and costs the run nothing, for the SAE is saved."""
    try:
        if text is None:
            page = write_report_page(directory, sae, title=config.run_name)
            log.info("  look at it          %s", page)
            return page.name
        log.info(
            "  evaluating          the whole language model on %s tokens",
            f"{sum(map(len, text.rows)):,}",
        )
        model = SplicedModel.load(
            config.model,
            layer_of(sae.hook_name),
            quantization=config.quantization,
            device=sae.W_dec.device,
            revision=sae.metadata.get("model_revision", config.revision),
        )
        collector = Collector(sae.d_sae, sae.W_dec.device)
        evaluation = evaluate(
            sae,
            text,
            model=model,
            rows=config.harvest_batch,
            outlier_norm=config.outlier_norm,
            observers=[collector],
        )
        page = write_report_page(
            directory, sae, evaluation, collector, model, text, title=config.run_name
        )
        log.info("  look at it          %s", page)
        return page.name
    except (FastsaeError, OSError, RuntimeError) as error:
        log.warning(
            "report.html was not written (%s). The SAE is safe; write the report with\n"
            "  python -m fastsae.evaluate %s",
            error, directory,
        )  # fmt: skip
        return None


def _describe(directory: Path, config: TrainConfig, s: dict[str, Any]) -> str:
    lines = [f"finished {config.run_name}: {s['tokens_seen']:,} tokens in {s['step']:,} steps"]
    if s["explained_variance"] is not None:
        pca = s["pca_explained_variance"]
        lines += [
            f"  explained variance  {s['explained_variance']:.4f}   ({s['evaluated_on']})",
            *([] if pca is None else [f"  PCA, same k         {pca:.4f}"]),
            f"  L0                  {s['l0']:.2f}",
            f"  alive latents       {s['alive_fraction']:.1%} of {s['d_sae']:,}",
        ]
    stages = [n.removeprefix("seconds_") for n in s if n.startswith("seconds_")]
    speeds = [
        f"{stage} {s['tokens_seen'] / s[f'seconds_{stage}']:,.0f}"
        for stage in stages
        if s[f"seconds_{stage}"] > 0
    ]
    peak = s["peak_memory_bytes"]
    lines += [
        f"  tokens per second   {s['tokens_per_second']:,.0f}   ({', '.join(speeds)})",
        *([f"  peak memory         {peak / 1e9:.2f} GB"] if peak is not None else []),
        f"  SAE                 {directory}/sae_weights.safetensors, cfg.json",
        f"  metrics, picture    {directory}/metrics.jsonl, summary.json, {PICTURE}",
        f"  load it             fastsae.load({str(directory)!r})",
    ]
    return "\n".join(lines)


def plot_run(
    path: Path,
    metrics: Sequence[dict[str, Any]],
    *,
    title: str,
    k: float,
    density: np.ndarray | None = None,
    pca_explained_variance: float | None = None,
) -> None:
    """Draw a run to a PNG: explained variance, loss, L0 and alive fraction over tokens, and density.

    Args:
        metrics: what ``metrics.jsonl`` holds, in order.
        density: ``[F]``, the share of held-out tokens each latent is active on.
        pca_explained_variance: drawn as the baseline of the first panel.
    """
    # The object interface: pyplot would keep global state in whoever imports us.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    tokens = [m["tokens_seen"] for m in metrics]
    panels = (
        ("explained_variance", "Explained variance"),
        ("loss", "Loss (after input scaling)"),
        ("l0", "L0 (active latents per token)"),
        ("alive_fraction", "Alive latents (active in the last 1M tokens)"),
        ("threshold", "Threshold (raw units)"),
    )
    for axis, (name, label) in zip(axes.flat, panels, strict=False):
        axis.plot(tokens, [m[name] for m in metrics], color="#3b6ea5", linewidth=1.6)
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_xlabel("tokens", fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if pca_explained_variance is not None:
        axes[0, 0].axhline(pca_explained_variance, color="#c2703d", linestyle="--", linewidth=1.2)
        axes[0, 0].annotate(
            f"PCA, {max(1, round(k))} components (held out): {pca_explained_variance:.3f}",
            xy=(0.98, pca_explained_variance),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#c2703d",
        )
    # L0 is flat in training: a range around it keeps rounding from looking like a trend.
    axes[0, 2].set_ylim(0, 2 * k)
    axes[1, 0].set_ylim(0, 1.05)
    _plot_density(axes[1, 2], density)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _plot_density(axis: Any, density: np.ndarray | None) -> None:
    axis.set_title("Feature density (held-out text)", fontsize=10, loc="left")
    axis.set_xlabel("log10 of the share of tokens a latent is active on", fontsize=9)
    axis.set_ylabel("latents", fontsize=9)
    if density is None:
        axis.text(0.5, 0.5, "no held-out activations", ha="center", transform=axis.transAxes)
        return
    active = density[density > 0]
    axis.hist(np.log10(active), bins=40, color="#3b6ea5")
    silent = len(density) - len(active)
    axis.text(
        0.98, 0.95, f"{silent:,} of {len(density):,} silent", ha="right", va="top",
        transform=axis.transAxes, fontsize=8,
    )  # fmt: skip
