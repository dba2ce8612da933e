"""What the language model loses when its residual stream is replaced: cross-entropy and KL by document."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..lm.held_out import Batch
from ..lm.hooked import SplicedModel
from .estimates import DocumentSums, Estimate, ratio
from .scores import Scores

_LOGITS_AT_ONCE = 2**24
"""Logits in float32 that one step of a sum over the vocabulary may hold: 64 MB."""


class SplicedLosses:
    """Cross-entropy and KL of the model with its residual stream replaced, summed by document."""

    def __init__(self, model: SplicedModel, mean: Tensor) -> None:
        self._model, self._mean = model, mean
        self._sums = DocumentSums()

    def begin(self, batch: Batch) -> Tensor:
        """Run the clean model; returns its residual stream."""
        self._batch = batch
        self._clean, self._residual = self._model.logits(batch.tokens)
        # Text that something follows in its row; that may be a special token.
        followed = torch.arange(batch.text.shape[1]) < batch.lengths[:, None] - 1
        self._predicting = batch.text & followed.to(batch.text.device)
        documents = batch.documents_of(self._predicting)
        clean = cross_entropy(self._clean, batch.tokens, self._predicting)
        self._sums.add(documents, predictions=torch.ones_like(clean), ce_clean=clean)
        return self._residual

    def ablate(self, measured: Tensor) -> None:
        self._add("zero", torch.zeros_like(self._residual))
        self.replace("mean", measured, self._mean)

    def replace(self, mode: str, measured: Tensor, x_hat: Tensor) -> None:
        replaced = self._residual.clone()
        replaced[measured] = x_hat.to(replaced.device, replaced.dtype)
        self._add(mode, replaced)

    def _add(self, name: str, replacement: Tensor) -> None:
        batch = self._batch
        logits, _ = self._model.logits(batch.tokens, replacement)
        ce = cross_entropy(logits, batch.tokens, self._predicting)
        self._sums.add(batch.documents_of(self._predicting), **{f"ce_{name}": ce})
        kl = kl_divergence(self._clean, logits, batch.text)
        self._sums.add(
            batch.documents_of(batch.text),
            **{f"kl_{name}": kl, f"kl_tokens_{name}": torch.ones_like(kl)},
        )

    def complete(self, mode: str, scores: Scores) -> None:
        recovered = lambda ablated, replaced, clean: (ablated - replaced) / (ablated - clean)
        estimate = self._sums.estimate
        scores.cross_entropy, scores.kl = self._cross_entropy(mode), self._kl(mode)
        scores.loss_recovered = estimate(recovered, "ce_zero", f"ce_{mode}", "ce_clean")
        scores.loss_recovered_from_mean = estimate(recovered, "ce_mean", f"ce_{mode}", "ce_clean")

    def losses(self) -> dict[str, Estimate]:
        found = {n: self._cross_entropy(n) for n in ("clean", "zero", "mean")}
        return found | {f"kl_{n}": self._kl(n) for n in ("zero", "mean")}

    def _cross_entropy(self, name: str) -> Estimate:
        return self._sums.estimate(ratio, f"ce_{name}", "predictions")

    def _kl(self, name: str) -> Estimate:
        return self._sums.estimate(ratio, f"kl_{name}", f"kl_tokens_{name}")


# --- sums over the vocabulary, a slice of the positions at a time ---


def cross_entropy(logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """``-log p`` of the token that follows each position of ``positions [n, t]`` (bool): ``[m]`` float32.

    ``logits [n, t, V]``; positions in the last column have no following token and must be off.
    """
    parts: list[Tensor] = []
    for row, column in _slices(positions, logits.shape[-1]):
        log_p = log_softmax(logits[row, column].float(), dim=-1)
        parts.append(-log_p.gather(1, tokens[row, column + 1][:, None])[:, 0])
    return torch.cat(parts)


def kl_divergence(clean: Tensor, changed: Tensor, positions: Tensor) -> Tensor:
    """``KL(clean ‖ changed)`` of the next-token distributions at ``positions [n, t]``: ``[m]`` float32."""
    parts: list[Tensor] = []
    for at in _slices(positions, clean.shape[-1]):
        log_p = log_softmax(clean[at].float(), dim=-1)
        log_q = log_softmax(changed[at].float(), dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def _slices(positions: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    row, column = positions.nonzero(as_tuple=True)
    return zip(row.split(size), column.split(size), strict=True)
