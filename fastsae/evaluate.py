"""Metrics of an SAE on activations it was not trained on. Nothing in the SAE changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .activation import Inference
from .sae import SAE


class Evaluation(NamedTuple):
    """Metrics over the evaluated tokens, in the units of the raw activations."""

    explained_variance: float
    """``1 - Σ‖x - x̂‖² / Σ‖x - x̄‖²``, x̄ the mean over the evaluated tokens."""
    l0: float
    """Mean active latents per token."""
    alive_fraction: float
    """Latents active on at least one evaluated token."""
    density: Tensor
    """``[F]``: the share of the evaluated tokens on which each latent is active."""


@torch.no_grad()
def evaluate(
    sae: SAE, x: Tensor, inference: Inference | None = None, batch_size: int = 1024
) -> Evaluation:
    """Encode and decode ``x [N, D]`` in eval mode, ``batch_size`` tokens at a time.

    Args:
        inference: how to select; the SAE's own way if absent. ``"batch"`` selects within each batch.
    """
    was_training = sae.training
    sae.eval()
    device = sae.W_dec.device
    mean = x.double().mean(0).to(device)
    error = variance = torch.zeros((), dtype=torch.float64, device=device)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    for batch in x.split(batch_size):
        batch = batch.to(device)
        z = sae.encode(batch, inference)
        x_hat = sae.decode(z, sae.token_statistics(batch.to(z.dtype)))
        error = error + (batch.double() - x_hat.double()).square().sum()
        variance = variance + (batch.double() - mean).square().sum()
        fired += (z > 0).sum(0)
    sae.train(was_training)
    return Evaluation(
        explained_variance=float(1 - error / variance),
        l0=float(fired.sum()) / len(x),
        alive_fraction=float((fired > 0).double().mean()),
        density=fired.double().cpu() / len(x),
    )


def pca_explained_variance(x: Tensor, components: int) -> float:
    """Explained variance of the best ``components``-dimensional linear reconstruction of ``x [N, D]``.

    The directions are fitted to ``x`` itself, so no PCA fitted elsewhere can do better on it: the
    baseline is generous to PCA.
    """
    centred = x.double() - x.double().mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred)
    return float(eigenvalues[-components:].sum() / eigenvalues.sum())
