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


def harvest(model: LanguageModel, chunk: Chunk, counts: Counts) -> tuple[Tensor, ...]:
    """The activations of a chunk after each hooked layer, ``[m, D]`` in the model's dtype.

    Rows are in order of row and position, and belong to the same tokens in every layer. Padding and
    special tokens are left out, and so are tokens whose activation is not finite in some layer;
    ``counts`` is added to. Raises StreamError if there was text and nothing of it is finite.
    """
    tokens = chunk.tokens.to(model.device, torch.int64)
    residuals = model.residuals(tokens)
    text = torch.arange(tokens.shape[1]) < chunk.lengths[:, None]
    special = torch.isin(tokens, model.special_ids)
    wanted = text.to(model.device) & ~special
    activations = tuple(residual[wanted] for residual in residuals)
    finite = torch.stack([rows.isfinite().all(dim=1) for rows in activations]).all(dim=0)
    n_wanted, n_finite = len(finite), int(finite.sum())
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
            f"no activation of layer {_list(model.layers)} of {model.name} is finite ({n_wanted} rows, "
            f"{model.dtype}, quantization {model.quantization}): the model overflows; {advice}"
        )
    return activations if n_finite == n_wanted else tuple(rows[finite] for rows in activations)


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


def activations(
    model: LanguageModel, rows: Chunk, harvest_batch: int, count: int
) -> tuple[Tensor, ...]:
    """The first ``count`` activations of ``rows`` (fewer if some are not finite), ``[n, D]`` float32
    for each layer."""
    found = [harvest(model, chunk, Counts()) for chunk in rows.split(harvest_batch)]
    return tuple(torch.cat(layer)[:count].float() for layer in zip(*found, strict=True))


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
        self._pools = [
            torch.empty(slots, model.d_model, dtype=dtype, device=model.device)
            for _ in model.layers
        ]
        self._free = torch.arange(slots, device=model.device)
        self._free_count = slots
        self._packer_state = packer.state_dict()  # after the last live chunk
        self._older = self._newer = self._generation(0, [])  # the first real one is generation 1
        self._order = self._newer.slots
        self._position = 0

    # --- serving ---

    def next_batch(self) -> tuple[Tensor, ...] | None:
        """The next ``[batch_size, D]`` activations in float32, for each layer; fewer in the last batch;
        then None. The same row is the same token in every layer."""
        parts: list[tuple[Tensor, ...]] = []
        missing = self._batch_size
        while missing:
            if self._position == len(self._order):
                if not self._next_stage():
                    break
                continue  # a stage may be empty
            slots = self._order[self._position : self._position + missing]
            parts.append(tuple(pool[slots] for pool in self._pools))
            self._release(slots)
            self._position += len(slots)
            missing -= len(slots)
        if not parts:
            return None
        return tuple(torch.cat(layer).float() for layer in zip(*parts, strict=True))

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
        count = len(rows[0])
        self._free_count -= count
        slots = self._free[self._free_count : self._free_count + count].clone()
        for pool, layer in zip(self._pools, rows, strict=True):
            pool[slots] = layer.to(pool.dtype)
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
        self._free = torch.arange(len(self._pools[0]), device=self._free.device)
        self._free_count = len(self._free)
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


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _cat(tensors: list[Tensor], empty_shape: tuple[int, ...]) -> Tensor:
    return torch.cat(tensors) if tensors else torch.empty(empty_shape, dtype=torch.int32)
