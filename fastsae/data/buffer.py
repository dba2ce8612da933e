"""Activations mixed across documents, served in batches.

Activations are harvested in *chunks* (one forward pass each), and chunks are grouped into
*generations* of half a pool. A generation is split at random into two halves: stage g serves, in
random order, the second half of generation g - 1 and the first half of generation g. So a batch
mixes the documents of a whole pool, and no activation outlives two generations.

That serves each activation once. To serve it ``reuse`` times, the pool holds ``reuse + 1`` generations,
each split into as many parts, of which each of its stages leaves another one out: so every time an
activation is among others.

On CUDA, generation g + 1 is harvested while stage g is served, chunk by chunk, on a stream of its own:
the language model and the training step share the device. On a CPU they share the cores, and a
generation is harvested when it is needed.

The order follows from the seed, the generation's number and the position within the stage alone.
That makes the state small: the chunks of the live generations (their token ids), from which exactly
those activations are harvested again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..progress import progress
from .harvest import KEPT, NONFINITE, OUTLIER, ChunkSource, to_device


@dataclass
class Counts:
    """Activations kept, and those dropped: at special tokens, not finite, of outlying norm."""

    harvested: int = 0
    special: int = 0
    nonfinite: int = 0
    outliers: int = 0


@dataclass
class _Generation:
    index: int
    chunks: list[Any] = field(default_factory=list)
    # Of each chunk until the generation is settled: slots, what to drop of them, special tokens.
    pending: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Of each kept row, in order of chunk and row."""

    def parts(self, seed: int, count: int) -> list[Tensor]:
        """Its slots, split at random; in the stage with ``age`` generations after it part
        ``count - 1 - age`` is left out."""
        order = _permutation(len(self.slots), seed, self.index, 0)
        return [self.slots[part] for part in order.tensor_split(count)]


class Moment(NamedTuple):
    """All that a state speaks of. Cheap, for it is taken before every batch: nothing is copied."""

    chunks: list[Any]
    source: dict[str, Tensor]
    meta: dict[str, Any]


