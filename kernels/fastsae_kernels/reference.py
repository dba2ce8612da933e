"""Every operation of a BatchTopK sparse autoencoder, written as its definition.

This module is the oracle: short, dense, device-independent, any float dtype (float64 included), and
never fast. Kernels, training steps and the trainer are tested against it. Selection and the fused step
never run on it; what is done once a run, or is one line of dense torch anyway, is called from here.

Legend, shared by the whole project: ``B`` tokens, ``D`` model width, ``F`` dictionary size (latents),
``k`` mean active latents per token, ``K = int(k * B)`` active entries of a batch.

Shapes: ``x [B, D]``, ``pre [B, F]``, ``z [B, F]``, ``W_enc [D, F]``, ``W_dec [F, D]``, ``b_enc [F]``,
``b_dec [D]``. ``x`` is always *after* input scaling.

A *transcoder* reconstructs a ``target [B, D_out]`` from ``x [B, D_in]``: ``W_dec [F, D_out]`` and ``b_dec [D_out]``
are of the target, ``x`` is centred already and ``b_dec`` not subtracted from it, and with a *skip connection*
``W_skip [D_out, D_in]`` its output is ``z @ W_dec + b_dec + x @ W_skipᵀ``.

Sources: BatchTopK, Bussmann et al. 2024 (arXiv:2412.06410); TopK and aux-k, Gao et al. 2024
(arXiv:2406.04093, sections 2 and A.2); the geometric-median start, Bricken et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .sparse import CSC, CSR

AuxNormalization = Literal["residual_variance", "total_variance", "none"]
Objective = Literal["log", "plain"]


def scale_constant(x: Tensor, center: Tensor) -> Tensor:
    """``c = 1 / mean‖x - center‖``: the constant that gives rows a mean distance of 1, a decoder row's
    norm, from where ``b_dec`` begins, ``c * center``.

    Adam moves every element by about ``lr`` a step whatever its size. With what is to be learnt, biases
    and decoder rows all of norm 1, one ``lr`` suits them all; at sqrt(D) the biases would learn sqrt(D)
    times more slowly. Distances, not norms: a mean that is large against the spread is learnt by
    ``b_dec`` before the first step, and would only make what is left small.
    """
    return 1 / (x - center).norm(dim=-1).mean()


class TokenStatistics(NamedTuple):
    """Mean and unbiased standard deviation of each token, both ``[..., 1]``."""

    mean: Tensor
    std: Tensor


def token_statistics(x: Tensor) -> TokenStatistics:
    """The per-token statistics of ``layer_norm`` scaling (SAELens's convention: unbiased)."""
    return TokenStatistics(x.mean(-1, keepdim=True), x.std(-1, keepdim=True))


def layer_norm(x: Tensor, statistics: TokenStatistics) -> Tensor:
    """``(x - mean) / (std + 1e-5)``."""
    return (x - statistics.mean) / (statistics.std + 1e-5)


def undo_layer_norm(x: Tensor, statistics: TokenStatistics) -> Tensor:
    """``x * std + mean``: SAELens's inverse, which leaves the 1e-5 out."""
    return x * statistics.std + statistics.mean


def geometric_median(x: Tensor, steps: int = 20) -> Tensor:
    """The point ``[D]`` of least summed distance to the rows of ``x``, by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(steps):
        # The floor keeps a row that coincides with the median from taking all the weight as 1/0.
        weight = 1 / (x - median).norm(dim=-1, keepdim=True).clamp_min(1e-8)
        median = (weight * x).sum(0) / weight.sum()
    return median


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """``pre = (x - b_dec) @ W_enc + b_enc``."""
    return (x - b_dec) @ W_enc + b_enc


def num_selected(k: float, tokens: int, latents: int) -> int:
    """``K = int(k * B)``, clamped to ``[0, B * F]``."""
    return max(0, min(int(k * tokens), tokens * latents))


def batch_topk_mask(pre: Tensor, num_selected: int, quota: float = 0.0) -> Tensor:
    """Mask ``[B, F]`` of the ``num_selected`` largest positive entries of the whole batch.

    The order is total: value descending, then token-major flat index ascending. Non-positive entries
    and NaN are never selected, so fewer than ``num_selected`` may be. Up to ``int(quota * num_selected)``
    :func:`peaks` come before all others.
    """
    first = peaks(pre, int(quota * num_selected))
    others = torch.where(first, 0, pre).reshape(1, -1)
    return first | _largest_positive(others, num_selected - int(first.sum())).reshape(pre.shape)


def peaks(pre: Tensor, most: int) -> Tensor:
    """Mask ``[B, F]`` of the latents' peaks: the largest positive entry of each latent that has one.

    Of equal entries of a latent the smaller token's is its peak. Of more than ``most`` peaks, the largest
    in the order of :func:`batch_topk_mask`.
    """
    if most == 0:
        return torch.zeros_like(pre, dtype=torch.bool)
    largest = torch.where(topk_mask(pre.T, 1).T, pre, 0)
    return _largest_positive(largest.reshape(1, -1), most).reshape(pre.shape)


def topk_mask(pre: Tensor, k: int) -> Tensor:
    """Mask ``[B, F]`` of the ``k`` largest positive entries of each token, ties to the lower latent."""
    return _largest_positive(pre, k)


def _largest_positive(rows: Tensor, k: int) -> Tensor:
    # A stable descending sort keeps equal values in index order, which is the tie rule.
    order = torch.where(rows > 0, rows, 0).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, order, True) & (rows > 0)


def to_csr(pre: Tensor, mask: Tensor) -> CSR:
    """The masked entries of ``pre`` in token order, without a spare slot."""
    row, column = mask.nonzero(as_tuple=True)
    return CSR(pre[row, column], column.int(), _offsets(mask.sum(1)))


def to_csc(mask: Tensor) -> CSC:
    """The masked entries in latent order, pointing back into :func:`to_csr`'s arrays."""
    position = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    position[mask] = torch.arange(int(mask.sum()), dtype=torch.int32, device=mask.device)
    column, row = mask.T.nonzero(as_tuple=True)
    return CSC(row.int(), position[row, column], _offsets(mask.sum(0)))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def decode(z: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``x̂ = z @ W_dec + b_dec``."""
    return z @ W_dec + b_dec


def decode_levels(z: Tensor, W_dec: Tensor, b_dec: Tensor, levels: Sequence[int]) -> Tensor:
    """``x̂ [L, B, D]``: what the first ``levels[l]`` latents reconstruct without those after them.

    ``x̂_l = x̂_{l-1} + z W_dec`` over the latents of level l that are not in the one before, and
    ``x̂_0 = b_dec``. Source: Matryoshka SAEs, Bussmann et al. 2025 (arXiv:2503.17547).
    """
    x_hats = [b_dec]
    for first, end in pairwise((0, *levels)):
        x_hats.append(decode(z[..., first:end], W_dec[first:end], x_hats[-1]))
    return torch.stack(x_hats[1:])


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """``mean_B ‖x - x̂‖²``: summed over the width, so that it is comparable between models.

    Of ``x̂ [L, B, D]``, the mean over the levels too: the error that nested training minimises.
    """
    return (x - x_hat).square().sum(-1).mean()


def aux_k_loss(
    pre: Tensor,
    residual: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k_aux: int,
    normalization: AuxNormalization = "residual_variance",
    x: Tensor | None = None,
) -> Tensor:
    """How badly the dead latents alone explain ``residual = (x - x̂)``, which is not differentiated.

    Of each token the ``k_aux`` largest ``relu(pre)`` among the ``dead [F]`` latents reconstruct the
    residual without a bias. The error is divided by what ``normalization`` names (``total_variance``
    needs ``x``), scaled by ``min(n_dead / k_aux, 1)``, and is 0 where nothing is dead or the
    denominator vanishes. Source: Gao et al. 2024, A.2; the scale is that of Gao's successors.
    """
    residual = residual.detach()
    z_aux = pre * topk_mask(torch.where(dead, pre, 0), k_aux)
    error = squared_error(residual, z_aux @ W_dec)
    scale = (dead.sum().to(error.dtype) / max(k_aux, 1)).clamp(max=1)
    scale = scale / _aux_denominator(residual, normalization, x)
    # The scale is made finite before it meets the error: a NaN replaced afterwards would still leave
    # NaN gradients behind.
    return torch.where(scale.isfinite(), scale, 0) * error


def _aux_denominator(residual: Tensor, normalization: AuxNormalization, x: Tensor | None) -> Tensor:
    if normalization == "residual_variance":
        return squared_error(residual, residual.mean(0))
    if normalization == "total_variance":
        if x is None:
            raise ValueError("aux_k_loss: normalization 'total_variance' needs x")
        return squared_error(x, x.mean(0))
    return residual.new_ones(())


def objective(error: Tensor, aux: Tensor, weight: float, kind: Objective) -> Tensor:
    """What training minimises: ``log(error) + weight * aux`` (log) or ``error + weight * aux`` (plain).

    The gradient of the logarithm does not shrink with the error as training goes on: Adam, whose second
    moments remember a thousand steps, takes ever smaller steps while a gradient shrinks. An error of 0
    counts as 1: it has no gradient, and the logarithm's would be infinite.
    """
    return (torch.where(error > 0, error, 1).log() if kind == "log" else error) + weight * aux


def error_weight(error: Tensor) -> Tensor:
    """``1 / error``, the derivative of :func:`objective`'s logarithm; 1 where the error is 0."""
    return 1 / torch.where(error > 0, error, 1)


class Gradients(NamedTuple):
    W_enc: Tensor  # [D, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    b_dec: Tensor  # [D]


class SkipGradients(NamedTuple):
    """Of a transcoder with a skip connection."""

    W_enc: Tensor  # [D_in, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D_out]
    b_dec: Tensor  # [D_out]
    W_skip: Tensor  # [D_out, D_in]


AnyGradients = TypeVar("AnyGradients", bound=Gradients | SkipGradients)


def gradients(
    x: Tensor,
    params: AnyGradients,
    mask: Tensor,
    dead: Tensor,
    *,
    aux_coefficient: float,
    k_aux: int,
    normalization: AuxNormalization = "residual_variance",
    objective: Objective = "log",
    levels: Sequence[int] = (),
    target: Tensor | None = None,
) -> AnyGradients:
    """Gradients of :func:`objective` without autograd, for a given selection ``mask``; with a ``target``,
    of a transcoder.

    ``params`` holds the weights. ``dY = dL/dx̂``; then, per latent f,
    ``dz = dY · W_dec[f]``, ``dW_dec[f] = Σ z dY``, ``dW_enc[f] = Σ dz (x - b_dec)``,
    ``db_enc[f] = Σ dz`` and ``db_dec = Σ_b dY - Σ_f db_enc[f] W_enc[f]``. Aux-k adds terms of the same
    form to the dead latents' rows; its target is detached, so none of them reaches ``dY``, and its
    pre-activations take ``b_dec`` as given, so none reaches ``db_dec``. With ``levels`` there is a ``dY``
    for each, the sum of the derivatives by its reconstruction and by those of the levels after it: all that
    the latents which it adds are part of. ``b_dec`` is part of all, as the first level's latents are. Of a
    transcoder ``dW_enc[f] = Σ dz x``, ``db_dec = Σ_b dY`` and ``dW_skip = dYᵀ x``.
    """
    W_enc, b_enc, W_dec, b_dec, *skip = params
    centred = x - b_dec if target is None else x
    pre = centred @ W_enc + b_enc
    z = pre * mask
    levels = levels or (len(W_dec),)
    y = x if target is None else target
    residuals = y - decode_levels(z, W_dec, b_dec, levels) - sum(x @ W.T for W in skip)
    residual = residuals[-1]

    dY = -2 * residuals.flip(0).cumsum(0).flip(0) / (len(levels) * len(x))
    if objective == "log":
        dY = dY * error_weight(squared_error(residuals, torch.zeros_like(residuals)))
    blocks = [slice(*ends) for ends in pairwise((0, *levels))]
    dz = mask * torch.cat([d @ W_dec[f].T for d, f in zip(dY, blocks, strict=True)], 1)
    dW_dec = torch.cat([z[:, f].T @ d for d, f in zip(dY, blocks, strict=True)])
    db_dec = dY[0].sum(0) - (W_enc @ dz.sum(0) if target is None else 0)
    dW_skip = [dY[0].T @ x for _ in skip]

    n_dead = int(dead.sum())
    if n_dead and k_aux:
        mask_aux = topk_mask(torch.where(dead, pre, 0), k_aux)
        z_aux = pre * mask_aux
        scale = min(n_dead / k_aux, 1) / _aux_denominator(residual, normalization, y)
        scale = aux_coefficient * torch.where(scale.isfinite(), scale, 0)
        dE = scale * 2 * (z_aux @ W_dec - residual) / len(x)
        dz = dz + (dE @ W_dec.T) * mask_aux
        dW_dec = dW_dec + z_aux.T @ dE

    return type(params)(centred.T @ dz, dz.sum(0), dW_dec, db_dec, *dW_skip)


def project_gradient(W_dec: Tensor, gradient: Tensor) -> Tensor:
    """Remove from each row of ``gradient [F, D]`` its component along the same row of ``W_dec``."""
    norm2 = W_dec.square().sum(-1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
    return gradient - (gradient * W_dec).sum(-1, keepdim=True) / norm2 * W_dec


def normalize_rows(W_dec: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero."""
    norm = W_dec.norm(dim=-1, keepdim=True)
    return W_dec / norm.clamp_min(torch.finfo(W_dec.dtype).tiny)


def clip_factor(gradient_list: Sequence[Tensor], max_norm: float | None) -> float:
    """What to multiply all gradients by so that their joint norm is at most ``max_norm``."""
    if max_norm is None:
        return 1.0
    norm = float(torch.stack([g.norm() for g in gradient_list]).norm())
    return min(1.0, max_norm / norm) if norm > 0 else 1.0


class AdamMoments(NamedTuple):
    m: Tensor
    v: Tensor


def adam(
    p: Tensor,
    g: Tensor,
    moments: AdamMoments,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, AdamMoments]:
    """One step of Adam (Kingma & Ba 2015, algorithm 1); ``step`` counts from 1."""
    m = betas[0] * moments.m + (1 - betas[0]) * g
    v = betas[1] * moments.v + (1 - betas[1]) * g.square()
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), AdamMoments(m, v)


def update_tokens_since_active(counter: Tensor, mask: Tensor) -> Tensor:
    """Per latent: 0 if selected anywhere in the batch, else its counter plus the batch's tokens."""
    return torch.where(mask.any(0), 0, counter + mask.shape[0])


def update_threshold(
    threshold: Tensor, updates: int, selected: Tensor, rate: float = 0.01
) -> tuple[Tensor, int]:
    """Bias-corrected exponential average of the smallest value that each batch selects beside the peaks.

    The corrected average itself is the state: with ``n`` updates the newest value weighs
    ``rate / (1 - (1 - rate)^n)``. A batch that selects nothing changes nothing.
    """
    if selected.numel() == 0:
        return threshold, updates
    updates += 1
    weight = rate / (1 - (1 - rate) ** updates)
    return threshold + weight * (selected.min().to(threshold.dtype) - threshold), updates


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """``1 - Σ‖x - x̂‖² / Σ‖x - x̄‖²``, x̄ the mean over the given tokens."""
    return 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


@dataclass(frozen=True)
class State:
    """All that a training step reads and writes."""

    params: Gradients | SkipGradients
    moments: tuple[AdamMoments, ...]
    tokens_since_active: Tensor  # [F] int64
    threshold: Tensor
    threshold_updates: int = 0
    step: int = 0


@dataclass(frozen=True)
class Settings:
    k: float
    k_aux: int
    aux_coefficient: float  # what the objective multiplies aux-k by
    lr: float = 3e-4
    decoder_lr_ratio: float = 1.0  # W_dec's learning rate is as many times lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    aux_normalization: AuxNormalization = "residual_variance"
    dead_after_tokens: int = 10_000_000
    threshold_rate: float = 0.01
    objective: Objective = "log"
    max_gradient_norm: float | None = None
    quota: float = 0.0
    levels: tuple[int, ...] = ()  # of Matryoshka; ends with F


@dataclass(frozen=True)
class StepResult:
    objective: Tensor
    error: Tensor
    aux: Tensor
    mask: Tensor
    state: State = field(repr=False)


ENCODER_START = 0.25
"""The new encoder's share of ``W_decᵀ``. Rows that are selected together overlap: with all of it, they reconstruct about
twice what there is (docs/quality.md)."""


def initial_state(
    W_dec: Tensor, b_dec: Tensor, W_enc: Tensor | None = None, W_skip: Tensor | None = None
) -> State:
    """``W_enc = W_decᵀ / 4`` unless it is given, ``b_enc = 0``, moments and counters zero."""
    W_dec = normalize_rows(W_dec)
    W_enc = ENCODER_START * W_dec.T if W_enc is None else W_enc
    params = Gradients(W_enc, W_dec.new_zeros(len(W_dec)), W_dec, b_dec)
    params = params if W_skip is None else SkipGradients(*params, W_skip)
    moments = tuple(AdamMoments(torch.zeros_like(p), torch.zeros_like(p)) for p in params)
    since = torch.zeros(len(W_dec), dtype=torch.int64, device=W_dec.device)
    return State(params, moments, since, W_dec.new_zeros(()))


def train_step(
    state: State,
    x: Tensor,
    settings: Settings,
    mask: Tensor | None = None,
    target: Tensor | None = None,
) -> StepResult:
    """Encode, select (or take ``mask``), decode, lose, differentiate, project, clip, Adam, renormalise; with a
    ``target``, of a transcoder."""
    W_enc, b_enc, W_dec, b_dec, *skip = state.params
    pre = pre_activations(x, W_enc, b_enc, b_dec if target is None else torch.zeros_like(x[0]))
    y = x if target is None else target
    K = num_selected(settings.k, *pre.shape)
    if mask is None:
        mask = batch_topk_mask(pre, K, settings.quota)
    x_hats = decode_levels(pre * mask, W_dec, b_dec, settings.levels or (len(W_dec),))
    left = y - sum(x @ W.T for W in skip)
    error, residual = squared_error(left, x_hats), left - x_hats[-1]
    dead = state.tokens_since_active >= settings.dead_after_tokens
    aux = aux_k_loss(pre, residual, W_dec, dead, settings.k_aux, settings.aux_normalization, y)

    g = gradients(
        x,
        state.params,
        mask,
        dead,
        aux_coefficient=settings.aux_coefficient,
        k_aux=settings.k_aux,
        normalization=settings.aux_normalization,
        objective=settings.objective,
        levels=settings.levels,
        target=target,
    )
    g = g._replace(W_dec=project_gradient(W_dec, g.W_dec))
    clip = clip_factor(g, settings.max_gradient_norm)
    rates = {"W_dec": settings.decoder_lr_ratio * settings.lr}
    updated = [
        adam(
            p,
            clip * gp,
            mom,
            state.step + 1,
            rates.get(name, settings.lr),
            settings.betas,
            settings.eps,
        )
        for name, p, gp, mom in zip(g._fields, state.params, g, state.moments, strict=True)
    ]
    params, moments = type(g)(*(p for p, _ in updated)), tuple(m for _, m in updated)
    params = params._replace(W_dec=normalize_rows(params.W_dec))
    since = update_tokens_since_active(state.tokens_since_active, mask)
    ordinary = pre[mask & ~peaks(pre, int(settings.quota * K))]
    threshold = update_threshold(
        state.threshold, state.threshold_updates, ordinary, settings.threshold_rate
    )
    after = State(params, moments, since, *threshold, step=state.step + 1)
    value = objective(error, aux, settings.aux_coefficient, settings.objective)
    return StepResult(value, error, aux, mask, after)
