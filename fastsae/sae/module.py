"""The sparse autoencoder: raw activations in, latents and reconstructions out."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastsae_kernels import CSR, reference
from fastsae_kernels.reference import AuxNormalization, Objective, TokenStatistics

from ..config import AUX_WEIGHTS, checked_levels
from ..errors import ConfigError
from .activation import BatchTopK, Inference
from .cfg import Cfg, cfg_of

Normalize = Literal["scalar", "none", "layer_norm"]
Precision = Literal["fp32", "tf32", "bf16"]


class Loss(NamedTuple):
    """What :meth:`SAE.loss` returns. ``loss``, ``error`` and ``aux`` are scalars after input scaling."""

    loss: Tensor  # the objective of error and aux: what is to be minimised
    error: Tensor  # mean over tokens (and levels) of ‖x - x̂‖²
    aux: Tensor
    latents: Tensor  # [B, F], in raw units, as encode returns them
    reconstruction: Tensor  # [B, D], in raw units
    residuals: Tensor  # [L, B, D], x - x̂ of each level, after input scaling


class SAE(nn.Module):
    """A BatchTopK sparse autoencoder of raw activations ``[..., D]``.

    ``pre = (x - b_dec) @ W_enc + b_enc``, ``z = select(pre)``, ``x̂ = z @ W_dec + b_dec``, where x is the
    input after scaling. Everything that goes in or comes out is in the units of the raw activations:
    scaling is undone on the way out, and :meth:`fold_scaling` moves it into the weights without
    changing any output.

    Parameters: ``W_enc [D, F]``, ``W_dec [F, D]``, ``b_enc [F]``, ``b_dec [D]``. Both matrices lie
    feature-major in memory, so that one latent is one contiguous row of each. A new SAE has random unit
    decoder rows, ``W_enc = W_decᵀ / 4`` and zero biases.

    Args:
        d_in: width D of the activations.
        d_sae: number of latents F.
        k: mean active latents per token.
        normalize: input scaling: ``"scalar"`` (one constant, ``scale``), ``"none"``, or
            ``"layer_norm"`` (per token: unbiased std, eps 1e-5 added to it).
        inference: how eval mode selects; see :class:`BatchTopK`.
        activation: use this module instead of ``BatchTopK(k)``.
        part: of the d_sae latents hold these alone, which begin as they do in the whole; ``d_sae`` is then their
            number. None at all is a part too.
        metadata: provenance kept with the SAE and written to disk with it. The levels of a Matryoshka SAE
            are its ``training_architecture_details``' ``matryoshka_widths``, as SAELens has them.

    Attributes: ``levels``: the prefixes of the dictionary that reconstruct without the latents after them,
    ascending; the last is ``d_sae``, and the only one of a plain SAE.

    Raises ConfigError: a size is not positive, k exceeds d_sae, or levels do not ascend to d_sae.
    """

    scale: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float | None = None,
        *,
        normalize: Normalize = "none",
        inference: Inference = "topk",
        activation: nn.Module | None = None,
        part: range | None = None,
        metadata: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ConfigError(f"d_in and d_sae must be at least 1, got {d_in} and {d_sae}")
        if normalize not in ("scalar", "none", "layer_norm"):
            raise ConfigError(f"normalize = {normalize!r} is not 'scalar', 'none' or 'layer_norm'")
        if activation is None:
            if k is None:
                raise ConfigError("SAE needs k (mean active latents per token) or an activation")
            activation = BatchTopK(k, inference)
        if k is not None and k > d_sae:
            raise ConfigError(f"k = {k:g} is more than d_sae = {d_sae}")
        self.d_in = d_in
        self.normalize: Normalize = normalize
        self.precision: Precision = "fp32"
        self.activation = activation
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._cfg: Cfg | None = None
        details = self.metadata.get("training_architecture_details")
        widths = details.get("matryoshka_widths") if isinstance(details, dict) else None
        self.levels = checked_levels(widths or (d_sae,), d_sae)

        rows = random_rows(d_sae, d_in, range(d_sae) if part is None else part, dtype, generator)
        if part is not None:
            d_sae = len(part)
            self.levels = (d_sae,)
        self.d_sae = d_sae
        self.W_enc = nn.Parameter((reference.ENCODER_START * rows).T)
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))
        self.register_buffer("scale", torch.ones((), dtype=dtype))
        self.to(device=device)

    @property
    def k(self) -> float | None:
        """Mean active latents per token; None where the activation has no such number."""
        return getattr(self.activation, "k", None)

    @property
    def inference(self) -> Inference | None:
        """How eval mode selects; None where the activation knows only one way."""
        return getattr(self.activation, "inference", None)

    @inference.setter
    def inference(self, mode: Inference) -> None:
        if not isinstance(self.activation, BatchTopK):
            name = type(self.activation).__name__
            raise ConfigError(f"{name} has one way to select, not {mode!r}")
        self.activation.inference = mode

    @property
    def threshold(self) -> Tensor | None:
        """The JumpReLU threshold in raw units: a number for BatchTopK, ``[F]`` for JumpReLU."""
        threshold = getattr(self.activation, "threshold", None)
        return None if threshold is None else threshold / self.output_scale

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.W_dec.shape[1]

    @property
    def output_scale(self) -> Tensor:
        """What a raw reconstruction, and raw latents, were multiplied by."""
        return self.scale

    @property
    def hook_name(self) -> str | None:
        """The place in the language model that this SAE reads, if known."""
        return self.metadata.get("hook_name")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of latents and reconstructions."""
        return self.W_dec.dtype

    @property
    def cfg(self) -> Cfg:
        """The settings under SAELens's names, made when first asked for, for other programs to read and set.
        fastsae itself does not read them."""
        if self._cfg is None:
            self._cfg = cfg_of(self)
        return self._cfg

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, normalize={self.normalize!r}"

    # --- encode and decode ---

    def encode(self, x: Tensor, inference: Inference | None = None) -> Tensor:
        """Latents ``[..., F]`` of activations ``x [..., D]``; entries not selected are exactly 0.

        ``inference`` overrides the mode for this call. In training mode without it, selection is over
        the batch and the threshold is tracked. Raises ValueError if the last dimension of x is not D.
        """
        scaled, _ = self.scale_input(x)
        pre = self._pre_activations(scaled)
        return self.to_raw_units(self._select(pre, inference, None))

    def encode_sparse(self, x: Tensor, inference: Inference | None = None) -> CSR:
        """The active latents of ``x [..., D]``: ``values``, ``indices`` (int32, ascending within a token)
        and row ``offsets [B + 1]``, B being the number of tokens. For inference; not differentiable."""
        with torch.no_grad():
            z = self.encode(x, inference).reshape(-1, self.d_sae)
            token, latent = z.nonzero(as_tuple=True)
            rows = torch.arange(len(z) + 1, device=z.device)
            return CSR(z[token, latent], latent.int(), torch.searchsorted(token, rows).int())

    def decode(self, z: Tensor, statistics: TokenStatistics | None = None) -> Tensor:
        """Reconstruction ``[..., D]`` of latents ``z [..., F]``.

        Under ``normalize="layer_norm"`` the latents do not hold the tokens' mean and standard deviation:
        give ``statistics=sae.token_statistics(x)``. Raises ValueError if they are missing, or the last
        dimension of z is not F.
        """
        return self._decode(z, statistics, (self.d_sae,))[0]

    def decode_levels(self, z: Tensor, statistics: TokenStatistics | None = None) -> Tensor:
        """Reconstructions ``[L, ..., D]`` by the first latents alone, as many as each of :attr:`levels`; the
        rest as :meth:`decode`, which the last is but for rounding."""
        return self._decode(z, statistics, self.levels)

    def _decode(
        self, z: Tensor, statistics: TokenStatistics | None, levels: tuple[int, ...]
    ) -> Tensor:
        if z.shape[-1] != self.d_sae:
            raise ValueError(f"decode expects latents [..., {self.d_sae}], got {tuple(z.shape)}")
        if self.normalize == "layer_norm" and statistics is None:
            raise ValueError(
                "this SAE normalizes each token (layer_norm): decode needs "
                "statistics=sae.token_statistics(x), or call sae(x)"
            )
        z = z * self.output_scale if self.normalize == "scalar" else z
        x_hats = reference.decode_levels(z, self._operand(self.W_dec), self.b_dec, levels)
        return self.to_raw_units(x_hats, statistics)

    def forward(self, x: Tensor, inference: Inference | None = None) -> Tensor:
        """Reconstruction ``[..., D]`` of activations ``x [..., D]``."""
        return self.decode(self.encode(x, inference), self.token_statistics(x))

    def token_statistics(self, x: Tensor) -> TokenStatistics | None:
        """Mean and unbiased std of each token under layer_norm, None otherwise."""
        return reference.token_statistics(x) if self.normalize == "layer_norm" else None

    # --- training by plain autograd ---

    @property
    def default_k_aux(self) -> int:
        """Dead latents per token in aux-k: ``2k``, or ``D / 2`` for an activation without a k.

        Against the ``D / 2`` of Gao et al., twice the live latents revived more dead ones at equal
        explained variance: each serves fewer tokens, and so finds a place of its own.
        """
        return max(1, self.d_in // 2 if self.k is None else round(2 * self.k))

    def loss(
        self,
        x: Tensor,
        dead: Tensor | None = None,
        *,
        budget: int | None = None,
        objective: Objective = "log",
        aux_coefficient: float | None = None,
        k_aux: int | None = None,
        aux_normalization: AuxNormalization = "residual_variance",
        target: Tensor | None = None,
    ) -> Loss:
        """The objective of training on activations ``x [..., D]``, differentiable by autograd.

        With several ``levels`` the error is the mean of theirs.

        Args:
            dead: bool ``[F]``, the latents that aux-k may revive; none if absent.
            budget: entries that BatchTopK selects in training mode; ``int(k * B)`` if absent.
            objective: ``log(error) + aux_coefficient * aux``, or without the logarithm (``"plain"``).
            aux_coefficient: weight of the aux-k loss; the objective's own if absent (``AUX_WEIGHTS``).
            k_aux: dead latents per token in it; :attr:`default_k_aux` if absent.
            aux_normalization: what its error is divided by.
            target: of a transcoder, ``[..., D_out]`` of the same tokens.

        Source: Gao et al. 2024 (arXiv:2406.04093), sections 2.3 and A.2.
        """
        scaled, statistics = self.scale_input(x.reshape(-1, x.shape[-1]))
        whole = scaled
        if target is not None:
            whole, statistics = self.scale_target(target.reshape(-1, target.shape[-1]))
        left = self.left_to_decoder(whole, scaled)
        pre = self._pre_activations(scaled)
        z = self._select(pre, None, budget)
        decoder = self._operand(self.W_dec), self.b_dec
        x_hats = reference.decode_levels(self._operand(z), *decoder, self.levels)
        error, x_hat = reference.squared_error(left, x_hats), x_hats[-1]
        aux = torch.zeros_like(error)
        weight = AUX_WEIGHTS[objective] if aux_coefficient is None else aux_coefficient
        if dead is not None and weight > 0:
            aux = reference.aux_k_loss(
                # b_dec as given: aux-k moves the dead latents, and nothing that the others share.
                self._pre_activations(scaled, self.b_dec.detach()),
                left - x_hat,
                self._operand(self.W_dec),
                dead,
                self.default_k_aux if k_aux is None else k_aux,
                aux_normalization,
                whole,
            )
        loss = reference.objective(error, aux, weight, objective)
        x_hat = x_hat if whole is left else x_hat + (whole - left)
        raw = self.to_raw_units(z), self.to_raw_units(x_hat, statistics)
        return Loss(loss, error, aux, *raw, left - x_hats)

    # --- input scaling ---

    def fold_scaling(self) -> SAE:
        """Move a scalar input scaling into the weights: ``b_enc/c``, ``b_dec/c``, ``threshold/c``.

        Outputs stay what they were; ``W_enc`` and the unit-norm ``W_dec`` are untouched. In place.
        """
        if self.normalize == "scalar":
            with torch.no_grad():
                for tensor in (self.b_enc, self.b_dec, getattr(self.activation, "threshold", None)):
                    if tensor is not None:
                        tensor /= self.scale.to(tensor.dtype)
                self.scale.fill_(1)
            self.normalize = "none"
        return self

    def scale_input(self, x: Tensor) -> tuple[Tensor, TokenStatistics | None]:
        """``x`` as the encoder sees it, and the token statistics if layer_norm needs them back."""
        self._require_width(x)
        x = x.to(self.W_dec.dtype)
        statistics = self.token_statistics(x)
        if statistics is not None:
            return reference.layer_norm(x, statistics), statistics
        return (x * self.scale if self.normalize == "scalar" else x), None

    def scale_target(self, target: Tensor) -> tuple[Tensor, TokenStatistics | None]:
        """What is to be reconstructed as the decoder sees it, the inverse of :meth:`to_raw_units`."""
        return self.scale_input(target)

    def left_to_decoder(self, whole: Tensor, scaled: Tensor) -> Tensor:
        """What of the scaled target the decoder has to give, for a scaled input: all, of an autoencoder."""
        return whole

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise ValueError(f"this SAE reads activations [..., {self.d_in}], got {tuple(x.shape)}")

    def to_raw_units(self, x: Tensor, statistics: TokenStatistics | None = None) -> Tensor:
        """Scaled activations, the inverse of :meth:`scale_input`; or, without statistics, latents."""
        if statistics is not None:
            return reference.undo_layer_norm(x, statistics)
        return x / self.scale if self.normalize == "scalar" else x

    def _pre_activations(self, scaled: Tensor, b_dec: Tensor | None = None) -> Tensor:
        # The difference is taken in full precision, and only then rounded to the operands'.
        centred = scaled - (self.b_dec if b_dec is None else b_dec)
        return self._operand(centred) @ self._operand(self.W_enc) + self.b_enc

    def _select(self, pre: Tensor, inference: Inference | None, budget: int | None) -> Tensor:
        if isinstance(self.activation, BatchTopK):
            return self.activation(pre, inference, budget)
        if inference is not None:
            raise ConfigError(
                f"this SAE selects by {type(self.activation).__name__}; inference = {inference!r} needs BatchTopK"
            )
        return self.activation(pre)

    def _operand(self, t: Tensor) -> Tensor:
        """``t`` rounded to what a matrix product of this precision reads; gradients pass unchanged."""
        if self.precision != "bf16":
            return t
        return t + (t.bfloat16().to(t.dtype) - t).detach()


ROWS_TOGETHER = 1024


def random_rows(
    d_sae: int, width: int, part: range, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Those of ``part`` among ``d_sae`` random unit rows, the same whatever the part.

    Drawn on the CPU in fp32, so that a seed gives the same weights on every device; and in blocks, so that
    the others' rows need no memory. A draw of fewer than 16 numbers goes another way, so that no block is
    as small as that, and the blocks have the bits of one draw.
    """
    rows = torch.empty(len(part), width, dtype=dtype)
    last = max(0, d_sae - 16)  # where a block may begin
    starts = [*range(0, last + 1, ROWS_TOGETHER), d_sae]
    for first, stop in itertools.pairwise(starts):
        if first >= part.stop:
            break
        block = torch.randn(stop - first, width, generator=generator)
        here = range(max(first, part.start), min(stop, part.stop))
        if len(here):
            block = block[here.start - first : here.stop - first].to(dtype)
            rows[here.start - part.start : here.stop - part.start] = reference.normalize_rows(block)
    return rows