def _permutation(n: int, *seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


class ActivationBuffer:
    """Serves batches of mixed activations; its state makes the next batch the same, bit for bit.

    ``pool_tokens`` is how many activations are mixed with each other, and kept on the source's device
    in ``dtype`` for each site; it is rounded to ``reuse + 1`` generations of at least two whole chunks.
    Each activation is served ``reuse`` times.
    ``ahead`` says whether to harvest while serving: on CUDA unless given. ``beside`` is the CUDA stream of the
    harvests, one of its own unless given: memory that one buffer's have worked in is there for another's.

    ``counts`` and ``harvest_seconds`` grow as the stream is read. On CUDA the latter is the time this
    thread spent on launching harvests and waiting for them.
    """

    def __init__(
        self,
        source: ChunkSource,
        *,
        batch_size: int,
        pool_tokens: int,
        seed: int,
        reuse: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        ahead: bool | None = None,
        beside: torch.cuda.Stream | None = None,
    ) -> None:
        self._ages = reuse + 1
        self.chunks_per_generation = max(2, round(pool_tokens / (self._ages * source.chunk_tokens)))
        self.counts = Counts()
        self.harvest_seconds = 0.0
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        cuda = source.device.type == "cuda"
        self._ahead = cuda if ahead is None else ahead
        self.beside = beside or (torch.cuda.Stream(source.device) if cuda else None)
        if self.beside is not None:  # what was done to the model's weights must have been done
            self.beside.wait_stream(torch.cuda.current_stream(source.device))
        # All generations are live when a stage begins, but for a part of the oldest. The next one needs
        # no more room at any moment than what is left and what was let go until then.
        slots = self._ages * self.chunks_per_generation * source.chunk_tokens
        self._pools = [
            torch.empty(slots, width, dtype=dtype, device=source.device) for width in source.widths
        ]
        self._free = torch.arange(slots)
        self._free_count = slots
        # The first generation with activations is number 1.
        self._live = [_Generation(0) for _ in range(self._ages)]  # the oldest first
        self._next = _Generation(1)
        self._begin_stage()
        self._unserved: Moment | None = None  # before the batch that is being served

    # --- serving ---

    def next_batch(self) -> tuple[Tensor, ...] | None:
        """The next ``[batch_size, D]`` activations in float32, for each layer; fewer in the last batch;
        then None. The same row is the same token in every layer.

        Where the source raises, the state is that before the batch, to be loaded into another buffer.
        """
        self._unserved = self.moment()
        batch = self._serve()
        self._unserved = None
        return batch

    def _serve(self) -> tuple[Tensor, ...] | None:
        parts: list[tuple[Tensor, ...]] = []
        missing = self._batch_size
        while missing:
            if self._position == len(self._order):
                if not self._next_stage():
                    break
                continue  # a stage may be empty
            if self._ahead:
                self._harvest_ahead()
            end = min(self._position + missing, len(self._order))
            slots = self._order_on_device[self._position : end]
            parts.append(tuple(pool.index_select(0, slots) for pool in self._pools))
            missing -= end - self._position
            self._let_go(end)
        if not parts:
            return None
        return tuple(torch.cat(layer).float() for layer in zip(*parts, strict=True))

    def _next_stage(self) -> bool:
        """Move on by a generation; False when everything there is was used up."""
        missing = self.chunks_per_generation - len(self._next.chunks)
        with progress("filling the pool", missing * self._source.chunk_tokens) as advance:
            while len(self._next.chunks) < self.chunks_per_generation and self._harvest_one():
                advance(self._source.chunk_tokens)
        if not self._next.chunks and not any(live.chunks for live in self._live[1:]):
            return False
        self._settle(self._next)
        self._live = [*self._live[1:], self._next]
        self._next = _Generation(self._next.index + 1)
        self._begin_stage()
        return True

    def _begin_stage(self) -> None:
        served, last = [], []
        for left_out, generation in enumerate(self._live):
            for i, part in enumerate(generation.parts(self._seed, self._ages)):
                if i != left_out:
                    served.append(part)
                    # The oldest are not served again, nor what the next stage leaves out.
                    ends = left_out == 0 or (left_out, i) == (1, 0)
                    last.append(torch.full(part.shape, ends))
        permutation = _permutation(sum(map(len, served)), self._seed, self._live[-1].index, 1)
        self._order, self._last = torch.cat(served)[permutation], torch.cat(last)[permutation]
        self._order_on_device = to_device(self._order, self._source.device)
        self._position = self._gone = 0
        self._going = int(self._last.sum())

    def _let_go(self, end: int) -> None:
        """Of what this stage has served until ``end``, free what is not served again."""
        done = slice(self._position, end)
        gone = self._order[done][self._last[done]]
        self._release(gone)
        self._gone += len(gone)
        self._position = end

    # --- harvesting ---

    def _harvest_ahead(self) -> None:
        """As much of the next generation as was let go of this stage's, a chunk at a time."""
        done = len(self._next.chunks)
        due = done * self._going <= self._gone * self.chunks_per_generation
        if due and done < self.chunks_per_generation:
            self._harvest_one()

    def _harvest_one(self) -> bool:
        chunk = self._source.draw()
        if chunk is not None:
            self._harvest(chunk, self._next)
        return chunk is not None

    def _harvest(self, chunk: Any, generation: _Generation) -> None:
        """Put the chunk's activations into free slots of the pool."""
        start = time.perf_counter()
        beside, training = self.beside, None
        if beside is not None:
            training = torch.cuda.current_stream(self._source.device)
        with nullcontext() if beside is None else torch.cuda.stream(beside):
            harvest = self._source.harvest(chunk)
            count = len(harvest.verdict)
            self._free_count -= count
            slots = self._free[self._free_count : self._free_count + count].clone()
            if beside is not None and training is not None:
                beside.wait_stream(training)  # what was served from these slots must have been read
            on_device = to_device(slots, self._source.device)
            for pool, layer in zip(self._pools, harvest.layers, strict=True):
                pool.index_copy_(0, on_device, layer.to(pool.dtype))
            verdict = harvest.verdict.to("cpu", non_blocking=True)
        generation.chunks.append(chunk)
        generation.pending.append((slots, verdict, harvest.special))
        self.harvest_seconds += time.perf_counter() - start

    def _settle(self, generation: _Generation) -> None:
        """Wait for a generation's harvest, and let go of the rows that are dropped."""
        start = time.perf_counter()
        if self.beside is not None:
            self.beside.synchronize()
        kept = []
        if generation.pending:
            self._source.require_mostly_finite(torch.cat([v for _, v, _ in generation.pending]))
        for slots, verdict, special in generation.pending:
            keep = verdict == KEPT
            nonfinite = int((verdict == NONFINITE).sum())
            if len(verdict) and nonfinite == len(verdict):
                raise self._source.explain(verdict)
            self.counts.harvested += int(keep.sum())
            self.counts.special += special
            self.counts.nonfinite += nonfinite
            self.counts.outliers += int((verdict == OUTLIER).sum())
            kept.append(slots[keep])
            self._release(slots[~keep])
        generation.slots = torch.cat([generation.slots, *kept])
        generation.pending = []
        self.harvest_seconds += time.perf_counter() - start

    def _release(self, slots: Tensor) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    # --- state ---

    def moment(self) -> Moment:
        """What a state taken now speaks of."""
        live = (*self._live, self._next)
        source = self._source.state_dict()
        meta = {
            "position": self._position,
            "generations": [
                {"index": g.index, "chunks": len(g.chunks), "activations": len(g.slots)}
                for g in live
            ],
            "counts": dict(vars(self.counts)),
            "source": source["meta"],
        }
        return Moment([chunk for g in live for chunk in g.chunks], source["tensors"], meta)

    def state_dict(self, at: Moment | None = None) -> dict[str, dict[str, Any]]:
        """``tensors``: the live chunks and what the source needs; ``meta``: plain numbers for JSON. Of now,
        unless ``at`` is given."""
        chunks, source, meta = at or self._unserved or self.moment()
        tensors = {f"source.{name}": tensor for name, tensor in source.items()}
        return {"tensors": {**self._source.pack(chunks), **tensors}, "meta": meta}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Harvest the live chunks of ``state`` again, and go on with the batch that came next.

        Raises CheckpointError if they do not give as many activations as they did.
        """
        tensors, meta = state["tensors"], state["meta"]
        prefix = "source."
        source = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self._source.load_state_dict({"tensors": source, "meta": meta["source"]})
        chunks = iter(self._source.unpack(tensors))
        self._free = torch.arange(len(self._free))
        self._free_count = len(self._free)
        *self._live, self._next = (_Generation(g["index"]) for g in meta["generations"])
        *live, ahead = meta["generations"]
        for i, (generation, saved) in enumerate(zip(self._live, live, strict=True)):
            self._harvest_again(generation, saved, chunks)
            if i == 0:  # the part that the oldest's last stage leaves out
                self._release(generation.parts(self._seed, self._ages)[0])
        self._begin_stage()
        self._let_go(meta["position"])
        for _ in range(ahead["chunks"]):
            self._harvest(next(chunks), self._next)
        self.counts = Counts(**meta["counts"])
        self._unserved = None

    def _harvest_again(
        self, generation: _Generation, saved: dict[str, int], chunks: Iterator[Any]
    ) -> None:
        total = saved["chunks"] * self._source.chunk_tokens
        with progress("filling the pool again", total) as advance:
            for _ in range(saved["chunks"]):
                self._harvest(next(chunks), generation)
                advance(self._source.chunk_tokens)
        self._settle(generation)
        if len(generation.slots) != saved["activations"]:
            raise CheckpointError(
                f"harvesting again gives {len(generation.slots)} activations instead of "
                f"{saved['activations']}: the model, its precision or a library is not the one the run "
                f"was started with; continue with those, or start anew under another --name"
            )
