"""Mean and covariance of activations as they stream by, and the PCA baseline that follows from them."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningCovariance:
    """Count, mean and scatter matrix of the tokens of even and of odd documents; float64.

    Memory is two ``[D, D]`` matrices, however many tokens there are.
    """

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        self._count = [0, 0]
        # About a point near the mean, so that nothing cancels where the mean is far from zero.
        self._shift: Tensor | None = None
        self._sum = torch.zeros(2, d_in, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(2, d_in, d_in, dtype=torch.float64, device=device)

    def add(self, x: Tensor, documents: Tensor) -> None:
        """Take in activations ``x [n, D]`` of ``documents [n]``."""
        if not len(x):
            return
        x = x.double()
        if self._shift is None:
            self._shift = x.mean(0)
        for half in (0, 1):
            rows = x[(documents % 2 == half).to(x.device)] - self._shift
            self._count[half] += len(rows)
            self._sum[half] += rows.sum(0)
            self._scatter[half] += rows.T @ rows

    @property
    def count(self) -> int:
        """Tokens seen."""
        return sum(self._count)

    @property
    def mean(self) -> Tensor:
        """``[D]`` float64: the mean over all tokens."""
        assert self._shift is not None, "no activations"
        return self._sum.sum(0) / self.count + self._shift

    @property
    def total_variance(self) -> float:
        """``Σ‖x - x̄‖²`` over all tokens, x̄ their mean."""
        offset = self._sum.sum(0) / self.count
        return float(self._scatter.sum(0).trace() - self.count * offset.square().sum())

    def pca_explained_variance(self, components: int) -> float | None:
        """Explained variance of PCA with ``components`` directions; None with fewer than two documents.

        Fitted and scored on different rows: mean and directions of the even documents reconstruct the
        odd ones, and the other way round; the errors are added, and divided by the variance of all.
        """
        if 0 in self._count or self.total_variance <= 0:
            return None
        error = 0.0
        for fitted, scored in ((0, 1), (1, 0)):
            mean = self._sum[fitted] / self._count[fitted]
            covariance = self._about(fitted, mean)
            directions = torch.linalg.eigh(covariance)[1][:, -components:]
            scatter = self._about(scored, mean)
            error += float(scatter.trace() - (directions * (scatter @ directions)).sum())
        return 1 - error / self.total_variance

    def _about(self, half: int, point: Tensor) -> Tensor:
        """``Σ (x - point)(x - point)ᵀ`` of one half; ``point`` is relative to the shift."""
        cross = torch.outer(self._sum[half], point)
        return self._scatter[half] - cross - cross.T + self._count[half] * torch.outer(point, point)
