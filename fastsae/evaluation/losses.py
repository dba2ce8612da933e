"""What the language model loses when its activations at a site are replaced: cross-entropy and KL by document."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lm.held_out import Batch
from ..lm.hooked import SplicedModel
from .estimates import DocumentSums, Estimate, ratio
from .scores import Scores

_LOGITS_AT_ONCE = 7 * 2**20
"""Logits in one block: 28 MB of float32. What is larger than 32 MB the C library takes from the system and
gives back every time, and with a large vocabulary that takes longer than the products."""


class SplicedLosses:
    """Cross-entropy and KL of the model with its activations replaced, summed by document.

    For each batch :meth:`begin`, then any of :meth:`ablate` and :meth:`replace`, then :meth:`measure`. Only the
    last forms logits: where there is text, and a block at a time.
    """

    def __init__(self, model: SplicedModel, mean: Tensor) -> None:
        self._model, self._mean = model, mean
        self._sums = DocumentSums()
        self._log_p, self._p, self._log_q = (torch.empty(0, device=model.device) for _ in range(3))

    def begin(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run the clean model; returns its activations at every site."""
        self._batch, self._hidden = batch, dict[str, Tensor]()
        hidden, kept = self._model.clean(batch.tokens)
        self._clean, self._residual = hidden[batch.text], kept[-1]
        return kept

    def ablate(self, measured: Tensor) -> None:
        self._run("zero", torch.zeros_like(self._residual))
        self.replace("mean", measured, self._mean)

    def replace(self, name: str, measured: Tensor, x_hat: Tensor) -> None:
        replaced = self._residual.clone()
        replaced[measured] = x_hat.to(replaced.device, replaced.dtype)
        self._run(name, replaced)

    def _run(self, name: str, replacement: Tensor) -> None:
        hidden, _ = self._model.hidden(self._batch.tokens, replacement)
        self._hidden[name] = hidden[self._batch.text]

    def measure(self) -> None:
        """Add what the batch loses to the sums."""
        text, tokens = self._batch.text, self._batch.tokens
        row, column = text.nonzero(as_tuple=True)
        # Text that something follows in its row; that may be a special token.
        predicting = column < self._batch.lengths.to(column.device)[row] - 1
        following = tokens[row, (column + 1).clamp(max=tokens.shape[1] - 1)][:, None]
        ce: dict[str, list[Tensor]] = {name: [] for name in ("clean", *self._hidden)}
        kl: dict[str, list[Tensor]] = {name: [] for name in self._hidden}
        size = max(1, _LOGITS_AT_ONCE // self._model.vocabulary)
        for start in range(0, len(row), size):
            block = slice(start, start + size)
            log_p = self._log_softmax(self._clean[block], self._log_p)
            p = torch.exp(log_p, out=self._p.resize_(log_p.shape))
            ce["clean"].append(-log_p.gather(1, following[block])[:, 0])
            for name, hidden in self._hidden.items():
                log_q = self._log_softmax(hidden[block], self._log_q)
                ce[name].append(-log_q.gather(1, following[block])[:, 0])
                kl[name].append(-log_q.sub_(log_p).mul_(p).sum(-1))
        documents = self._batch.documents_of(text)
        for name, parts in ce.items():
            predicted = torch.cat(parts)[predicting]
            self._sums.add(documents[predicting.cpu()], **{f"ce_{name}": predicted})
        self._sums.add(documents[predicting.cpu()], predictions=torch.ones(int(predicting.sum())))
        for name, parts in kl.items():
            found = torch.cat(parts)
            self._sums.add(
                documents, **{f"kl_{name}": found, f"kl_tokens_{name}": torch.ones_like(found)}
            )

    def _log_softmax(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        logits = self._model.head(hidden).float()
        return torch.log_softmax(logits, -1, out=buffer.resize_(logits.shape))

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
