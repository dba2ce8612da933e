"""Where activations come from: what the training asks of it, and an iterable of the user's as one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StreamError
from ..lm.held_out import HeldOutText
from ..lm.norms import FirstNorms, is_outlier

log = logging.getLogger(__name__)

Batches = tuple[Tensor, ...]
"""``[B, D]`` activations in raw units for each hooked layer; a row is the same token in all of them."""

JUDGED_ROWS = 1000
"""So many rows of a user's and more are judged together: over half of them must be finite."""


class ActivationSource(ABC):
    """A stream of activations with a position. A subclass gives batches; all else has a default."""

    may_end_early = False
    """Whether the training ends well where the source does, however many tokens it was to see."""
    initialization_batches = 8
    """Batches that the input scaling and ``b_dec`` are estimated from; they are trained on too."""

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
    def ended(self) -> str | None:
        """A sentence on which part of the source ended, once one did that there are several of."""
        return None

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
        """Activations kept, and dropped by reason, since the start of the run. Where a source is that of
        several processes: in all of them, which are to ask for it, and for the state, at the same place."""
        return {}

    def held_out_text(self) -> HeldOutText | None:
        """Text that is never trained on, to evaluate on with the whole language model."""
        return None

    def held_out(self) -> Batches | None:
        """``[N, D]`` activations of each layer that are never trained on."""
        return None


class IterableSource(ActivationSource):
    """An iterable of the user's; its state is how many batches were drawn, and how wide they are.

    Nothing is drawn ahead of the training, unless batches are tiny, and the training ends where the
    iterable does. Rows that are not finite in one layer, or outliers there
    where ``outlier_norm`` is given, are dropped from all, counted, and told once; to find them, a batch
    on a CUDA device is waited for.

    Args:
        batches: ``[B, D]`` tensors or arrays of any float dtype; with several layers, as many of them,
            all with the same B. They may come as loaders give them: in a list or tuple, as the only value
            of a dict, or as its ``"activations"``.
        outlier_norm: drop rows of more than this many times the median norm of their batch.

    Raises StreamError: that is no iterable; a batch is something else, or has another width than those
    before it; or most rows are not finite.
    """

    may_end_early = True
    initialization_batches = 1

    def __init__(
        self, batches: Iterable[Any], layers: int, outlier_norm: float | None = None
    ) -> None:
        try:
            self._iterator = iter(batches)
        except TypeError as error:
            raise StreamError(
                f"{type(batches).__name__} is no iterable of batches; give a list, a loader or a generator "
                f"of [B, D] tensors (of a function that yields them, what it returns)"
            ) from error
        self.layers = layers
        self._outlier_norm = outlier_norm
        names = ["the batches"] if layers == 1 else [f"batches of layer {i}" for i in range(layers)]
        self._norms = FirstNorms(names, outlier_norm)
        self._drawn = 0
        self._widths: str | None = None
        self._kept = self._nonfinite = self._outliers = 0
        self._judged = [0, 0]  # rows, and those that are not finite, since the last judgement

    def next_batch(self) -> Batches | None:
        for given in self._iterator:
            batches = self._take(given)
            if len(batches[0]):
                return batches
        if self._drawn and not self._kept:
            raise _nonfinite(self._nonfinite, self._nonfinite)
        self._norms.tell()
        return None

    def _take(self, given: Any) -> Batches:
        """The rows of a batch that are kept, float32 ``[b, D]`` for each layer; maybe none."""
        found = _unpack(given)
        if (
            len(found) != self.layers
            or not all(map(_is_batch, found))
            or len({*map(len, found)}) > 1
        ):
            layers = (
                f" for each of {self.layers} layers, all with the same B" if self.layers > 1 else ""
            )
            raise StreamError(
                f"a batch is {_describe(given)}, expected a float tensor [B, D] with at least one row{layers}; "
                f"of rows x [N, D], give x.split(1024); of x [text, position, D], x.flatten(0, 1)"
            )
        widths = ", ".join(str(tensor.shape[1]) for tensor in found)
        if self._widths not in (None, widths):
            raise StreamError(f"a batch has width {widths}, those before had {self._widths}")
        batches = tuple(tensor.detach().float().contiguous() for tensor in found)
        finite = torch.stack([batch.isfinite().all(dim=1).cpu() for batch in batches]).all(dim=0)
        if not finite.all():
            batches = tuple(batch[finite.to(batch.device)] for batch in batches)
        self._count(len(finite), len(finite) - len(batches[0]))
        self._norms.see(batches)
        if self._outlier_norm is not None and len(batches[0]):
            factor = self._outlier_norm
            outlying = torch.stack([is_outlier(batch, factor).cpu() for batch in batches]).any(
                dim=0
            )
            self._outliers += int(outlying.sum())
            batches = tuple(batch[~outlying.to(batch.device)] for batch in batches)
        self._drawn, self._widths = self._drawn + 1, widths
        return batches

    def _count(self, rows: int, lost: int) -> None:
        """Raise StreamError if over half of some thousand rows are not finite."""
        if lost and not self._nonfinite:
            log.warning(
                "%s. Such rows are dropped, and counted as nonfinite", _nonfinite(lost, rows)
            )
        self._kept, self._nonfinite = self._kept + rows - lost, self._nonfinite + lost
        self._judged = [self._judged[0] + rows, self._judged[1] + lost]
        if self._judged[0] >= JUDGED_ROWS:
            if 2 * self._judged[1] > self._judged[0]:
                raise _nonfinite(self._judged[1], self._judged[0])
            self._judged = [0, 0]

    @property
    def counts(self) -> dict[str, int]:
        return {"nonfinite": self._nonfinite, "outliers": self._outliers}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"drawn": self._drawn, "widths": self._widths}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Pass over the batches that were drawn."""
        drawn, self._widths = state["meta"]["drawn"], state["meta"].get("widths")
        for given in islice(self._iterator, drawn):
            self._take(given)
        if self._drawn < drawn:
            raise StreamError(
                f"the run to resume had drawn {drawn} batches, but the iterable ended after "
                f"{self._drawn}; give the iterable from its beginning"
            )


def _unpack(given: Any) -> list[Any]:
    """The tensors of a batch, in whatever it is that holds them."""
    match given:
        case {"activations": found}:
            return _unpack(found)
        case Mapping() if len(given) == 1:
            return _unpack(*given.values())
        case list() | tuple():
            return [tensor for part in given for tensor in _unpack(part)]
        case np.ndarray() if given.dtype.kind == "f":
            return [torch.from_numpy(np.array(given, np.float32, order="C"))]
    return [given]


def _is_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and len(x) > 0


def _describe(given: Any) -> str:
    """What somebody gave, for messages."""
    kind = type(given).__name__
    match given:
        case Mapping():
            return f"a {kind} of {', '.join(map(repr, list(given)[:8]))}"
        case list() | tuple():
            return f"a {kind} of {len(given)} ({', '.join(map(_describe, given[:4]))})"
        case Tensor() | np.ndarray():
            return f"{kind} {tuple(given.shape)} of {given.dtype}"
    return kind


def _nonfinite(lost: int, rows: int) -> StreamError:
    return StreamError(
        f"{lost:,} of {rows:,} rows of the batches ({lost / rows:.1%}) are not finite: what they come from "
        f"overflows, as float16 does beyond 65,504; compute them in float32 or bfloat16"
    )
