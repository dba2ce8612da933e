"""Activations: harvested from the language model, mixed across documents, served in batches.

Rows of text go through the model in *chunks* (one forward pass each), and chunks are grouped into
*generations* of half a pool. A generation is split at random into two halves: stage g serves, in
random order, the second half of generation g - 1 and the first half of generation g. So a batch
mixes the documents of a whole pool, and no activation outlives two generations.

The order follows from the seed, the generation's number and the position within the stage alone.
That makes the state small: the token ids of the live generations, from which exactly those chunks
are harvested again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, StreamError
from .language_model import LanguageModel
from .tokens import TokenPacker


@dataclass(frozen=True)
class Chunk:
    """Rows of text for one forward pass.

    ``tokens`` [n, context] int32, of which row i uses the first ``lengths[i]``; the rest is padding.
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

    def split(self, rows: int) -> Iterator[Chunk]:
        for tokens, lengths in zip(self.tokens.split(rows), self.lengths.split(rows), strict=True):
            yield Chunk(tokens, lengths)


@dataclass
class Counts:
    """Activations harvested and kept, and those dropped: at special tokens, or not finite."""

    harvested: int = 0
    special: int = 0
    nonfinite: int = 0


def harvest(model: LanguageModel, chunk: Chunk, counts: Counts) -> Tensor:
    """The activations of a chunk, ``[m, D]`` in the model's dtype, in order of row and position.

    Padding, special tokens and non-finite rows are left out; ``counts`` is added to. Raises
    StreamError if there was text and nothing of it is finite.
    """
    tokens = chunk.tokens.to(model.device, torch.int64)
    residual = model.residual(tokens)
    text = torch.arange(tokens.shape[1]) < chunk.lengths[:, None]
    special = torch.isin(tokens, model.special_ids)
    wanted = text.to(model.device) & ~special
    activations = residual[wanted]
    finite = activations.isfinite().all(dim=1)
    n_wanted, n_finite = len(activations), int(finite.sum())
    counts.special += int(chunk.lengths.sum()) - n_wanted
    counts.nonfinite += n_wanted - n_finite
    counts.harvested += n_finite
    if n_wanted and not n_finite:
        advice = (
            "use --quantization none"
            if model.quantization == "nf4"
            else "convert the model to float32 or bfloat16, or train on an earlier layer"
        )
        raise StreamError(
            f"no activation of layer {model.layer} of {model.name} is finite ({n_wanted} rows, "
            f"{model.dtype}, quantization {model.quantization}): the model overflows; {advice}"
        )
    return activations if n_finite == n_wanted else activations[finite]


def hold_out(packer: TokenPacker, model: LanguageModel, tokens: int) -> Chunk:
    """Take the first rows of the text, enough for ``tokens`` activations, out of the stream.

    Raises StreamError if the text is empty, or if nothing would be left to train on.
    """
    special = model.special_ids.cpu()
    rows: list[Tensor] = []
    found = 0
    if packer.exhausted:
        raise StreamError(f"the text is empty: {packer.text.name}; give text with words in it")
    while found < tokens and not packer.exhausted:
        rows.append(next(packer))
        found += len(rows[-1]) - int(torch.isin(rows[-1], special).sum())
    if packer.exhausted:
        raise StreamError(
            f"the text ({packer.text.name}) holds only {found:,} tokens, and the first {tokens:,} are held "
            f"out for evaluation: nothing is left to train on; give more text, or lower --eval-tokens"
        )
    return Chunk.of(rows, packer.context_length)


def activations(model: LanguageModel, rows: Chunk, harvest_batch: int, count: int) -> Tensor:
    """The first ``count`` activations of ``rows`` (fewer if some are not finite), ``[n, D]`` float32."""
    found = [harvest(model, chunk, Counts()).float() for chunk in rows.split(harvest_batch)]
    return torch.cat(found)[:count]


@dataclass
class _Generation:
    index: int
    chunks: list[Chunk]
    slots: Tensor  # of each kept row, in order of chunk and row

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        """Slots to serve in stage ``index`` and in the next one: a random split."""
        order = _permutation(len(self.slots), seed, self.index, 0).to(self.slots.device)
        middle = (len(order) + 1) // 2
        return self.slots[order[:middle]], self.slots[order[middle:]]


