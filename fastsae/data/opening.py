"""Opening text, and the language model that reads it, as the settings name them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import Site, TrainConfig
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
    config: TrainConfig, sites: Sequence[Site], device: torch.device
) -> TextChunks:
    """The language model, hooked at ``sites``, and the text of ``config``, without a buffer."""
    load_config(
        config.model, [site.layer for site in sites], config.context_length, config.revision
    )
    text = open_text(config)
    model = CutModel.load(
        config.model,
        sites,
        quantization=config.quantization,
        device=device,
        separate_documents=config.separate_documents,
        compile=config.compile_model,
        revision=config.revision,
    )
    precision = str(model.dtype).removeprefix("torch.")
    log.info(
        "%s, first %d of %d layers, %s: %.2f GB",
        model.name, max(hook.layer for hook in model.hooks) + 1, model.num_layers,
        precision if model.quantization == "none" else model.quantization, model.memory_bytes / 1e9,
    )  # fmt: skip
    role = None if config.train_on == "all" else config.train_on
    return TextChunks(
        TokenPacker(
            text, model.tokenizer, config.context_length, role=role, embeddings=model.embeddings
        ),
        model,
        harvest_batch=config.harvest_batch,
        held_out_tokens=config.eval_tokens,
        outlier_norm=config.stream_outlier_norm,
    )


def open_text(config: TrainConfig) -> TextSource:
    """Documents of ``text_files`` if there are any, else of ``dataset``: the demo's text by its name, a
    data set of the hub, or a local folder. The order is drawn from the seed of the stream.

    Raises StreamError and ConfigError, each with what to do.
    """
    shared: dict[str, Any] = {
        "text_column": config.text_column,
        "seed": config.resolved_stream_seed,
        "skip_bad_lines": config.skip_bad_lines,
    }
    name = config.dataset
    if config.text_files:
        return open_files(config.text_files, **shared)
    if name == demo_text.TEXT and not Path(name).is_dir():
        return demo_text.open_text(config.resolved_stream_seed)
    subset, split = config.dataset_config, config.dataset_split
    return open_dataset(name, subset, split, revision=config.dataset_revision, **shared)
