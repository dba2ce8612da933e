"""The model card of a run: what happened, written from what was recorded while it happened.

Every number of the card is one that stands in the settings, in ``metrics.jsonl``, in the history of
checkpoints or in ``summary.json``; nothing is computed here but a share of two of them.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..sae.module import SAE
from ..version import __version__

PAPER = "https://arxiv.org/abs/2412.06410"

_CHECKPOINTS_SHOWN = 30
_METRICS = {
    "objective": "Objective",
    "error": "Error",
    "aux": "Aux-k",
    "mse": "MSE",
    "explained_variance": "Explained variance",
    "l0": "L0",
    "alive_fraction": "Alive",
    "dead": "Dead",
    "threshold": "Threshold",
}
# Settings of where a run is kept, which say nothing of the SAE.
_UNTOLD = (
    "out", "name", "resume", "wandb", "wandb_project", "wandb_entity", "hub_repo", "hub_private", "demo",
    "keep_checkpoints", "device",
)  # fmt: skip
_OF_THE_STREAM = (
    "model", "layer", "quantization", "context_length", "harvest_batch", "dataset", "dataset_config",
    "dataset_split", "text_column", "text_files", "stream_seed", "pool_tokens", "eval_tokens",
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
    sections = (
        _introduction(config, sae, summary is not None),
        _progress(config, history),
        _held_out(summary),
        _training_metrics(history, metrics),
        _settings(config, sae),
        _usage(config, sae),
        _versions(),
        _context(config, sae),
        _limits(sae, summary),
    )
    return _header(config, sae) + "\n\n".join(filter(None, sections)) + "\n"


def _header(config: TrainConfig, sae: SAE) -> str:
    from huggingface_hub import ModelCardData

    tags = ["sparse-autoencoder", "mechanistic-interpretability", "sae-lens", "batch-topk"]
    if _is_language_model(sae):
        tags.insert(3, _family(sae.metadata["model_name"]))
    on_hub = _is_language_model(sae) and _is_repository(config.model)
    from_hub = on_hub and not config.text_files and _is_repository(config.dataset)
    english = _is_language_model(sae) and (config.demo or "fineweb" in config.dataset)
    data = ModelCardData(
        license="apache-2.0",
        library_name="saelens",
        language="en" if english and not config.text_files else None,
        tags=[*tags, "arxiv:" + PAPER.rsplit("/", 1)[-1]],
        base_model=config.model if on_hub else None,
        datasets=config.dataset if from_hub else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _introduction(config: TrainConfig, sae: SAE, finished: bool) -> str:
    what = (
        f"the residual stream after layer {config.layer} of {_link(sae.metadata['model_name'])} "
        f"(`{sae.hook_name}`)"
        if _is_language_model(sae)
        else "activations that were given to the trainer directly"
    )
    text = (
        f"# {config.run_name}\n\n"
        f"A BatchTopK sparse autoencoder with {sae.d_sae:,} latents of width {sae.d_in:,} on {what}, with "
        f"{config.k:g} active latents per token. Trained with fastsae {__version__}."
    )
    start = sae.metadata.get("warm_start")
    if start is not None:
        text += (
            f"\n\nIt began with the latents of `{start['source']}` (a {start['activation']} SAE"
            + (f" of {start['model_name']}, {start['hook_name']}" if "hook_name" in start else "")
            + ")."
        )
    if not finished:
        text += "\n\n**Training goes on: these are the weights of the last checkpoint.**"
    return text


def _progress(config: TrainConfig, history: Sequence[dict[str, Any]]) -> str:
    last = history[-1]
    rows = {
        "Tokens seen": f"{last['tokens_seen']:,}",
        "Target": f"{config.tokens:,}",
        "Progress": f"{min(1, last['tokens_seen'] / config.tokens):.1%}",
        "Training steps": f"{last['step']:,}",
        "Checkpoints": f"{len(history)}",
        "Last checkpoint (UTC)": last["time"].removesuffix("+00:00").replace("T", " "),
    }
    return "## Training progress\n\n" + _table(("", ""), rows.items())


def _held_out(summary: dict[str, Any] | None) -> str:
    if summary is None or "inference" not in summary:
        return ""
    names = {
        "explained_variance": f"Explained variance ({summary['inference']})",
        "l0": f"L0 ({summary['inference']})",
        "threshold_explained_variance": "Explained variance (threshold)",
        "threshold_l0": "L0 (threshold)",
        "alive_fraction": "Alive latents",
        "pca_explained_variance": "Explained variance of PCA with as many components",
    }
    rows = [(label, _number(name, summary[name])) for name, label in names.items()]
    return f"## Evaluation\n\nOn {summary['evaluated_on']}.\n\n" + _table(("", ""), rows)


def _training_metrics(history: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return ""
    rows = []
    for saved in history[-_CHECKPOINTS_SHOWN:]:
        before = [m for m in metrics if m["tokens_seen"] <= saved["tokens_seen"]]
        if before:
            rows.append((f"{saved['tokens_seen']:,}", *_row(before[-1])))
    peak = max(metrics, key=lambda m: m["explained_variance"])
    rows.append(("**peak explained variance**", *_row(peak)))
    left_out = len(history) - _CHECKPOINTS_SHOWN
    return (
        "## Training metrics\n\n"
        "Of single training batches, the last one logged before each checkpoint, selected as in training "
        "(batch-level); all of them stand in `metrics.jsonl`."
        + (f" The first {left_out} checkpoints are left out." if left_out > 0 else "")
        + "\n\n"
        + _table(("Checkpoint", "Logged at", *_METRICS.values()), rows)
    )


def _row(m: dict[str, Any]) -> tuple[str, ...]:
    return f"{m['tokens_seen']:,}", *(_number(name, m[name]) for name in _METRICS)


def _settings(config: TrainConfig, sae: SAE) -> str:
    untold = {*_UNTOLD}
    if not _is_language_model(sae):
        untold |= {*_OF_THE_STREAM}
    elif config.text_files:
        untold |= {"dataset", "dataset_config", "dataset_split"}
    settings = {"d_in": sae.d_in, **config.to_dict(), "d_sae": sae.d_sae}
    settings["k_aux"] = config.k_aux or sae.default_k_aux
    settings["precision"] = sae.precision
    settings["text_files"] = [Path(file).name for file in config.text_files]
    rows = [
        (f"`{name}`", f"`{value}`")
        for name, value in settings.items()
        if name not in untold and value not in (None, (), [])
    ]
    return (
        "## Hyper-parameters\n\nAdam, betas 0.9 and 0.999, epsilon 1e-8; decoder rows of unit norm, their "
        "gradients projected; names as in `fastsae.TrainConfig`.\n\n"
        + _table(("Setting", "Value"), rows)
    )


# --- usage ---


def _usage(config: TrainConfig, sae: SAE) -> str:
    repository = config.hub_repository or config.run_name
    parts = [
        "## Usage\n\nActivations to encode are raw: any constant scaling is folded into the weights.",
        _activations(sae),
        "With fastsae:",
        f"""import fastsae

