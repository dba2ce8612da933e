"""What an SAE does to activations, token by token, added up over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics import density_edges, density_histogram
from .estimates import DocumentSums, Estimate, ratio

DENSE = 0.1
"""A latent that is active on more than this share of tokens counts as dense."""
_EDGES = density_edges(8)  # an evaluation may be of far more tokens than one line of metrics


@dataclass
class Scores:
    """One inference mode on held-out tokens, in the units of the raw activations.

    Estimates are floats with ``low`` and ``high``, the 95 % interval of the bootstrap over documents.
    """

    explained_variance: Estimate
    """``1 - Σ‖x - x̂‖² / Σ‖x - x̄‖²``, x̄ the mean over the evaluated tokens (fixed in the bootstrap)."""
    normalized_mse: Estimate
    """``Σ‖x - x̂‖² / Σ‖x‖²``: the error as a share of the energy."""
    mse: Estimate
    """``mean (x - x̂)²`` over tokens and dimensions."""
    cosine: Estimate
    """Mean over tokens of the cosine of x and x̂; 0 where one of them is zero."""
    l0: Estimate
    """Mean active latents per token."""
    levels: dict[int, Estimate]
    """Explained variance by the first so many of the active latents, for each level of a Matryoshka SAE;
    of a plain one that of the whole alone."""
    l0_counts: Tensor
    """``[max L0 + 1]``: the number of tokens with 0, 1, 2, ... active latents."""
    fired: Tensor
    """``[F]`` int64: tokens on which each latent is active."""
    tokens: int
    cross_entropy: Estimate | None = None
    """Of the language model with its activations replaced by the reconstruction; nats per token."""
    loss_recovered: Estimate | None = None
    """``(CE_zero - CE) / (CE_zero - CE_clean)``: 1 is the untouched model, 0 the zero-ablated one."""
    loss_recovered_from_mean: Estimate | None = None
    """The same with mean ablation in the place of zero ablation: a harder scale."""
    kl: Estimate | None = None
    """Mean KL divergence of the next-token distributions, clean to replaced; nats per token."""

    @property
    def density(self) -> Tensor:
        """``[F]`` float64: the share of the evaluated tokens on which each latent is active."""
        return self.fired.double() / self.tokens

    @property
    def alive(self) -> int:
        """Latents active on at least one evaluated token."""
        return int((self.fired > 0).sum())

    @property
    def dead(self) -> int:
        """Latents active on none."""
        return len(self.fired) - self.alive

    @property
    def dense(self) -> int:
        """Latents active on more than a tenth of the tokens."""
        return int((self.density > DENSE).sum())

    @property
    def alive_fraction(self) -> float:
        return self.alive / len(self.fired)

    def l0_quantile(self, share: float) -> int:
        """The smallest L0 that at least this share of the tokens does not exceed."""
        return int((self.l0_counts.cumsum(0) < share * self.tokens - 1e-9).sum())

    def density_histogram(self) -> dict[str, Sequence[float]]:
        """``edges`` in log10 of the density, and the ``counts`` of alive latents between them."""
        return {"edges": list(_EDGES), "counts": density_histogram(self.fired, self.tokens, _EDGES)}

    def to_json(self) -> dict[str, Any]:
        estimates = {n: v.to_json() for n, v in vars(self).items() if isinstance(v, Estimate)}
        counts = {n: getattr(self, n) for n in ("alive", "dead", "dense", "alive_fraction")}
        shares = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
        return {
            **estimates,
            **counts,
            "levels": {str(m): value.to_json() for m, value in self.levels.items()},
            "l0_quantiles": {f"{share:g}": self.l0_quantile(share) for share in shares},
            "density_histogram": self.density_histogram(),
        }


class ScoreSums:
    """The running sums behind :class:`Scores`; memory does not grow with the number of tokens.

    ``mean [D]`` is the mean activation over all tokens that will be added, ``levels`` are the SAE's.
    """

    def __init__(self, mean: Tensor, levels: Sequence[int]) -> None:
        self.levels, d_sae = levels, levels[-1]
        self._errors = [f"error_{m}" for m in levels]
        self.mean, self.sums, self.tokens = mean, DocumentSums(), 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=mean.device)
        self.l0_counts = torch.zeros(d_sae + 1, dtype=torch.int64, device=mean.device)

    def add(self, x: Tensor, z: Tensor, x_hats: Tensor, documents: Tensor) -> None:
        """Take in raw activations ``x [n, D]``, latents ``z [n, F]`` and reconstructions ``x_hats [L, n, D]``."""
        x, x_hat = x.double(), x_hats[-1].double()
        errors = [(x - each).square().sum(1) for each in x_hats]
        active = z > 0
        l0 = active.sum(1)
        norms = x.norm(dim=1) * x_hat.norm(dim=1)
        self.sums.add(
            documents,
            tokens=torch.ones_like(norms),
            **dict(zip(self._errors, errors, strict=True)),
            energy=x.square().sum(1),
            variance=(x - self.mean).square().sum(1),
            cosine=(x * x_hat).sum(1) / norms.where(norms > 0, 1),
            l0=l0,
        )
        self.fired += active.sum(0)
        self.l0_counts += torch.bincount(l0, minlength=len(self.l0_counts))
        self.tokens += len(x)

    def scores(self) -> Scores:
        estimate, error = self.sums.estimate, self._errors[-1]
        explained = lambda name: estimate(lambda e, v: 1 - e / v, name, "variance")
        levels = dict(zip(self.levels, map(explained, self._errors), strict=True))
        counts = self.l0_counts.cpu()
        return Scores(
            explained_variance=levels[self.levels[-1]],
            levels=levels,
            normalized_mse=estimate(ratio, error, "energy"),
            mse=estimate(lambda e, n: e / n / len(self.mean), error, "tokens"),
            cosine=estimate(ratio, "cosine", "tokens"),
            l0=estimate(ratio, "l0", "tokens"),
            l0_counts=counts[: int(counts.nonzero().max()) + 1],
            fired=self.fired.cpu(),
            tokens=self.tokens,
        )
