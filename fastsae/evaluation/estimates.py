"""Numbers with an uncertainty: sums by document, and the bootstrap over documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

REPLICATES = 1000  # of the bootstrap
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


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The commonest formula of an estimate."""
    return part / whole


class DocumentSums:
    """Named sums over tokens, one of each for every document; float64, on the CPU.

    Tokens of a document depend on each other, documents do not: so documents are what the bootstrap
    draws. Memory is one number per name and document.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, documents: Tensor, **values: Tensor) -> None:
        """Add ``values [n]`` to the sums of ``documents [n]`` (int64)."""
        if not len(documents):
            return
        count = int(documents.max()) + 1
        for name, value in values.items():
            sums = self._sums.get(name, torch.zeros(0, dtype=torch.float64))
            if len(sums) < count:
                # Twice as long as needed, so that growing costs little in the long run.
                sums = torch.cat([sums, sums.new_zeros(2 * count - len(sums))])
            sums.index_add_(0, documents.cpu(), value.to("cpu", torch.float64))
            self._sums[name] = sums

    def estimate(self, formula: Callable[..., Tensor], *names: str) -> Estimate:
        """``formula`` of the totals of ``names``, with the percentile interval of the bootstrap.

        ``formula`` takes and gives tensors, elementwise over replicates. Documents without a token
        in any of the sums are left out. With fewer than two documents there is no interval; with none
        the value is that of the formula for zeros, NaN for a ratio.
        """
        none = torch.zeros(0, dtype=torch.float64)
        table = pad_sequence([self._sums.get(name, none) for name in names])
        table = table[(table != 0).any(dim=1)]
        value = formula(*table.sum(0))
        if len(table) < 2:
            return Estimate(float(value))
        replicates = formula(*_resampled_totals(table).unbind(1))
        tail = (1 - LEVEL) / 2
        low, high = replicates.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return Estimate(float(value), float(low), float(high))


def _resampled_totals(table: Tensor) -> Tensor:
    """``[REPLICATES, names]``: totals of as many rows of ``table`` as it has, drawn with replacement.

    The draws are the same in every call, so quantities of the same documents share their draws.
    """
    generator = torch.Generator().manual_seed(0)
    totals = torch.empty(REPLICATES, table.shape[1], dtype=torch.float64)
    for i in range(REPLICATES):
        drawn = torch.randint(len(table), (len(table),), generator=generator)
        totals[i] = torch.bincount(drawn, minlength=len(table)).double() @ table
    return totals
