"""The histogram of feature densities."""

from __future__ import annotations

import torch

from fastsae.metrics import DENSITY_EDGES, density_edges, density_histogram


def test_density_histogram_counts_latents() -> None:
    tokens = 100_000
    fired = torch.tensor([0, 1, 100_000, 17_782, 17_783, 100, 101, 0])
    counts = density_histogram(fired, tokens)
    assert len(counts) == len(DENSITY_EDGES) - 1 == 20 and sum(counts) == 6
    expected = [0] * 20
    expected[0] = 1  # 1e-5
    expected[8] = 2  # 1e-3 and a little more
    expected[16] = 1  # 10^-0.75 lies between 17,782 and 17,783
    expected[17] = 1
    expected[19] = 1  # every token
    assert counts == expected
    assert density_histogram(torch.tensor([1]), 10**7)[0] == 1  # below all edges


def test_finer_densities_need_more_edges() -> None:
    fired, tokens = torch.tensor([0, 1, 10**7, 5 * 10**6]), 10**7
    counts = density_histogram(fired, tokens, density_edges(8))
    assert len(counts) == 32 and counts[4] == 1 and counts[-1] == 1 and counts[-2] == 1
    # The same bins where both reach.
    assert density_histogram(fired, tokens)[1:] == counts[13:]
