"""Passages on which each latent is active, gathered while text streams by; memory does not grow with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...lm.held_out import Batch

BEFORE, AFTER = 18, 9
"""Tokens of a passage before and after its peak."""
BINS = 64
"""Bins of a latent's activation histogram, each half an octave wide."""
_GRID = 2**25  # entries of a dense [rows, tokens, F] grid: 128 MB


class Passages:
    """Keeps ``count`` passages for every latent: those with the largest keys so far.

    ``rows``, ``positions`` ``[F, count]`` int64 tell where the peak is, ``windows [F, count, W]`` the
    activations around it, from ``BEFORE`` tokens before to ``AFTER`` after; ``keys`` is -inf where
    there is no passage.
    """

    def __init__(self, d_sae: int, count: int, device: torch.device) -> None:
        shape = (d_sae, count)
        self.keys = torch.full(shape, -math.inf, device=device)
        self.rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.rows)
        self.windows = torch.zeros(*shape, BEFORE + 1 + AFTER, device=device)

    def update(self, keys: Tensor, positions: Tensor, first: int, grid: Tensor) -> None:
        """Compete with the passages of rows ``first``, ``first + 1``, ...: ``keys [F, r]``.

        ``positions [F, r]`` are their peaks; ``grid [r, BEFORE + t + AFTER, F]`` the activations.
        """
        count = self.keys.shape[1]
        rows = torch.arange(first, first + keys.shape[1], device=keys.device).expand_as(keys)
        self.keys, source = torch.cat([self.keys, keys], 1).topk(count, dim=1)
        self.rows = torch.cat([self.rows, rows], 1).gather(1, source)
        self.positions = torch.cat([self.positions, positions], 1).gather(1, source)
        width = self.windows.shape[2]
        kept = source.clamp(max=count - 1)[..., None].expand(-1, -1, width)
        self.windows = self.windows.gather(1, kept)
        latent, slot = ((source >= count) & self.keys.isfinite()).nonzero(as_tuple=True)
        row = source[latent, slot] - count
        column = self.positions[latent, slot][:, None] + torch.arange(width, device=keys.device)
        self.windows[latent, slot] = grid[row[:, None], column, latent[:, None]]


class Collector:
    """What the dashboard shows of every latent, as an observer of :func:`fastsae.evaluate`.

    At most one passage a row is taken for each latent, at its largest activation there: ``top`` are
    those with the largest, ``random`` some at random, which show what the top alone hides.

    Args:
        d_sae: number of latents F.
        top, random: passages to keep of each kind.
    """

    def __init__(
        self, d_sae: int, device: torch.device | str = "cpu", top: int = 10, random: int = 4
    ) -> None:
        device = torch.device(device)
        self.d_sae = d_sae
        self.top = Passages(d_sae, top, device)
        self.random = Passages(d_sae, random, device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.max = torch.zeros(d_sae, device=device)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        """``[F, BINS]``: activations in ``[2^((lowest + i) / 2), 2^((lowest + i + 1) / 2))``; what is
        outside is in the first or the last bin."""
        self.lowest: int | None = None
        self.tokens = 0
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, batch: Batch, measured: Tensor, x: Tensor, z: Tensor) -> None:
        self.tokens += len(z)
        self.fired += (z > 0).sum(0)
        self.sum += z.sum(0, dtype=torch.float64)
        self.max = torch.maximum(self.max, z.amax(0).to(self.max.dtype))
        self._count(z)
        measured = measured.to(z.device)
        n, t = measured.shape
        step = max(1, _GRID // ((BEFORE + t + AFTER) * self.d_sae))
        taken = 0
        for start in range(0, n, step):
            inside = measured[start : start + step]
            grid = z.new_zeros(len(inside), BEFORE + t + AFTER, self.d_sae)
            count = int(inside.sum())
            grid[:, BEFORE : BEFORE + t][inside] = z[taken : taken + count]
            taken += count
            peaks, positions = grid[:, BEFORE : BEFORE + t].max(dim=1)
            peaks, positions = peaks.T.float(), positions.T
            active = peaks > 0
            chance = torch.rand(peaks.shape, generator=self._generator, device=z.device)
            first = batch.first + start
            self.top.update(peaks.where(active, -math.inf), positions, first, grid)
            self.random.update(chance.where(active, -math.inf), positions, first, grid)

    def _count(self, z: Tensor) -> None:
        token, latent = (z > 0).nonzero(as_tuple=True)
        if not len(token):
            return
        half_octaves = (2 * z[token, latent].float().log2()).floor().long()
        if self.lowest is None:
            self.lowest = int(half_octaves.max()) + 8 - BINS
        bins = (half_octaves - self.lowest).clamp(0, BINS - 1)
        counts = torch.bincount(latent * BINS + bins, minlength=self.d_sae * BINS)
        self.histogram += counts.view(self.d_sae, BINS)
