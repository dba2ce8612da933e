"""Do two sets of numbers differ? The rank-sum test for many columns at once, and its multiple testing."""

from __future__ import annotations

import torch
from torch import Tensor


def midranks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks ``[F, N]`` from 1 within each row of ``x [F, N]``, equal values sharing their mean rank; and
    the tie sums ``Σ (t³ - t)`` ``[F]`` over groups of t equal values. float64."""
    x = x.contiguous()
    ordered = x.sort(dim=1).values
    below = torch.searchsorted(ordered, x)
    upto = torch.searchsorted(ordered, x, right=True)
    ties = (upto - below).double()
    return (below + upto + 1).double() / 2, (ties.square() - 1).sum(1)


def rank_sum_test(ranks: Tensor, ties: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and two-sided p-value of the Mann-Whitney test, for each row and each labelling.

    Args:
        ranks, ties: what :func:`midranks` gives.
        positive: bool ``[R, N]``, one labelling a row.

    Returns: AUROC ``P(positive > negative) + P(equal) / 2`` and p, both ``[F, R]``. The p-value is the
    normal approximation with correction for ties and for continuity; 1 where all values are equal.

    Source: Mann & Whitney 1947; Lehmann, Nonparametrics, section 1.4.
    """
    n = ranks.shape[1]
    labels = positive.to(ranks.device, torch.float64)
    n_positive = labels.sum(1)
    pairs = n_positive * (n - n_positive)
    u = ranks @ labels.T - n_positive * (n_positive + 1) / 2
    variance = pairs / 12 * ((n + 1) - ties[:, None] / (n * (n - 1)))
    deviation = ((u - pairs / 2).abs() - 0.5).clamp_min(0)
    z = torch.where(variance > 0, deviation / variance.clamp_min(1e-300).sqrt(), 0)
    return u / pairs, torch.erfc(z / 2**0.5)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """q-values of p-values ``[m]``: rejecting all with ``q <= α`` keeps the false discovery rate at α.

    Holds for independent tests and for positively dependent ones.
    Source: Benjamini & Hochberg 1995.
    """
    m = len(p)
    order = p.argsort()
    scaled = p[order] * m / torch.arange(1, m + 1, dtype=p.dtype, device=p.device)
    q = torch.empty_like(p)
    q[order] = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return q


def fit_logistic(x: Tensor, y: Tensor, penalty: float = 1.0) -> Tensor:
    """Weights ``[D + 1]``, the intercept last, of a logistic regression of ``y [N]`` (bool) on ``x [N, D]``.

    Minimises ``Σ log-loss + penalty / 2 ‖w‖²`` (the intercept is free), in float64.
    """
    x, y = x.double(), y.double()
    w = x.new_zeros(x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = x @ w[:-1] + w[-1]
        loss = (torch.nn.functional.softplus(logits) - y * logits).sum()
        loss = loss + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return w.detach()
