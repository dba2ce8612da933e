"""The transcoder: latents of one place in the model that reconstruct another, an MLP's output from its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsae_kernels import reference
from fastsae_kernels.reference import TokenStatistics

from ..errors import ConfigError
from .activation import Inference
from .module import SAE, Normalize


class Transcoder(SAE):
    """A sparse map from raw inputs ``[..., D_in]`` to raw outputs ``[..., D_out]``.

    ``pre = x @ W_enc + b_enc``, ``z = select(pre)``, ``ŷ = z @ W_dec + b_dec + x @ W_skipᵀ``, where x is the
    input less ``center`` times ``scale``, and ŷ the output times ``target_scale``; the last term is there with
    ``skip``. :meth:`fold_scaling` moves all three into the weights. Latents are in the units of the raw output.

    Parameters: ``W_enc [D_in, F]``, ``W_dec [F, D_out]``, ``b_enc [F]``, ``b_dec [D_out]``, ``W_skip [D_out,
    D_in]``, which begins at zero, or None. The rest is as in :class:`SAE`, but that :meth:`decode` gives the output
    without the skip connection, and that eval mode selects by the threshold unless told otherwise, for that is
    what the formats of transcoders can hold.

    Raises ConfigError: a size is not positive, k exceeds d_sae, or ``normalize`` is ``"layer_norm"``.
    """

    center: Tensor
    target_scale: Tensor
    W_skip: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: float | None = None,
        *,
        skip: bool = False,
        normalize: Normalize = "none",
        inference: Inference = "threshold",
        **options: Any,
    ) -> None:
        if normalize == "layer_norm":
            raise ConfigError(
                "normalize = 'layer_norm' belongs to autoencoders: what a transcoder gives does not have the "
                "mean and spread of what it reads; use 'scalar' or 'none'"
            )
        super().__init__(d_in, d_sae, k, normalize=normalize, inference=inference, **options)
        new = {"dtype": self.b_dec.dtype, "device": self.b_dec.device}
        rows = torch.randn(d_sae, d_out, generator=options.get("generator"))
        self.W_dec = nn.Parameter(reference.normalize_rows(rows.to(new["dtype"])).to(new["device"]))
        self.b_dec = nn.Parameter(torch.zeros(d_out, **new))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, **new)) if skip else None
        self.register_buffer("center", torch.zeros(d_in, **new))
        self.register_buffer("target_scale", torch.ones((), **new))

    @property
    def output_scale(self) -> Tensor:
        return self.target_scale

    @property
    def target_hook_name(self) -> str | None:
        """The place in the language model that is reconstructed, if known."""
        return self.metadata.get("hook_name_out")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, d_out={self.d_out}, skip={self.W_skip is not None}"

    def forward(self, x: Tensor, inference: Inference | None = None) -> Tensor:
        """The output ``[..., D_out]`` for inputs ``x [..., D_in]``."""
        return self.decode(self.encode(x, inference)) + self.skip(x)

    def skip(self, x: Tensor) -> Tensor:
        """What the skip connection adds ``[..., D_out]`` for raw inputs; zeros without one."""
        scaled, _ = self.scale_input(x)
        return self.to_raw_units(self._skipped(scaled))

    def scale_input(self, x: Tensor) -> tuple[Tensor, None]:
        self._require_width(x)
        return (x.to(self.W_dec.dtype) - self.center) * self.scale, None

    def scale_target(self, target: Tensor) -> tuple[Tensor, None]:
        if target.shape[-1] != self.d_out:
            raise ValueError(
                f"this transcoder reconstructs [..., {self.d_out}], got {tuple(target.shape)}"
            )
        return target.to(self.W_dec.dtype) * self.target_scale, None

    def left_to_decoder(self, whole: Tensor, scaled: Tensor) -> Tensor:
        return whole if self.W_skip is None else whole - self._skipped(scaled)

    def to_raw_units(self, x: Tensor, statistics: TokenStatistics | None = None) -> Tensor:
        return x / self.target_scale

    def fold_scaling(self) -> Transcoder:
        """Move centring and both scales into the weights: ``W_enc`` and ``W_skip`` times ``scale / target_scale``,
        and the biases with what the centre takes from them. Outputs stay what they were, decoder rows of unit
        norm. In place; worked out in float64."""
        with torch.no_grad():
            unit, ratio = (
                self.target_scale.double(),
                self.scale.double() / self.target_scale.double(),
            )
            center = self.center.double() * self.scale.double()
            self.b_enc.copy_((self.b_enc.double() - center @ self.W_enc.double()) / unit)
            self.W_enc.copy_(self.W_enc.double() * ratio)
            b_dec = self.b_dec.double()
            if self.W_skip is not None:
                b_dec = b_dec - self.W_skip.double() @ center
                self.W_skip.copy_(self.W_skip.double() * ratio)
            self.b_dec.copy_(b_dec / unit)
            threshold = getattr(self.activation, "threshold", None)
            if threshold is not None:
                threshold /= self.target_scale.to(threshold.dtype)
            self.center.zero_()
            self.scale.fill_(1)
            self.target_scale.fill_(1)
        self.normalize = "none"
        return self

    def _skipped(self, scaled: Tensor) -> Tensor:
        if self.W_skip is None:
            return scaled.new_zeros(*scaled.shape[:-1], self.d_out)
        return scaled @ self.W_skip.T

    def _pre_activations(self, scaled: Tensor, b_dec: Tensor | None = None) -> Tensor:
        return self._operand(scaled) @ self._operand(self.W_enc) + self.b_enc
