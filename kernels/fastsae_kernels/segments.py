"""Long segments, cut into chunks of at most ``CHUNK`` entries.

BatchTopK rows and columns are ragged: a token may hold thousands of latents, a latent thousands of
tokens. One program per segment would wait for the longest, so segments of more than ``CHUNK`` entries
are summed chunk by chunk, by programs of their own, into partial sums that are then added in order:
the same floats in the same order on every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import jit, tl

CHUNK = 128
SCAN_BLOCK = 1024


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
def long_segments_kernel(
    offsets_ptr, starts_ptr, owners_ptr,
    segments,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: the scan is short (one integer a segment) and a single launch.
    total = 0
    for first in range(0, segments, BLOCK):
        segment = first + tl.arange(0, BLOCK)
        inside = segment < segments
        begin = tl.load(offsets_ptr + segment, mask=inside, other=0)
        end = tl.load(offsets_ptr + segment + 1, mask=inside, other=0)
        chunks = tl.where(end - begin > CHUNK, (end - begin + CHUNK - 1) // CHUNK, 0)
        start = total + tl.cumsum(chunks, 0) - chunks
        tl.store(starts_ptr + segment, start, mask=inside)
        for i in range(0, tl.max(chunks, 0)):
            tl.store(owners_ptr + start + i, segment, mask=i < chunks)
        total += tl.sum(chunks, 0)
    tl.store(starts_ptr + segments, total)


def long_segments(offsets: Tensor, entries: int) -> LongSegments:
    """The chunks of the long segments of ``offsets [n + 1]``, by Triton, without a synchronisation.

    ``entries`` is the static capacity of the arrays that ``offsets`` points into.
    """
    starts, owners = torch.empty_like(offsets), offsets.new_empty(max(chunk_capacity(entries), 1))
    long_segments_kernel[(1,)](
        offsets_ptr=offsets, starts_ptr=starts, owners_ptr=owners,
        segments=len(offsets) - 1,
        CHUNK=CHUNK, BLOCK=SCAN_BLOCK,
    )  # fmt: skip
    return LongSegments(starts, owners)
