"""Where activations come from: what the training asks of it, and an iterable of the user's as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import StreamError
from ..lm.held_out import HeldOutText

Batches = tuple[Tensor, ...]
"""``[B, D]`` activations in raw units for each hooked layer; a row is the same token in all of them."""


class ActivationSource(ABC):
    """A stream of activations with a position. A subclass gives batches; all else has a default."""

    may_end_early = False
    """Whether the training ends well where the source does, however many tokens it was to see."""

    @abstractmethod
    def next_batch(self) -> Batches | None:
        """``[B, D]`` activations in raw units for each hooked layer, or None when there are no more."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on: ``tensors`` for safetensors, ``meta`` for JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError or StreamError if it does not fit."""

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        """Of each layer, provenance that travels with its SAE; nothing if empty."""
        return ()

    @property
    def seconds(self) -> dict[str, float]:
        """Time this process spent so far, by stage."""
        return {}

    @property
    def counts(self) -> dict[str, int]:
        """Activations kept, and dropped by reason, since the start of the run."""
        return {}

    def held_out_text(self) -> HeldOutText | None:
        """Text that is never trained on, to evaluate on with the whole language model."""
        return None

    def held_out(self) -> Batches | None:
        """``[N, D]`` activations of each layer that are never trained on."""
        return None


class IterableSource(ActivationSource):
    """An iterable of the user's; its state is how many batches were drawn.

    The training ends where the iterable does.

    Args:
        batches: ``[B, D]`` tensors; with several layers, tuples of as many of them.
    """

    may_end_early = True

    def __init__(self, batches: Iterable[Tensor | Batches], layers: int) -> None:
        self._iterator = iter(batches)
        self._layers = layers
        self._drawn = 0

    def next_batch(self) -> Batches | None:
        drawn = next(self._iterator, None)
        if drawn is None:
            return None
        self._drawn += 1
        batches = drawn if isinstance(drawn, tuple) else (drawn,)
        if len(batches) != self._layers or len({len(batch) for batch in batches}) > 1:
            raise StreamError(
                f"a batch has shapes {[tuple(batch.shape) for batch in batches]}, expected one [B, D] "
                f"tensor for each of {self._layers} layers, all with the same B; give a tuple of them"
            )
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"drawn": self._drawn}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self._drawn < state["meta"]["drawn"]:
            if self.next_batch() is None:
                raise StreamError(
                    f"the run to resume had drawn {state['meta']['drawn']} batches, but the iterable "
                    f"ended after {self._drawn}; give the iterable from its beginning"
                )
