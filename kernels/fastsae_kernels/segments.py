"""Long segments, cut into chunks of at most ``CHUNK`` entries.

BatchTopK rows and columns are ragged: a token may hold thousands of latents, a latent thousands of
tokens. One program per segment would wait for the longest, so segments of more than ``CHUNK`` entries
are summed chunk by chunk, by programs of their own, into partial sums that are then added in order:
the same floats in the same order on every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import cdiv, jit, tl

CHUNK = 128
BLOCK = 1024  # segments of a program
BLOCK_BEFORE = 8192  # segments before them that it takes at a time


class LongSegments(NamedTuple):
    """Where the chunks of the long ones among ``n`` segments stand in an array of partial sums."""

    starts: Tensor  # [n + 1] int32: segment s owns chunks [starts[s], starts[s + 1]), none if short
    owners: Tensor  # [capacity] int32: the segment of each chunk; unset from starts[n] on


def chunk_capacity(entries: int) -> int:
    """How many chunks the long segments of ``entries`` entries can have at most.

    A segment of ``n > CHUNK`` entries has ``ceil(n / CHUNK) <= 2n / (CHUNK + 1)`` of them.
    """
    return 2 * entries // (CHUNK + 1)


@jit
def _chunks(offsets_ptr, segment, segments, CHUNK: tl.constexpr):
    """How many chunks each segment has; none those from ``segments`` on."""
    inside = segment < segments
    begin = tl.load(offsets_ptr + segment, mask=inside, other=0)
    length = tl.load(offsets_ptr + segment + 1, mask=inside, other=0) - begin
    return tl.where(length > CHUNK, (length + CHUNK - 1) // CHUNK, 0)


@jit
def long_segments_kernel(
    offsets_ptr, starts_ptr, owners_ptr,
    segments,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BEFORE: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` segments a program, which counts the chunks before them by itself: no program waits."""
    first = tl.program_id(0) * BLOCK
    before = tl.zeros((BLOCK_BEFORE,), tl.int32)
    for start in range(0, first, BLOCK_BEFORE):
        before += _chunks(offsets_ptr, start + tl.arange(0, BLOCK_BEFORE), first, CHUNK)
    segment = first + tl.arange(0, BLOCK)
    chunks = _chunks(offsets_ptr, segment, segments, CHUNK)
    start = tl.sum(before, 0) + tl.cumsum(chunks, 0) - chunks
    tl.store(starts_ptr + segment, start, mask=segment <= segments)
    for i in range(0, tl.max(chunks, 0)):
        tl.store(owners_ptr + start + i, segment, mask=i < chunks)


def long_segments(offsets: Tensor, entries: int) -> LongSegments:
    """The chunks of the long segments of ``offsets [n + 1]``, by Triton, without a synchronisation.

    ``entries`` is the static capacity of the arrays that ``offsets`` points into.
    """
    starts, owners = torch.empty_like(offsets), offsets.new_empty(max(chunk_capacity(entries), 1))
    # The end of the last segment stands where another one would start.
    long_segments_kernel[(cdiv(len(offsets), BLOCK),)](
        offsets_ptr=offsets, starts_ptr=starts, owners_ptr=owners,
        segments=len(offsets) - 1,
        CHUNK=CHUNK, BLOCK=BLOCK, BLOCK_BEFORE=BLOCK_BEFORE, num_warps=8,
    )  # fmt: skip
    return LongSegments(starts, owners)
