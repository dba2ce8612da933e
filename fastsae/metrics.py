"""Feature density: on how many tokens each latent is active, as one histogram wherever it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def density_edges(decades: int) -> tuple[float, ...]:
    """Edges of quarter decades, in log10 of a share of tokens, from ``-decades`` to 0."""
    return tuple(-decades + i / 4 for i in range(4 * decades + 1))


DENSITY_EDGES = density_edges(5)
"""Of the ``density_histogram`` of ``metrics.jsonl``, whose lines are about 1e5 tokens apart."""


def density_histogram(
    fired: Tensor, tokens: int, edges: Sequence[float] = DENSITY_EDGES
) -> list[int]:
    """How many latents were active on which share of ``tokens``; silent ones are in no bin.

    Args:
        fired: ``[F]``, the tokens that each latent was active on.
        edges: equally wide bins in log10 of the share.

    Returns:
        Counts between the ``edges``; the first bin takes in what lies below it, the last one 1.
    """
    share = fired[fired > 0].double() / max(tokens, 1)
    bins = len(edges) - 1
    width = (edges[-1] - edges[0]) / bins
    index = ((share.log10() - edges[0]) / width).floor().clamp(0, bins - 1)
    return torch.bincount(index.long(), minlength=bins).tolist()