def _permutation(n: int, *seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


class ActivationBuffer:
    """Serves batches of mixed activations; its state makes the next batch the same, bit for bit.

    ``pool_tokens`` is how many activations are mixed with each other (rounded to whole chunks of
    ``harvest_batch`` rows, at least two); they are kept in ``dtype``: float32 on a CPU, bfloat16 on CUDA
    unless given.

    ``counts`` and ``harvest_seconds`` grow as the stream is read.
    """

    def __init__(
        self,
        packer: TokenPacker,
        model: LanguageModel,
        *,
        batch_size: int,
        pool_tokens: int,
        harvest_batch: int,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        chunk_tokens = harvest_batch * packer.context_length
        self.chunks_per_generation = max(1, round(pool_tokens / (2 * chunk_tokens)))
        self.counts = Counts()
        self.harvest_seconds = 0.0
        self._packer = packer
        self._model = model
        self._batch_size = batch_size
        self._harvest_batch = harvest_batch
        self._seed = seed
        if dtype is None:
            dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        # Stage g needs at most one and a half generations; a resumed one, two until the part that
        # was served already is let go.
        slots = 2 * self.chunks_per_generation * chunk_tokens
        self._pool = torch.empty(slots, model.d_model, dtype=dtype, device=model.device)
        self._free = torch.arange(slots, device=model.device)
        self._free_count = slots
        self._packer_state = packer.state_dict()  # after the last live chunk
        self._older = self._newer = self._generation(0, [])  # the first real one is generation 1
        self._order = self._newer.slots
        self._position = 0

    # --- serving ---

    def next_batch(self) -> Tensor | None:
        """The next ``[batch_size, D]`` activations in float32; fewer in the last batch; then None."""
        parts: list[Tensor] = []
        missing = self._batch_size
        while missing:
            if self._position == len(self._order):
                if not self._next_stage():
                    break
                continue  # a stage may be empty
            slots = self._order[self._position : self._position + missing]
            parts.append(self._pool[slots])
            self._release(slots)
            self._position += len(slots)
            missing -= len(slots)
        return torch.cat(parts).float() if parts else None

    def _next_stage(self) -> bool:
        """Move on by a generation; False when the text and everything harvested is used up."""
        chunks = list(islice(self._chunks(), self.chunks_per_generation))
        if not chunks and not self._newer.chunks:
            return False
        self._older, self._newer = self._newer, self._generation(self._newer.index + 1, chunks)
        self._packer_state = self._packer.state_dict()
        self._begin_stage()
        return True

    def _begin_stage(self) -> None:
        order = torch.cat([self._older.halves(self._seed)[1], self._newer.halves(self._seed)[0]])
        order = order[_permutation(len(order), self._seed, self._newer.index, 1).to(order.device)]
        self._order, self._position = order, 0

    # --- harvesting ---

    def _chunks(self) -> Iterator[Chunk]:
        while rows := list(islice(self._packer, self._harvest_batch)):
            yield Chunk.of(rows, self._packer.context_length)

    def _generation(self, index: int, chunks: list[Chunk]) -> _Generation:
        slots = [self.harvest_chunk(chunk) for chunk in chunks]
        return _Generation(index, chunks, torch.cat(slots) if slots else self._free[:0])

    def harvest_chunk(self, chunk: Chunk) -> Tensor:
        """Put the chunk's activations into free slots of the pool; return the slots, in row order."""
        start = time.perf_counter()
        rows = harvest(self._model, chunk, self.counts)
        self._free_count -= len(rows)
        slots = self._free[self._free_count : self._free_count + len(rows)].clone()
        self._pool[slots] = rows.to(self._pool.dtype)
        self.harvest_seconds += time.perf_counter() - start
        return slots

    def _release(self, slots: Tensor) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    # --- state ---

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """``tensors``: token ids of the live chunks and of the packer; ``meta``: plain numbers for JSON."""
        chunks = [*self._older.chunks, *self._newer.chunks]
        context_length = self._packer.context_length
        return {
            "tensors": {
                "tokens": _cat([c.tokens for c in chunks], (0, context_length)),
                "lengths": _cat([c.lengths for c in chunks], (0,)),
                **{f"packer.{k}": v for k, v in self._packer_state["tensors"].items()},
            },
            "meta": {
                "stage": self._newer.index,
                "position": self._position,
                "generations": [
                    {
                        "index": g.index,
                        "chunks": [len(c) for c in g.chunks],
                        "activations": len(g.slots),
                    }
                    for g in (self._older, self._newer)
                ],
                "counts": dict(vars(self.counts)),
                "packer": self._packer_state["meta"],
            },
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Harvest the live chunks of ``state`` again, and go on with the batch that came next.

        Raises CheckpointError if they do not give as many activations as they did.
        """
        tensors, meta = state["tensors"], state["meta"]
        packer = {
            k.removeprefix("packer."): v for k, v in tensors.items() if k.startswith("packer.")
        }
        self._packer_state = {"tensors": packer, "meta": meta["packer"]}
        self._packer.load_state_dict(self._packer_state)
        self._free = torch.arange(len(self._pool), device=self._pool.device)
        self._free_count = len(self._pool)
        tokens, lengths = tensors["tokens"], tensors["lengths"]
        generations = []
        for saved in meta["generations"]:
            chunks = []
            for rows in saved["chunks"]:
                chunks.append(Chunk(tokens[:rows], lengths[:rows]))
                tokens, lengths = tokens[rows:], lengths[rows:]
            generation = self._generation(saved["index"], chunks)
            if len(generation.slots) != saved["activations"]:
                raise CheckpointError(
                    f"harvesting again gives {len(generation.slots)} activations instead of "
                    f"{saved['activations']}: the model, its precision or a library is not the one the run "
                    f"was started with; continue with those, or start anew under another --name"
                )
            generations.append(generation)
        self._older, self._newer = generations
        self._release(self._older.halves(self._seed)[0])
        self._begin_stage()
        self._position = meta["position"]
        self._release(self._order[: self._position])
        self.counts = Counts(**meta["counts"])


def _cat(tensors: list[Tensor], empty_shape: tuple[int, ...]) -> Tensor:
    return torch.cat(tensors) if tensors else torch.empty(empty_shape, dtype=torch.int32)
