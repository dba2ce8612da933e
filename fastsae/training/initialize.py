"""Warm start: a new run that begins with the latents of a finished SAE.

What :func:`fastsae.load` gives takes raw activations, with any scaling folded into its biases. A run
scales its inputs by a constant of its own, so the SAE is unfolded by that constant first; either way
the run's first reconstructions are those of the SAE it came from.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import ConfigError
from ..sae.activation import BatchTopK
from ..sae.io import load
from ..sae.module import SAE

log = logging.getLogger(__name__)

UNIT_NORM_TOLERANCE = 1e-5
"""Decoder rows whose norm is this close to 1 are taken as they are: they differ by rounding alone."""


def load_origin(config: TrainConfig) -> SAE:
    """The SAE that ``config.init_from`` names, in fp32 on the CPU.

    Raises:
        FormatError: there is none, or fastsae cannot read it.
        ConfigError: its input scaling or its number of latents is not the run's.
    """
    assert config.init_from is not None
    origin = load(config.init_from).float()
    if (origin.normalize == "layer_norm") != (config.normalize == "layer_norm"):
        wanted = "layer_norm" if origin.normalize == "layer_norm" else "scalar (or none)"
        raise ConfigError(
            f"the SAE in {config.init_from} was trained with normalize = {origin.normalize!r}, which no "
            f"change of its weights turns into {config.normalize!r}; give --normalize {wanted}"
        )
    if config.d_sae is not None and config.d_sae != origin.d_sae:
        raise ConfigError(
            f"the SAE in {config.init_from} has {origin.d_sae} latents, d_sae = {config.d_sae} was asked "
            f"for; leave --d-sae out to keep its latents"
        )
    if config.expansion is not None and round(config.expansion * origin.d_in) != origin.d_sae:
        raise ConfigError(
            f"the SAE in {config.init_from} has {origin.d_sae} latents, expansion = "
            f"{config.expansion:g} asks for {round(config.expansion * origin.d_in)}; leave --expansion "
            f"out to keep its latents"
        )
    for k in config.ks:
        if k > origin.d_sae:
            raise ConfigError(
                f"k = {k:g} is more than the {origin.d_sae} latents of the SAE in {config.init_from}; "
                f"lower k"
            )
    return origin


@torch.no_grad()
def continue_from(origin: SAE, sae: SAE, source: str) -> None:
    """Give ``sae``, whose input scaling is set, the latents of ``origin``; in place.

    Decoder rows that are not unit vectors are normalised and their norms moved into the encoder, so
    that every reconstruction stays what it was. A latent whose decoder row is zero does not exist
    yet: it keeps the random start it has. The tracked threshold is taken over where it still means
    the same: from a BatchTopK of the same k with unit rows.

    Args:
        origin: takes raw activations, apart from ``layer_norm``; not changed.
        sae: a new SAE of the same shape and kind of scaling.
        source: where ``origin`` came from, for messages and the metadata.

    Raises:
        ConfigError: the shapes differ.
    """
    if origin.d_in != sae.d_in:
        raise ConfigError(
            f"the SAE in {source} reads activations of width {origin.d_in}, this run's have width "
            f"{sae.d_in}; continue it on a model of its width"
        )
    assert origin.d_sae == sae.d_sae and isinstance(sae.activation, BatchTopK)
    norms = origin.W_dec.double().norm(dim=1)
    unit = bool((norms - 1).abs().max() <= UNIT_NORM_TOLERANCE)
    if unit:
        norms = torch.ones_like(norms)
    constant = sae.scale.double().cpu()
    exists = (norms > 0).to(sae.W_dec.device)

    def put(parameter: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(value if mask is None else torch.where(mask, value, parameter))

    put(sae.W_dec, origin.W_dec.double() / norms.clamp_min(1e-300)[:, None], exists[:, None])
    put(sae.W_enc, origin.W_enc.double() * norms, exists)
    put(sae.b_enc, origin.b_enc.double() * norms * constant, exists)
    put(sae.b_dec, origin.b_dec.double() * constant)
    kind = type(origin.activation).__name__
    same_threshold = isinstance(origin.activation, BatchTopK) and origin.k == sae.k and unit
    if same_threshold:
        assert isinstance(origin.activation, BatchTopK)
        put(sae.activation.threshold, origin.activation.threshold.double() * constant)
        put(sae.activation.threshold_updates, origin.activation.threshold_updates)
    sae.metadata["warm_start"] = _provenance(origin, source, kind)
    log.info(
        "warm start: %s latents of %s (%s)%s%s%s",
        f"{origin.d_sae:,}",
        source,
        kind if origin.k is None else f"{kind}, k = {origin.k:g}",
        "" if unit else "; decoder rows normalised, their norms moved into the encoder",
        "" if exists.all() else f"; {int((~exists).sum())} with a zero decoder row start anew",
        ""
        if same_threshold
        else "; its weights are taken, its threshold is not: selection is "
        f"BatchTopK, k = {sae.k:g}",
    )


def _provenance(origin: SAE, source: str, kind: str) -> dict[str, Any]:
    known = ("model_name", "hook_name", "dataset_path")
    return {
        "source": source,
        "activation": kind,
        "k": origin.k,
        **{name: origin.metadata[name] for name in known if name in origin.metadata},
    }