sae = fastsae.load("{repository}")
latents = sae.encode(x)  # [tokens, {sae.d_sae}]
reconstruction = sae(x)""",
        "With SAELens:",
        f"""from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "{config.run_name}")
latents = sae.encode(x)
reconstruction = sae.decode(latents)""",
    ]
    if sae.normalize != "layer_norm":
        parts += [
            "The weights alone (`W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc`, `b_dec`):",
            f"""import json

import torch
from huggingface_hub import hf_hub_download

cfg = json.load(open(hf_hub_download("{repository}", "cfg.json")))
weights = torch.load(hf_hub_download("{repository}", "sae_weights.pt"), weights_only=True)
pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
top = pre.relu().topk(cfg["k"])
latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
reconstruction = latents @ weights["W_dec"] + weights["b_dec"]""",
        ]
    # Code and prose alternate after the heading.
    return "\n\n".join(f"```python\n{p}\n```" if i % 2 else p for i, p in enumerate(parts))


def _activations(sae: SAE) -> str:
    if not _is_language_model(sae) or sae.metadata["model_name"] == "glassllm":
        return f"import torch\n\nx = torch.randn(8, {sae.d_in})  # [tokens, {sae.d_in}], your activations"
    name, hook = sae.metadata["model_name"], sae.hook_name
    text = '"The cat sat on the mat."'
    begins, where = f"{text}", "[0]"
    if sae.metadata.get("prepend_bos"):  # rows began with it, and it was not trained on
        begins, where = f"tokenizer.bos_token + {text}", "[0, 1:]"
    return f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype=torch.float32)
kept = {{}}
layer = model.get_submodule("{hook}")
layer.register_forward_hook(lambda module, inputs, output: kept.update(residual=output))
text = {begins}
with torch.no_grad():
    model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))
x = kept["residual"]{where}  # [tokens, {sae.d_in}]"""


# --- the rest ---


def _versions() -> str:
    rows = [("fastsae", __version__), ("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return "## Versions\n\n" + _table(("Package", "Version"), rows)


def _context(config: TrainConfig, sae: SAE) -> str:
    return f"""## Background

BatchTopK ([Bussmann et al. 2024]({PAPER})) keeps the `k * B` largest pre-activations of a batch of B tokens instead
of k for each token. Latents that were not active for `dead_after_tokens` are trained to explain what the others leave
(aux-k, [Gao et al. 2024](https://arxiv.org/abs/2406.04093)), with weight `aux_coefficient`. For single tokens,
`cfg.json` asks for the `{max(1, round(config.k))}` largest of each; the threshold that matches training on
average is kept in its metadata (`fastsae.load(...)(x, inference="threshold")`)."""


def _limits(sae: SAE, summary: dict[str, Any] | None) -> str:
    lines = [
        "A latent is a direction that helps to reconstruct; that it means something is to be shown for each.",
        "Reconstruction says nothing of what the model does with the reconstructed activations.",
    ]
    if _is_language_model(sae):
        lines.append(
            "Trained on one text, without special tokens, at the context length above; other text, other "
            "positions and fine-tuned versions of the model have other activations."
        )
        if sae.metadata.get("quantization") not in (None, "none"):
            lines.append(
                f"The language model's weights were quantized ({sae.metadata['quantization']}); "
                f"activations of the unquantized model differ."
            )
    if summary is None:
        lines.append("Training has not ended, and nothing was evaluated on held-out activations.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _is_language_model(sae: SAE) -> bool:
    return "hook_name" in sae.metadata and "model_name" in sae.metadata


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_repository(name) else f"`{name}`"


def _family(model: str) -> str:
    """``gemma-4`` of ``google/gemma-4-E2B``: the name up to its first number."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    match = re.match(r"[a-z]+(?:-?\d+(?:\.\d+)?)?(?![\w.])", name)
    return match[0] if match else name


def _number(name: str, value: float) -> str:
    if name == "dead":
        return f"{value:,}"
    if name == "alive_fraction":
        return f"{value:.1%}"
    return f"{value:.2f}" if name in ("l0", "threshold_l0") else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
