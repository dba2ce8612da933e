"""Numbers with an uncertainty: sums by document, and the bootstrap over documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REPLICATES = 1000
LEVEL = 0.95


class Estimate(float):
    """A number that knows its 95 % interval: ``low`` and ``high``, None where there is none."""

    low: float | None
    high: float | None

    def __new__(cls, value: float, low: float | None = None, high: float | None = None) -> Estimate:
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = low, high
        return estimate

    def __reduce__(self) -> tuple[Any, ...]:
        return Estimate, (float(self), self.low, self.high)

    def to_json(self) -> dict[str, float | None]:
        return {"value": float(self), "low": self.low, "high": self.high}


class DocumentSums:
    """Named sums over tokens, one of each for every document; float64, on the CPU.

    Tokens of a document depend on each other, documents do not: so documents are what the bootstrap
    draws. Memory is one number per name and document.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._documents = 0

    def add(self, documents: Tensor, **values: Tensor) -> None:
        """Add ``values [n]`` to the sums of ``documents [n]`` (int64)."""
        if not len(documents):
            return
        self._documents = max(self._documents, int(documents.max()) + 1)
        for name, value in values.items():
            sums = self[name] if name in self._sums else torch.zeros(0, dtype=torch.float64)
            if len(sums) < self._documents:
                # Twice as long as needed, so that growing costs little in the long run.
                sums = torch.cat([sums, sums.new_zeros(2 * self._documents - len(sums))])
            sums.index_add_(0, documents.cpu(), value.to("cpu", torch.float64))
            self._sums[name] = sums

    def __getitem__(self, name: str) -> Tensor:
        """``[documents]``: the sum of each."""
        return self._sums[name]

    def estimate(self, formula: Callable[..., Tensor], *names: str) -> Estimate:
        """``formula`` of the totals of ``names``, with the percentile interval of the bootstrap.

        ``formula`` takes and gives tensors, elementwise over replicates. Documents without a token
        in any of the sums are left out. With fewer than two documents there is no interval.
        """
        length = max(len(self._sums[name]) for name in names)
        table = torch.stack([_padded(self._sums[name], length) for name in names], dim=1)
        table = table[(table != 0).any(dim=1)]
        value = formula(*table.sum(0))
        if len(table) < 2:
            return Estimate(float(value))
        replicates = formula(*resampled_totals(table).unbind(1))
        tail = (1 - LEVEL) / 2
        low, high = replicates.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return Estimate(float(value), float(low), float(high))


def resampled_totals(table: Tensor, replicates: int = REPLICATES, seed: int = 0) -> Tensor:
    """``[replicates, names]``: totals of as many rows of ``table`` as it has, drawn with replacement.

    The draws follow from ``seed`` alone, so quantities of the same documents share their draws.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.empty(replicates, table.shape[1], dtype=torch.float64)
    for i in range(replicates):
        drawn = torch.randint(len(table), (len(table),), generator=generator)
        totals[i] = torch.bincount(drawn, minlength=len(table)).double() @ table
    return totals


def _padded(sums: Tensor, length: int) -> Tensor:
    return torch.cat([sums, sums.new_zeros(length - len(sums))])
