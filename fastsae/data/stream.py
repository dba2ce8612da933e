"""The stream: text, tokens, language model, chunks, buffer. One room a stage, each with its own state."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import TrainConfig
    from ..lm.held_out import HeldOutText
    from .buffer import ActivationBuffer
    from .harvest import ChunkSource, TextChunks
    from .text import TextSource

__all__ = ["Stream", "open_stream", "open_text_chunks"]

log = logging.getLogger(__name__)


class Stream:
    """Activations of a language model on a text: what ``Trainer`` draws from.

    Attributes: ``source`` of the activations; ``buffer`` that mixes them.
    """

    def __init__(self, source: ChunkSource, buffer: ActivationBuffer) -> None:
        self.source = source
        self.buffer = buffer

    def next_batch(self) -> tuple[Tensor, ...] | None:
        """``[batch_size, D]`` float32 on the model's device, for each hooked layer, rows of all layers
        belonging to the same tokens; the last batch may be shorter; then None."""
        return self.buffer.next_batch()

    def held_out(self) -> tuple[Tensor, ...]:
        """``[eval_tokens, D]`` float32 on the model's device, for each hooked layer: activations of the
        first rows of the text, which are never trained on. Tokens that are dropped are left out."""
        return self.source.held_out()

    def held_out_text(self) -> HeldOutText | None:
        """The text of the held-out rows; None where the activations come from a cache."""
        from .harvest import TextChunks

        return self.source.held_out_text() if isinstance(self.source, TextChunks) else None

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        """Where each layer's activations come from, under the names SAELens has for it."""
        return self.source.metadata

    @property
    def counts(self) -> dict[str, int]:
        """Activations kept, and dropped by reason, since the start of the run."""
        return asdict(self.buffer.counts)

    @property
    def seconds(self) -> dict[str, float]:
        """Time this thread spent on each stage since this process opened the stream."""
        return {**self.source.seconds, "harvest": self.buffer.harvest_seconds}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """All that the next batches depend on: ``tensors`` for safetensors, ``meta`` for JSON."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if text or model do not fit."""
        self.buffer.load_state_dict(state)


def open_stream(config: TrainConfig) -> Stream:
    """Open model and text, or the cache, and take the held-out rows.

    Raises ConfigError and StreamError for everything a user can get wrong about device, model, text
    and cache; what is quick to check is checked first. Nothing is written but a cache.
    """
    import torch

    from ..device import resolve_device
    from .buffer import ActivationBuffer
    from .cache import open_cache

    device = resolve_device(config.device)
    source: ChunkSource
    if config.cache_dir is not None:
        source = open_cache(config, device)
    else:
        source = open_text_chunks(config, device)
    buffer = ActivationBuffer(
        source,
        batch_size=config.batch_size,
        pool_tokens=config.pool_tokens,
        seed=config.resolved_stream_seed,
        dtype=torch.bfloat16 if config.activation_dtype == "bf16" else torch.float32,
    )
    return Stream(source, buffer)


def open_text_chunks(config: TrainConfig, device: torch.device) -> TextChunks:
    """The language model and the text of ``config``, without a buffer."""
    from ..lm.hooked import LanguageModel
    from ..lm.loading import load_config
    from .harvest import TextChunks
    from .tokens import TokenPacker

    load_config(config.model, config.layers, config.context_length)
    text = open_text(config)
    model = LanguageModel.load(
        config.model,
        config.layers,
        quantization=config.quantization,
        device=device,
        separate_documents=config.separate_documents,
        compile=config.compile_model,
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
        TokenPacker(text, model.tokenizer, config.context_length),
        model,
        harvest_batch=config.harvest_batch,
        held_out_tokens=config.eval_tokens,
        outlier_norm=config.outlier_norm,
    )


def open_text(config: TrainConfig) -> TextSource:
    """The text of ``config``: local files, the demo's, or a data set."""
    from ..lm import demo
    from .dataset import open_dataset
    from .text_files import open_files

    seed = config.resolved_stream_seed
    if config.text_files:
        return open_files(config.text_files, text_column=config.text_column, seed=seed)
    if config.demo and config.dataset == demo.TEXT:
        return demo.open_text(seed)
    return open_dataset(
        config.dataset,
        config.dataset_config,
        config.dataset_split,
        text_column=config.text_column,
        seed=seed,
    )
