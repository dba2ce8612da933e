"""Chunks of activations, as the language model gives them: one forward pass each.

A source of chunks is what the buffer draws from. There are two: text that a language model reads
(``TextChunks``, here), and a folder where that was written down (``cache.CachedChunks``).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, StreamError
from ..files import differences
from ..lm.held_out import HeldOutText, is_text
from ..lm.hooked import CutModel
from ..lm.norms import FirstNorms, is_outlier
from ..progress import progress
from .tokens import TokenPacker

log = logging.getLogger(__name__)

KEPT, NONFINITE, OUTLIER = 0, 1, 2


class Harvest(NamedTuple):
    """The activations of a chunk, in order of row and position.

    ``layers``: ``[n, D]`` for each site, all of the same tokens, in the model's dtype; padding
    and special tokens are left out. ``verdict`` uint8 [n]: ``KEPT``, or why the token is dropped from
    every site. ``special``: how many tokens were left out as special.
    """

    layers: tuple[Tensor, ...]
    verdict: Tensor
    special: int

    def kept(self) -> tuple[Tensor, ...]:
        """The activations that are not dropped; waits for the device."""
        keep = self.verdict == KEPT
        return self.layers if bool(keep.all()) else tuple(layer[keep] for layer in self.layers)


class ChunkSource(ABC):
    """Where a buffer's chunks come from. A chunk is whatever ``harvest`` turns into activations.

    Attributes: ``chunk_tokens``: the most activations a chunk may give; ``widths`` of the activations at each
    site; ``device`` that they are on.
    """

    chunk_tokens: int
    widths: tuple[int, ...]
    device: torch.device
    _told = False

    @property
    @abstractmethod
    def metadata(self) -> tuple[dict[str, Any], ...]:
        """Where each site's activations come from, under the names SAELens has for it."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far by stages other than ``harvest``."""
        return {}

    @property
    def counts(self) -> dict[str, int]:
        """What became of what the activations are made from, since the start of the run."""
        return {}

    @abstractmethod
    def lane(self, lane: int, lanes: int) -> ChunkSource:
        """The share of one of ``lanes`` lanes of the chunks to come; held-out rows are this one's alone, and
        nothing is to be drawn from it any more."""

    @abstractmethod
    def draw(self) -> Any | None:
        """The next chunk, or None at the end."""

    @abstractmethod
    def harvest(self, chunk: Any) -> Harvest:
        """The chunk's activations: the same bits whenever it is asked for them."""

    @abstractmethod
    def explain(self, verdict: Tensor) -> StreamError:
        """What to say of activations that are not finite, given the verdict of them and the others."""

    def require_mostly_finite(self, verdict: Tensor) -> None:
        """Tell once that activations are not finite; raise StreamError if that is more than half of them."""
        share = float((verdict == NONFINITE).double().mean()) if len(verdict) else 0.0
        if share > 0.5:
            raise self.explain(verdict)
        if share and not self._told:
            self._told = True
            log.warning(
                "%s. Such rows are dropped, and counted as nonfinite", self.explain(verdict)
            )

    @abstractmethod
    def held_out(self) -> tuple[Tensor, ...]:
        """``[held_out_tokens, D]`` float32 for each layer, fewer if some are dropped."""

    def held_out_text(self) -> HeldOutText | None:
        """The text of these activations, where it is known."""
        return None

    @abstractmethod
    def pack(self, chunks: Sequence[Any]) -> dict[str, Tensor]:
        """Chunks as tensors to save."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor]) -> list[Any]:
        """The chunks that were packed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """``tensors`` and ``meta`` (for JSON) that the chunks after this point depend on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""


@dataclass(frozen=True)
class Chunk:
    """Rows of text for one forward pass.

    ``tokens`` [n, context] int32, of which row i uses the first ``lengths[i]``; the rest is padding. Those
    marked as :func:`~fastsae.lm.encoding.unread` give no activation.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], context_length: int) -> Chunk:
        tokens = torch.zeros(len(rows), context_length, dtype=torch.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return cls(tokens, torch.tensor([len(row) for row in rows], dtype=torch.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, rows: int) -> list[Chunk]:
        parts = zip(self.tokens.split(rows), self.lengths.split(rows), strict=True)
        return [Chunk(tokens, lengths) for tokens, lengths in parts]


def harvest(model: CutModel, chunk: Chunk, outlier_norm: float | None = None) -> Harvest:
    """One forward pass over a chunk; on CUDA, nothing waits for the device.

    A token is dropped from every layer if its activation is not finite in one of them, or if its norm
    there exceeds ``outlier_norm`` times the median norm of the chunk.
    """
    tokens = chunk.tokens.to(torch.int64)
    read = (torch.arange(tokens.shape[1]) < chunk.lengths[:, None]) & (tokens >= 0)
    index = (read & is_text(tokens, model.special_ids)).flatten().nonzero().squeeze(1)
    special = int(read.sum()) - len(index)
    tokens = torch.where(tokens < 0, ~tokens, tokens)
    residuals = model.residuals(to_device(tokens, model.device))
    index = to_device(index, model.device)
    layers = tuple(residual.flatten(0, 1).index_select(0, index) for residual in residuals)
    verdict = torch.zeros(len(index), dtype=torch.uint8, device=model.device)
    for layer in layers:
        if outlier_norm is not None and len(index):
            verdict.masked_fill_(is_outlier(layer, outlier_norm), OUTLIER)
    for layer in layers:
        verdict.masked_fill_(~layer.isfinite().all(dim=1), NONFINITE)
    return Harvest(layers, verdict, special)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from host memory that does not wait for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class TextChunks(ChunkSource):
    """Text in chunks of ``harvest_batch`` rows, read by a language model.

    The first rows of the text, enough for ``held_out_tokens`` activations, are kept for evaluation.
    Raises StreamError if the text is empty, or if nothing would be left to train on.
    """

    def __init__(
        self,
        packer: TokenPacker,
        model: CutModel,
        *,
        harvest_batch: int,
        held_out_tokens: int,
        outlier_norm: float | None = None,
    ) -> None:
        self.model = model
        self.packer = packer
        self.chunk_tokens = harvest_batch * packer.context_length
        self.widths = model.widths
        self.device = model.device
        self._harvest_batch = harvest_batch
        self._outlier_norm = outlier_norm
        self._norms = FirstNorms(list(map(str, model.sites)), outlier_norm)
        self._held_out_tokens = held_out_tokens
        self._held_out_rows = hold_out(packer, model, held_out_tokens) if held_out_tokens else None

    @property
    def seconds(self) -> dict[str, float]:
        return {"tokenise": self.packer.seconds}

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        model = self.model
        common = {
            "model_name": model.name,
            "model_class_name": model.model_class_name,
            "hook_head_index": None,
            "context_size": self.packer.context_length,
            "prepend_bos": model.tokenizer.bos_token_id is not None,
            "seqpos_slice": [None],
            "exclude_special_tokens": True,
            "sequence_separator_token": self.packer.separator,
            "disable_concat_sequences": False,
            "dataset_path": self.packer.text.name,
            "model_layers": model.num_layers,
            "quantization": model.quantization,
            "outlier_norm": self._outlier_norm,
        }
        if self.packer.role is not None:
            common["train_on"] = self.packer.role
        revisions = {
            "model_revision": model.weights.get("commit"),
            "dataset_revision": self.packer.text.revision,
        }
        common |= {name: commit for name, commit in revisions.items() if commit}
        return tuple(
            {"hook_name": hook.name, "hf_hook_name": hook.hf_name, **common} for hook in model.hooks
        )

    @property
    def counts(self) -> dict[str, int]:
        return self.packer.counts

    def lane(self, lane: int, lanes: int) -> TextChunks:
        mine = copy(self)
        mine.packer, mine._held_out_rows = self.packer.lane(lane, lanes), None
        return mine

    def draw(self) -> Chunk | None:
        rows: list[Tensor] = []
        for row in self.packer:
            rows.append(row)
            if len(rows) == self._harvest_batch:
                break
        if not rows:
            self._norms.tell()
            return None
        return Chunk.of(rows, self.packer.context_length)

    def harvest(self, chunk: Chunk) -> Harvest:
        harvested = harvest(self.model, chunk, self._outlier_norm)
        self._norms.see(harvested.layers)
        return harvested

    def explain(self, verdict: Tensor) -> StreamError:
        model = self.model
        advice = "convert the model to float32 or bfloat16, or train on an earlier layer"
        if model.quantization != "none":
            advice = "use --quantization none"
        if model.quantization in ("nf4", "nf4-dequantized"):
            advice = "use --quantization nf4-bf16, which computes in bf16, or --quantization none"
        places = " and ".join(map(str, model.sites))
        lost = int((verdict == NONFINITE).sum())
        share = "no activation" if lost == len(verdict) else "not every activation"
        return StreamError(
            f"{share} of {places} of {model.name} is finite ({lost:,} of {len(verdict):,} rows, "
            f"{lost / len(verdict):.1%}, are not; {model.dtype}, quantization {model.quantization}): the "
            f"model overflows; {advice}"
        )

    def held_out(self) -> tuple[Tensor, ...]:
        assert self._held_out_rows is not None
        harvests: list[Harvest] = []
        with progress("held-out activations", self._held_out_tokens) as advance:
            for part in self._held_out_rows.split(self._harvest_batch):
                harvests.append(self.harvest(part))
                advance(len(harvests[-1].verdict))
        self.require_mostly_finite(torch.cat([harvest.verdict for harvest in harvests]))
        layers = zip(*(harvest.kept() for harvest in harvests), strict=True)
        return tuple(torch.cat(layer)[: self._held_out_tokens].float() for layer in layers)

    def held_out_text(self) -> HeldOutText:
        """The held-out rows as text to evaluate on; rows stand for documents there."""
        held = self._held_out_rows
        assert held is not None
        rows = [row[:n] for row, n in zip(held.tokens, held.lengths.tolist(), strict=True)]
        special = self.model.special_ids.tolist()
        return HeldOutText(rows, range(len(rows)), special, self.packer.text.name, "rows")

    def pack(self, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
        tokens = [chunk.tokens for chunk in chunks]
        lengths = [chunk.lengths for chunk in chunks]
        return {
            "tokens": _cat(tokens, (0, self.packer.context_length)),
            "lengths": _cat(lengths, (0,)),
            "rows": torch.tensor([len(chunk) for chunk in chunks], dtype=torch.int32),
        }

    def unpack(self, tensors: dict[str, Tensor]) -> list[Chunk]:
        rows = tensors["rows"].tolist()
        parts = (tensors["tokens"].split(rows), tensors["lengths"].split(rows))
        return [Chunk(tokens, lengths) for tokens, lengths in zip(*parts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        state = self.packer.state_dict()
        tensors = {f"packer.{name}": tensor for name, tensor in state["tensors"].items()}
        if self._held_out_rows is not None:
            rows = self._held_out_rows
            tensors |= {"held_out.tokens": rows.tokens, "held_out.lengths": rows.lengths}
        meta = {"packer": state["meta"], "weights": self.model.weights}
        return {"tensors": tensors, "meta": meta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if text or model is another one."""
        tensors, weights = state["tensors"], self.model.weights
        if changed := differences(state["meta"].get("weights", weights), weights):
            raise CheckpointError(
                f"{self.model.name} is not the language model that the run was started on:\n  "
                + "\n  ".join(changed)
                + "\nGive the same model to go on, or another --name to start anew"
            )
        if "held_out.tokens" in tensors:
            self._held_out_rows = Chunk(tensors["held_out.tokens"], tensors["held_out.lengths"])
        prefix = "packer."
        packer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.packer.load_state_dict({"tensors": packer, "meta": state["meta"]["packer"]})


def hold_out(packer: TokenPacker, model: CutModel, tokens: int) -> Chunk:
    """Take the first rows of the text, enough for ``tokens`` activations, out of the stream.

    Raises StreamError if the text is empty, or if nothing would be left to train on.
    """
    rows: list[Tensor] = []
    found = 0
    if packer.exhausted:
        raise StreamError(f"the text is empty: {packer.text.name}; give text with words in it")
    while found < tokens and not packer.exhausted:
        rows.append(next(packer))
        found += int(is_text(rows[-1], model.special_ids).sum())
    if packer.exhausted:
        raise StreamError(
            f"the text ({packer.text.name}) holds only {found:,} tokens, and the first {tokens:,} are held "
            f"out for evaluation: nothing is left to train on; give more text, or lower --eval-tokens"
        )
    return Chunk.of(rows, packer.context_length)


def _cat(tensors: list[Tensor], empty_shape: tuple[int, ...]) -> Tensor:
    return torch.cat(tensors) if tensors else torch.empty(empty_shape, dtype=torch.int32)
