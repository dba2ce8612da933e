"""TopK over a whole batch whose latents are in shards, exactly, from each shard's own selection.

The order is that of :mod:`.selection`, with the latents numbered through all shards; the result is
:func:`batch_topk`'s of the shards' pre-activations side by side. A shard's own selection, of the whole
budget ``K`` and the same quota, holds all that may be selected of it: the shard's part of the peaks ``P``
that come first is among the peaks that come first in the shard, which are at most ``|P|``; so beside them
it holds its ``K - |P|`` largest others at least. It holds the peak of each latent of which it holds an
entry, since the peak stands before the latent's other entries; so peaks are known without ``pre``.

Which of all candidates are the n first is found digit by digit: of the value's bits, 15 or 16 at a time,
then of the place, token and shard. How often a digit has each value is counted, added over the processes, and
those with the value that the n-th candidate has are looked at further. What is left in the end stands in
one row of one shard, in order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dtypes import accumulator, upcast
from .selection import check_quota, check_slots
from .sparse import CSR

Level = tuple[Tensor, int]
"""A digit of each entry, ``[n]``, ascending in the order, and how many values it may have."""


def select_across(
    selections: Sequence[CSR],
    hosted: range,
    latents: Sequence[int],
    budget: int,
    quota: float = 0,
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    add: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> tuple[list[CSR], Tensor]:
    """The ``budget`` largest of all shards' entries, each hosted shard's part, and the threshold.

    ``selections`` are, for each of the ``hosted`` shards, the CSR of its ``batch_topk`` or
    ``encode_batch_topk`` with this very budget and quota; ``latents`` are the widths of all shards.
    The budget is clamped to ``[0, B * F]``. ``tokens`` (B), ``dtype`` and ``device`` are those of the
    selections, of which a process may have none. The parts have as many slots as the selections; the
    threshold is float32 ``[]``, the smallest selected value, peaks aside; +inf where there is none.

    ``add`` adds an integer tensor over the processes, in place, and returns it; all of them call this at
    the same place. Added are, whatever the data, int32 histograms of 2^15, 2^16, B + 1 and S counts, one
    after another: 393 KB and 4 B a token (float64: 2^15, three times 2^16, B + 1 and S). With
    ``int(quota * K)`` from 1 to F - 1 all of them come twice; from F on one int64 comes before them.

    Not differentiable. Deterministic; never waits for the device. Raises ValueError for a quota that is
    no share, selections that are not the hosted shards', more entries than 32 bits count.
    """
    check_quota(quota, "select_across")
    budget = min(max(budget, 0), tokens * sum(latents))
    check_slots(sum(min(budget, tokens * width) for width in latents), "select_across")
    most_peaks = int(quota * budget)
    shards = list(zip(hosted, selections, strict=True))
    integer = torch.int64 if accumulator(dtype) == torch.float64 else torch.int32
    largest = torch.iinfo(integer).max
    shifts = range(torch.iinfo(integer).bits - 16, -1, -16)

    def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([torch.empty(0, dtype=dtype, device=device), *parts])

    # The bits of positive floats order as the values do; 0 in the slots that hold no entry.
    keys = joined([upcast(csr.values).view(integer) for csr in selections], integer)
    levels = [
        ((largest - keys) >> shift & 0xFFFF, min(largest >> shift, 0xFFFF) + 1) for shift in shifts
    ]
    token = joined([csr.tokens() for csr in selections], torch.int64)
    shard = joined([torch.full_like(csr.indices, number) for number, csr in shards], torch.int32)
    levels += [(token, tokens + 1), (shard, len(latents))]

    others = keys > 0
    selected = torch.zeros_like(others)
    peaks = torch.zeros(1, dtype=torch.int64, device=device)
    if most_peaks:
        selected = joined([_peaks(csr, latents[number]) for number, csr in shards], torch.bool)
        if most_peaks < sum(latents):
            selected, peaks, _ = _first(levels, selected, peaks + most_peaks, add)
        else:
            peaks = add(selected.sum(0, keepdim=True))
        others = others & ~selected
    others, found, last = _first(levels, others, budget - peaks, add)
    smallest = torch.full_like(found, largest)
    for digit, shift in zip(last, shifts, strict=False):
        smallest -= digit << shift
    value = smallest.to(integer).view(accumulator(dtype)).float()
    threshold = torch.where(found > 0, value, torch.inf).squeeze(0)
    parts = (selected | others).split([len(csr.values) for csr in selections])
    return [_keep(csr, part) for csr, part in zip(selections, parts, strict=True)], threshold


def _peaks(csr: CSR, latents: int) -> Tensor:
    """Mask ``[K]`` of the largest entry of each latent; of equal ones, the first token's."""
    latent, slots = csr.indices.long(), len(csr.values)
    largest = csr.values.new_zeros(latents).scatter_reduce(0, latent, csr.values, "amax")
    level = (csr.values > 0) & (csr.values == largest[latent])
    slot = torch.where(level, torch.arange(slots, device=latent.device), slots)
    first = slot.new_full((latents,), slots).scatter_reduce(0, latent, slot, "amin")
    return level & (slot == first[latent])


def _first(
    levels: Sequence[Level], candidates: Tensor, most: Tensor, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mask of the ``most`` ``[1]`` candidates that stand first among those of all processes; how many
    there are, ``[1]``; the digits of the last one."""
    chosen, last = torch.zeros_like(candidates), []
    before = torch.zeros_like(most)
    for digit, values in levels:
        counts = torch.zeros(values, dtype=torch.int32, device=digit.device)
        counts = add(counts.index_add_(0, digit, candidates.int()))
        through = before + pad(counts.cumsum(0), (1, 0))
        most = torch.minimum(most, through[-1:])
        # The first digit that has the last candidate, or the first of all where none is wanted.
        edge = torch.searchsorted(through[1:], most)
        chosen |= candidates & (digit < edge)
        candidates = candidates & (digit == edge)
        before = through.gather(0, edge)
        last.append(edge)
    return chosen | (candidates & (candidates.cumsum(0) <= most - before)), most, last


def _keep(csr: CSR, kept: Tensor) -> CSR:
    """The ``kept`` entries alone, in as many slots."""
    before = pad(kept.cumsum(0, dtype=torch.int32), (1, 0))
    # What is not kept goes to a place behind the last, which is cut off.
    place = torch.where(kept, before[:-1], len(kept)).long()
    values, indices = (
        slots.new_zeros(len(kept) + 1).scatter_(0, place, slots)[:-1]
        for slots in (csr.values, csr.indices)
    )
    return CSR(values, indices, before[csr.offsets])
