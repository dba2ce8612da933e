"""sparsify (EleutherAI): ``cfg.json`` and ``sae.safetensors``, read by ``SparseCoder.load_from_disk``.

Top-k per token of ``relu(encoder(x - b_dec))``; ``W_dec`` is stored one latent a row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import FormatError
from ..module import SAE
from .portable import (
    ExportedSAE,
    build,
    positive_int,
    refuse_transcoder,
    section,
    take_tensors,
    topk_activation,
)

CONFIG = "cfg.json"
WEIGHTS = ("sae.safetensors",)

# What sparsify's config may turn on that changes the mathematics, and what it is when turned off.
_PLAIN = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}


def to_files(sae: ExportedSAE) -> dict[str, Any]:
    """File names and contents. Raises FormatError for anything but top-k of unnormalized inputs."""
    refuse_transcoder(sae, "sparsify")
    if sae.k is None:
        raise FormatError(
            "sparsify's format has no thresholds, only k active latents per token; save with "
            "inference='topk', or as 'saelens'"
        )
    if sae.normalize != "none":
        raise FormatError(
            f"sparsify's format has no place for normalize = {sae.normalize!r}; save as 'saelens', or "
            f"train with normalize='scalar'"
        )
    d_in, d_sae = sae.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),  # not read where num_latents is given
        "normalize_decoder": True,
        "num_latents": d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
        "fastsae": {**sae.provenance, "metadata": sae.metadata},
    }
    tensors = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    return {CONFIG: config, WEIGHTS[0]: tensors}


def from_files(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """The SAE of a config and its weights. Raises FormatError if fastsae has none like it."""
    for name, plain in _PLAIN.items():
        if config.get(name, plain) != plain:
            raise FormatError(
                f"{name} = {config[name]!r}: fastsae reads plain top-k autoencoders, with {name} = "
                f"{plain!r}; use this sparse coder with sparsify itself"
            )
    d_in, k = positive_int(config, "d_in"), positive_int(config, "k")
    # sparsify writes 0 for "expansion_factor times d_in".
    if config.get("num_latents"):
        d_sae = positive_int(config, "num_latents")
    else:
        d_sae = d_in * positive_int(config, "expansion_factor")
    encoder = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    weights = take_tensors(tensors, {**encoder, "W_dec": (d_sae, d_in), "b_dec": (d_in,)})
    weights["W_enc"] = weights.pop("encoder.weight").T
    weights["b_enc"] = weights.pop("encoder.bias")
    provenance = section(config, "fastsae")
    activation = topk_activation(k, d_sae, provenance)
    return build(weights, activation, section(provenance, "metadata"))
