"""The model card of a run: what happened, written from what was recorded while it happened.

The text is ``card.md``. Every number in it is one that stands in the settings, in ``metrics.jsonl``,
in the history of checkpoints or in ``summary.json``; nothing is computed here but a share of two of
them.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..evaluation.estimates import Estimate
from ..sae.module import SAE
from ..version import __version__

_CHECKPOINTS_SHOWN = 30
# Settings of where a run is kept, which say nothing of the SAE.
_UNTOLD = (
    "out", "name", "resume", "wandb", "wandb_project", "wandb_entity", "hub_repo", "hub_private", "demo",
    "keep_checkpoints", "device", "report",
)  # fmt: skip
_OF_THE_STREAM = (
    "model", "layer", "hook", "quantization", "context_length", "harvest_batch", "dataset", "dataset_config",
    "dataset_split", "text_column", "text_files", "train_on", "stream_seed", "pool_tokens", "reuse",
    "eval_tokens", "outlier_norm",
)  # fmt: skip
_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "datasets", "safetensors", "numpy")


def model_card(
    config: TrainConfig,
    sae: SAE,
    history: Sequence[dict[str, Any]],
    metrics: Sequence[dict[str, Any]],
    summary: dict[str, Any] | None = None,
) -> str:
    """The content of a repository's ``README.md``, YAML header included.

    Args:
        config: settings of the run.
        sae: as it is now; its metadata says what it was trained on.
        history: ``tokens_seen``, ``step`` and ``time`` (UTC) of every checkpoint, in order.
        metrics: what ``metrics.jsonl`` holds.
        summary: of a finished run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    of_language_model = "hook_name" in sae.metadata and "model_name" in sae.metadata
    tags = ["sparse-autoencoder", "mechanistic-interpretability", "sae-lens", "batch-topk"]
    if of_language_model:
        tags.insert(3, _family(sae.metadata["model_name"]))
    on_hub = of_language_model and _is_repository(config.model)
    from_hub = on_hub and not config.text_files and _is_repository(config.dataset)
    english = of_language_model and (config.demo or "fineweb" in config.dataset)
    card = ModelCard.from_template(
        ModelCardData(
            license="apache-2.0",
            library_name="saelens",
            language="en" if english and not config.text_files else None,
            tags=[*tags, "arxiv:2412.06410"],
            base_model=config.model if on_hub else None,
            datasets=config.dataset if from_hub else None,
        ),
        template_path=str(Path(__file__).with_name("card.md")),
        config=config,
        sae=sae,
        metadata=sae.metadata,
        summary=summary,
        of_language_model=of_language_model,
        repository=config.hub_repository or config.run_name,
        last=history[-1],
        count=len(history),
        checkpoints=_checkpoints(history, metrics),
        left_out=len(history) - _CHECKPOINTS_SHOWN,
        settings=_settings(config, sae, of_language_model),
        versions=_versions(),
        link=_link,
        show=_show,
    )
    return f"{card}\n"


def _checkpoints(
    history: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """The last metrics logged before each checkpoint, and the best."""
    rows = []
    for saved in history[-_CHECKPOINTS_SHOWN:]:
        before = [m for m in metrics if m["tokens_seen"] <= saved["tokens_seen"]]
        if before:
            rows.append((f"{saved['tokens_seen']:,}", before[-1]))
    known = [m for m in metrics if m["explained_variance"] is not None]
    if known:
        peak = max(known, key=lambda m: m["explained_variance"])
        rows.append(("**peak explained variance**", peak))
    return rows


def _settings(config: TrainConfig, sae: SAE, of_language_model: bool) -> dict[str, Any]:
    """As they were used, those included that were not given."""
    untold = {*_UNTOLD}
    if config.k_initial is None:
        untold.add("k_anneal_tokens")
    if not of_language_model:
        untold |= {*_OF_THE_STREAM}
    elif config.text_files:
        untold |= {"dataset", "dataset_config", "dataset_split"}
    settings = {"d_in": sae.d_in, **config.to_dict(), "d_sae": sae.d_sae}
    settings["lr"] = config.peak_lr(sae.d_sae, sae.d_out)
    settings["lr_warmup_tokens"] = config.warmup_tokens
    settings["lr_decay_tokens"] = config.decay_tokens
    settings["dead_after_tokens"] = config.dead_after
    settings["stream_seed"] = config.resolved_stream_seed
    settings["outlier_norm"] = config.stream_outlier_norm or "inf"
    settings["k_aux"] = config.k_aux or sae.default_k_aux
    settings["precision"] = sae.precision
    settings["text_files"] = [Path(file).name for file in config.text_files]
    return {
        name: value
        for name, value in settings.items()
        if name not in untold and value not in (None, (), [])
    }


def _versions() -> dict[str, str]:
    found = {"fastsae": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_repository(name) else f"`{name}`"


def _family(model: str) -> str:
    """``gemma-4`` of ``google/gemma-4-E2B``: the name up to its first number."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    match = re.match(r"[a-z]+(?:-?\d+(?:\.\d+)?)?(?![\w.])", name)
    return match[0] if match else name


def _show(value: Any, form: str = ".4g") -> str:
    """A number, with its interval if it knows one; or a dash where the template finds none."""
    if isinstance(value, Estimate) and value.low is not None and value.high is not None:
        return f"{value:{form}} [{value.low:{form}}, {value.high:{form}}]"
    return format(value, form) if isinstance(value, (int, float)) else "–"
