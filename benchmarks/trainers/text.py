"""What whole runs share: the text, the language model, and activations to judge the result by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsae import TrainConfig
from fastsae.data.opening import open_text
from fastsae.data.stream import open_stream
from fastsae.lm.loading import load_pretrained


class Timed:
    """A call that adds up the ``seconds`` it takes."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self) -> Any:
        start = time.perf_counter()
        found = self.call()
        self.seconds += time.perf_counter() - start
        return found


def documents(config: TrainConfig) -> list[str]:
    """The whole text, in the order in which fastsae reads it."""
    return list(open_text(config))


def language_model(config: TrainConfig) -> tuple[Any, Any, int]:
    """The model, its tokenizer and its width."""
    model, tokenizer = load_pretrained(config.model)
    return model, tokenizer, model.config.get_text_config(decoder=True).hidden_size


def held_out(config: TrainConfig) -> Tensor:
    """Activations ``[n, D]`` of the text's first rows, which fastsae does not train on."""
    (rows,) = open_stream(config).held_out()
    return rows
