"""Norms of activations: a few tokens can hold most of the variance. Which are outliers, and what is told of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ROWS = 8192
"""Activations that are looked at."""
FACTOR = 10.0
"""Norms beyond so many times the median are the tail that is told of."""
NOTABLE = 0.2
"""A tail that is kept, and holds more than this share of the variance, is warned of."""


class FirstNorms:
    """Tells once, in a line for each layer, what the norms of the first activations are.

    Args:
        names: what the layers are called.
        outlier_norm: the factor beyond which tokens are dropped; None if all are kept.
    """

    def __init__(self, names: Sequence[str], outlier_norm: float | None) -> None:
        self._names = names
        self._outlier_norm = outlier_norm
        self._seen: list[tuple[Tensor, ...]] | None = []

    def see(self, layers: Sequence[Tensor]) -> None:
        """Note ``[n, D]`` activations of each layer, before anything is dropped; waits for the device at
        most until enough were seen."""
        if self._seen is not None:
            self._seen.append(tuple(layer.float() for layer in layers))
            if sum(len(seen[0]) for seen in self._seen) >= ROWS:
                self.tell()

    def tell(self) -> None:
        """Say what was seen so far, if it was not said yet."""
        seen, self._seen = self._seen, None
        for name, rows in zip(self._names, zip(*(seen or ()), strict=True), strict=False):
            self._tell(name, torch.cat(rows))

    def _tell(self, name: str, x: Tensor) -> None:
        x = x[x.isfinite().all(dim=1)]
        if not len(x):
            return
        norms = x.norm(dim=1)
        median = norms.median()
        marks = torch.quantile(norms, norms.new_tensor([0.99, 0.999])).tolist()
        factor = self._outlier_norm or FACTOR
        tail = norms > factor * median
        squares = (x - x.mean(0)).square().sum(1)
        share = float(squares[tail].sum() / squares.sum().clamp_min(1e-30))
        line = (
            f"{name}: norms of the first {len(x):,} activations: median {median:.4g}, 99 % below "
            f"{marks[0]:.4g}, 99.9 % below {marks[1]:.4g}, largest {norms.max():.4g}"
        )
        level = logging.INFO
        if not tail.any():
            line += f"; none is above {factor:g} times the median"
        else:
            line += (
                f"; {int(tail.sum()):,} ({float(tail.double().mean()):.2%}) above {factor:g} times the "
                f"median hold {share:.0%} of the variance"
            )
            if self._outlier_norm is not None:
                line += ", and are dropped (--outlier-norm inf keeps them)"
            elif share > NOTABLE:
                level = logging.WARNING
                line += (
                    f", and are kept: the SAE will explain them at the cost of all others; "
                    f"--outlier-norm {FACTOR:g} drops them"
                )
        log.log(level, "%s", line)


def is_outlier(x: Tensor, factor: float) -> Tensor:
    """Which rows ``[n]`` of ``x [n, D]``, n at least 1, have more than ``factor`` times the median norm of
    the finite ones. Waits for no device."""
    norms = x.float().norm(dim=1)
    return norms > factor * torch.where(norms.isfinite(), norms, torch.nan).nanmedian()
