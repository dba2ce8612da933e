"""``python -m fastsae.evaluate``: settings, from an SAE on disk to a table, JSON and a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..config import TrainConfig
from ..data.opening import open_text
from ..errors import ConfigError
from ..evaluation.evaluate import evaluate
from ..evaluation.table import describe
from ..lm import demo
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel, layer_of
from ..sae.activation import Inference
from ..sae.io import load
from ..sae.module import SAE
from .guarded import guarded
from .presets import demo_config

log = logging.getLogger(__name__)

_TRAINING = TrainConfig()


@dataclass(frozen=True)
class Source:
    """The SAE, and the language model whose activations it reads."""

    sae: tyro.conf.Positional[str]
    """Folder of an SAE in any format fastsae reads, or owner/name on the Hugging Face hub."""
    model: str | None = None
    """The language model: an id on the hub or a directory. [what the SAE says]"""
    layer: int | None = None
    """Decoder layer whose output the SAE reads (0 is the first). [what the SAE says]"""
    quantization: Literal["nf4", "nf4-dequantized", "none"] | None = None
    """Weights of the language model. [what the SAE says, or none]"""
    context_length: int | None = None
    """Tokens per row given to the language model. [what the SAE says, or 128]"""
    batch_rows: int = 32
    """Rows per forward pass, at most."""
    outlier_norm: float | None = None
    """Leave out tokens whose activation has more than so many times the median norm of its forward
    pass; inf keeps all. [what the SAE was trained with]"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""

    def open(self) -> tuple[SAE, SplicedModel]:
        """Load both. Raises FormatError, ConfigError or StreamError."""
        from ..device import resolve_device

        device = resolve_device(self.device)
        sae = load(self.sae, device)
        name = self.model or sae.metadata.get("model_name")
        if name is None:
            raise ConfigError(
                f"the SAE in {self.sae} does not say which language model it is of; give --model"
            )
        layer = layer_of(sae.hook_name) if self.layer is None else self.layer
        quantization = self.quantization or sae.metadata.get("quantization") or "none"
        return sae, SplicedModel.load(name, layer, quantization=quantization, device=device)

    def outliers(self, sae: SAE) -> float | None:
        given = sae.metadata.get("outlier_norm") if self.outlier_norm is None else self.outlier_norm
        if given is not None and not given > 1:
            raise ConfigError(f"outlier_norm must be greater than 1, got {given}")
        return given

    def context(self, sae: SAE) -> int:
        context = self.context_length or sae.metadata.get("context_size") or 128
        if context < 2:
            raise ConfigError(f"context_length must be at least 2, got {context}")
        return context


@dataclass(frozen=True)
class EvaluateConfig(Source):
    """Evaluate an SAE on text it was not trained on."""

    text_files: tuple[str, ...] = ()
    """Local .txt, .jsonl or .parquet files to evaluate on instead of the data set."""
    dataset: str = _TRAINING.dataset
    """Data set on the hub, streamed. [the demo's text for the demo's model]"""
    dataset_config: str | None = _TRAINING.dataset_config
    """Configuration (subset) of the data set."""
    dataset_split: str = _TRAINING.dataset_split
    """Split of the data set."""
    text_column: str = _TRAINING.text_column
    """Column that holds the text."""
    seed: int = _TRAINING.initial_seed
    """Order of the text. With the text and the seed of a training run, its first tokens are held out."""
    tokens: int | None = None
    """Tokens of text to evaluate on. [as many as training holds out: 65536, in the demo 16384]"""
    modes: tuple[Inference, ...] = ()
    """Inference modes. [all that the SAE has]"""
    losses: bool = True
    """Cross-entropy and KL of the language model with its residual stream replaced."""
    out: str | None = None
    """Folder for evaluation.json and report.html. [the SAE's own, if it is a folder]"""
    report: bool = True
    """Write report.html with a page for every latent."""


def text_of(config: EvaluateConfig, sae: SAE, model: SplicedModel) -> HeldOutText:
    """The text that ``config`` asks for, tokenised."""
    dataset, tokens = config.dataset, config.tokens or _TRAINING.eval_tokens
    if not config.text_files and model.name == demo.MODEL and dataset == _TRAINING.dataset:
        settings = demo_config()
        dataset, tokens = settings.dataset, config.tokens or settings.eval_tokens
    source = open_text(
        config.text_files,
        dataset,
        config.dataset_config,
        config.dataset_split,
        text_column=config.text_column,
        seed=config.seed,
    )
    context = config.context(sae)
    return HeldOutText.tokenize(source, model.tokenizer, context, tokens, source.name)


def run(config: EvaluateConfig) -> None:
    """Evaluate, print the table, and write what there is to write."""
    from ..reporting.dashboard.write import Collector, write_report_page

    sae, model = config.open()
    text = text_of(config, sae, model)
    directory = Path(config.out or config.sae)
    writable = config.out is not None or directory.is_dir()
    observers = [Collector(sae.d_sae, sae.W_dec.device)] if config.report and writable else []
    result = evaluate(
        sae,
        text,
        config.modes or None,
        model=model,
        losses=config.losses,
        rows=config.batch_rows,
        outlier_norm=config.outliers(sae),
        observers=observers,
    )
    print(describe(result))  # noqa: T201
    if not writable:
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "evaluation.json"
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    written = [path]
    if observers:
        written.append(
            write_report_page(
                directory, sae, evaluation=result, collector=observers[0], model=model, text=text
            )
        )
    print("wrote " + ", ".join(map(str, written)))  # noqa: T201


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """The command. Returns the exit code."""

    def command(given: Sequence[str]) -> None:
        run(tyro.cli(EvaluateConfig, args=list(given), description=description))

    return guarded(command, arguments)
