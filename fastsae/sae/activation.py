"""The activation functions of sparse autoencoders, as modules that drop into anyone's SAE."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastsae_kernels import batch_topk, topk
from fastsae_kernels.step import average_threshold_

from ..errors import ConfigError

Inference = Literal["topk", "threshold", "batch"]
INFERENCE_MODES: tuple[Inference, ...] = ("topk", "threshold", "batch")


def check_inference(mode: str) -> None:
    """Raise ConfigError unless ``mode`` is one of ``INFERENCE_MODES``."""
    if mode not in INFERENCE_MODES:
        raise ConfigError(
            f"inference = {mode!r} is not one of 'topk' (k per token), 'threshold' (JumpReLU at the "
            f"trained threshold) or 'batch' (k per token on average over the batch)"
        )


class BatchTopK(nn.Module):
    """Keep the ``K = int(k * tokens)`` largest positive pre-activations of the whole batch.

    In training mode the selection is over the batch, and a threshold for inference is tracked: the
    bias-corrected exponential average of each batch's smallest kept value. In eval mode the module
    does what ``inference`` says, and nothing it keeps is changed:

    * ``"topk"`` keeps the ``max(1, round(k))`` largest positive entries of each token;
    * ``"threshold"`` keeps the entries above the tracked threshold (a JumpReLU);
    * ``"batch"`` selects as in training.

    Selection is exact. Equal values go to the smaller token-major index (smaller latent within a
    token); non-positive values and NaN are never kept, so fewer than K may be.

    Args:
        k: mean active latents per token, above 0; may be fractional. K is clamped to the number of
            entries.
        inference: what eval mode does.
        threshold_rate: weight of the newest batch in the average.
        latent_quota: share (0 to 1) of K that, in training mode, goes first to each latent's peak: its
            largest positive pre-activation of the batch (of equal ones the first token's); of too many
            peaks to the largest. The threshold is tracked on the other entries. May be set at any time; where
            it is set to 0 for good, ``threshold_updates.zero_()`` lets the threshold's average begin anew.

    Shapes: pre-activations ``[..., F]`` of any float dtype; the result has the same shape and dtype,
    with exact zeros where nothing was kept. Leading dimensions are tokens.

    Raises ConfigError: k is not a positive finite number, ``inference`` is unknown, or ``latent_quota`` is
    no share.

    Source: Bussmann et al. 2024, BatchTopK Sparse Autoencoders (arXiv:2412.06410), section 3.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(
        self,
        k: float,
        inference: Inference = "topk",
        threshold_rate: float = 0.01,
        latent_quota: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k < math.inf:
            raise ConfigError(f"k must be a finite number above 0, got {k!r}")
        check_inference(inference)
        if not 0 <= latent_quota <= 1:
            raise ConfigError(f"latent_quota must be a share between 0 and 1, got {latent_quota!r}")
        self.k = k
        self.inference: Inference = inference
        self.threshold_rate = threshold_rate
        self.latent_quota = latent_quota
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    def forward(
        self, pre: Tensor, inference: Inference | None = None, budget: int | None = None
    ) -> Tensor:
        """Select. ``inference`` overrides the mode for this call, and then nothing is tracked;
        ``budget`` overrides K where the selection is over the batch."""
        if inference is not None:
            check_inference(inference)
        mode = inference or ("train" if self.training else self.inference)
        rows = pre.reshape(-1, pre.shape[-1])
        if mode == "topk":
            kept = topk(rows, self.k_per_token).dense(rows.shape[1])
        elif mode == "threshold":
            kept = torch.where(rows > self.threshold.clamp_min(0), rows, 0)
        else:
            budget = int(self.k * len(rows)) if budget is None else budget
            quota = self.latent_quota if mode == "train" else 0.0
            selection = batch_topk(rows, budget, quota=quota)
            kept = selection.csr.dense(rows.shape[1])
            if mode == "train":
                self.track(selection.threshold)
        return kept.reshape(pre.shape)

    @property
    def k_per_token(self) -> int:
        """Active latents per token under ``inference="topk"``: ``max(1, round(k))``."""
        return max(1, round(self.k))

    @torch.no_grad()
    def track(self, smallest: Tensor) -> None:
        """Take a selection's threshold into the average; +inf (nothing but peaks kept) changes nothing."""
        average_threshold_(self.threshold, self.threshold_updates, smallest, self.threshold_rate)

    def extra_repr(self) -> str:
        return f"k={self.k:g}, inference={self.inference!r}"


class TopK(nn.Module):
    """Keep the ``k`` largest positive pre-activations of each token, in training and in eval mode.

    Equal values go to the smaller latent; non-positive values and NaN are never kept.

    Shapes and dtypes as for :class:`BatchTopK`. k is clamped to the number of latents; raises
    ConfigError if it is not a whole number of at least 1.

    Source: Gao et al. 2024, Scaling and Evaluating Sparse Autoencoders (arXiv:2406.04093), section 2.3.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"TopK: k must be a whole number of at least 1, got {k!r}")
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        rows = pre.reshape(-1, pre.shape[-1])
        return topk(rows, self.k).dense(rows.shape[1]).reshape(pre.shape)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class JumpReLU(nn.Module):
    """Keep the pre-activations above ``threshold``: one number, or one per latent ``[F]``.

    A zero threshold makes it a ReLU. This is what other packages' trained SAEs are read as.
    Source: Rajamanoharan et al. 2024 (arXiv:2407.14435), section 3.
    """

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold.detach().clone())

    def forward(self, pre: Tensor) -> Tensor:
        return torch.where((pre > self.threshold) & (pre > 0), pre, 0)
