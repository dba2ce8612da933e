"""Opening text, and the language model that reads it, as the settings name them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import TrainConfig
from ..lm.hooked import CutModel
from ..lm.loading import load_config
from . import demo_text
from .dataset import open_dataset
from .harvest import TextChunks
from .text import TextSource
from .text_files import open_files
from .tokens import TokenPacker

log = logging.getLogger(__name__)


def open_text_chunks(
    config: TrainConfig, layers: Sequence[int], device: torch.device
) -> TextChunks:
    """The language model, hooked after ``layers``, and the text of ``config``, without a buffer."""
    load_config(config.model, layers, config.context_length, config.revision)
    text = open_text(
        config.text_files,
        config.dataset,
        config.dataset_config,
        config.dataset_split,
        dataset_revision=config.dataset_revision,
        text_column=config.text_column,
        skip_bad_lines=config.skip_bad_lines,
        seed=config.resolved_stream_seed,
    )
    model = CutModel.load(
        config.model,
        layers,
        quantization=config.quantization,
        device=device,
        separate_documents=config.separate_documents,
        compile=config.compile_model,
        revision=config.revision,
    )
    log.info(
        "%s, first %d of %d layers, %s: %.2f GB",
        model.name,
        max(model.layers) + 1,
        model.num_layers,
        model.quantization if model.quantization != "none" else str(model.dtype).split(".")[-1],
        model.memory_bytes / 1e9,
    )
    return TextChunks(
        TokenPacker(text, model.tokenizer, config.context_length, embeddings=model.embeddings),
        model,
        harvest_batch=config.harvest_batch,
        held_out_tokens=config.eval_tokens,
        outlier_norm=config.stream_outlier_norm,
    )


def open_text(
    text_files: Sequence[str],
    dataset: str,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    *,
    dataset_revision: str | None = None,
    text_column: str = "text",
    skip_bad_lines: bool = False,
    seed: int = 0,
) -> TextSource:
    """Documents of ``text_files`` if there are any, else of ``dataset``: the demo's text by its name, a
    data set of the hub, or a local folder. The order is drawn from ``seed``.

    Raises StreamError and ConfigError, each with what to do.
    """
    if text_files:
        return open_files(
            text_files, text_column=text_column, seed=seed, skip_bad_lines=skip_bad_lines
        )
    if dataset == demo_text.TEXT and not Path(dataset).is_dir():
        return demo_text.open_text(seed)
    return open_dataset(
        dataset,
        dataset_config,
        dataset_split,
        revision=dataset_revision,
        text_column=text_column,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
    )
