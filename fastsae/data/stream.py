"""The stream: chunks of activations from a language model or a cache, mixed by a buffer into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..config import Site, TrainConfig
from ..device import resolve_device
from ..lm.held_out import HeldOutText
from ..team import ALONE, Team
from .buffer import ActivationBuffer
from .cache import open_cache
from .harvest import ChunkSource
from .lanes import Lanes, lane_buffer
from .opening import open_text_chunks
from .source import ActivationSource


class Stream(ActivationSource):
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
        return self.source.held_out_text()

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        """Where each layer's activations come from, under the names SAELens has for it."""
        return self.source.metadata

    @property
    def counts(self) -> dict[str, int]:
        return {**asdict(self.buffer.counts), **self.source.counts}

    @property
    def seconds(self) -> dict[str, float]:
        """Time this thread spent on each stage since this process opened the stream."""
        return {**self.source.seconds, "harvest": self.buffer.harvest_seconds}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if text or model do not fit."""
        self.buffer.load_state_dict(state)


def open_stream(
    config: TrainConfig, places: Sequence[int | Site] | None = None, team: Team = ALONE
) -> Stream | Lanes:
    """Open model and text, or the cache, and take the held-out rows.

    Args:
        places: the sites (or layers, for the residual stream after them) of one forward pass; that of
            ``config`` alone if absent.
        team: the processes that host the lanes, if ``config`` asks for several.

    Raises ConfigError and StreamError for everything a user can get wrong about device, model, text
    and cache; what is quick to check is checked first. Nothing is written but a cache.
    """
    device = resolve_device(config.device)
    sites = (config.site,) if places is None else tuple(map(Site.of, places))
    source: ChunkSource
    if config.cache_dir is not None:
        source = open_cache(config, sites, device, team)
    else:
        source = open_text_chunks(config, sites, device)
    if (config.lanes or 1) > 1:
        return Lanes(source, config, team)
    return Stream(source, lane_buffer(source, config))
