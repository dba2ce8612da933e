"""dictionary_learning: ``config.json`` and ``ae.pt``, read by its ``utils.load_dictionary``.

Top-k per token is its ``AutoEncoderTopK``, one threshold is its ``BatchTopKSAE``. Both compute
``relu(encoder(x - b_dec))`` first, so a zero among the k largest is the same as an unselected entry,
and a threshold below 0, their mark of "not known yet", makes a ReLU.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..module import SAE
from . import portable

CONFIG = "config.json"
WEIGHTS = ("ae.pt",)

_TRAINERS = {"AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer"}


def to_files(sae: portable.ExportedSAE) -> dict[str, Any]:
    """File names and contents. Raises FormatError for layer_norm, and for JumpReLU without a k."""
    portable.refuse_transcoder(sae, "dictionary_learning")
    if sae.normalize != "none":
        raise FormatError(
            f"dictionary_learning's format has no place for normalize = {sae.normalize!r}; save as "
            f"'saelens', or train with normalize='scalar'"
        )
    if sae.k is not None:
        dict_class, k = "AutoEncoderTopK", sae.k
    elif "k" in sae.provenance:
        # At inference this class selects by the threshold; its whole k is for training alone.
        dict_class, k = "BatchTopKSAE", max(1, round(sae.provenance["k"]))
    else:
        raise FormatError(
            "dictionary_learning's BatchTopKSAE has a k and one threshold for all latents; this "
            "JumpReLU SAE has no k and may have a threshold for each latent. Save it as 'saelens'"
        )
    threshold = sae.threshold
    if threshold is None or (sae.k is not None and not sae.provenance["threshold_updates"]):
        threshold = torch.tensor(-1.0)  # not known
    d_in, d_sae = sae.W_enc.shape
    hook_name = sae.metadata.get("hf_hook_name", sae.metadata.get("hook_name"))
    layer = re.search(r"\.(\d+)(\.|$)", str(hook_name))
    config = {
        "trainer": {
            "trainer_class": _TRAINERS[dict_class],
            "dict_class": dict_class,
            "activation_dim": d_in,
            "dict_size": d_sae,
            "k": k,
            "device": "cpu",
            "layer": int(layer[1]) if layer else None,
            "lm_name": sae.metadata.get("model_name"),
            "submodule_name": hook_name,
        },
        "buffer": {"d_submodule": d_in, "ctx_len": sae.metadata.get("context_size")},
        "fastsae": {**sae.provenance, "metadata": sae.metadata},
    }
    tensors = {
        "b_dec": sae.b_dec,
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": threshold.float(),
        "decoder.weight": sae.W_dec.T.contiguous(),
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
    }
    return {CONFIG: config, WEIGHTS[0]: tensors}


def _hook_name(submodule: object, io: object) -> str | None:
    """The hook that a module and its side stand for: the input of a layer is the stream before it."""
    if not isinstance(submodule, str):
        return None
    layer = re.fullmatch(r"resid_post_layer_(\d+)|(?:[A-Za-z_]\w*\.)+(\d+)", submodule)
    if io == "in" and layer:
        return f"blocks.{layer[1] or layer[2]}.hook_resid_pre"
    return f"{submodule}, {io}" if io == "in_and_out" else submodule + ".input" * (io == "in")


def from_files(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """The SAE of a config and its weights. Raises FormatError if fastsae has none like it."""
    trainer = portable.section(config, "trainer")
    dict_class = trainer.get("dict_class")
    if dict_class not in _TRAINERS:
        raise FormatError(
            f"dict_class = {dict_class!r}; of dictionary_learning's classes fastsae reads "
            f"{' and '.join(_TRAINERS)}"
        )
    encoder = tensors.get("encoder.weight", torch.empty(0, 0))
    if encoder.dim() != 2:
        raise FormatError(f"encoder.weight has shape {tuple(encoder.shape)}, expected (F, D)")
    d_sae, d_in = encoder.shape
    halves = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    halves |= {"decoder.weight": (d_in, d_sae), "b_dec": (d_in,)}
    found = portable.take_tensors(tensors, {**halves, "k": (), "threshold": ()})
    k = int(found["k"])
    for name, value in (("activation_dim", d_in), ("dict_size", d_sae), ("k", k)):
        if trainer.get(name, value) != value:
            raise FormatError(
                f"config.json says {name} = {trainer[name]!r} but ae.pt has {value}; they do not "
                f"belong together"
            )
    portable.check_k(k, d_sae)

    provenance = portable.section(config, "fastsae")
    if provenance:
        metadata = portable.section(provenance, "metadata")
    else:
        buffer = portable.section(config, "buffer")
        known = {
            "model_name": trainer.get("lm_name"),
            "hook_name": _hook_name(trainer.get("submodule_name"), buffer.get("io")),
            "context_size": buffer.get("ctx_len"),
        }
        metadata = {name: value for name, value in known.items() if value is not None}
    if dict_class == "AutoEncoderTopK":
        activation = portable.topk_activation(k, d_sae, provenance)
    else:
        threshold = found["threshold"].clamp_min(0)
        activation = portable.threshold_activation(threshold, {"k": k} | provenance)
    weights = {"W_enc": encoder.T, "W_dec": found["decoder.weight"].T}
    biases = {"b_enc": found["encoder.bias"], "b_dec": found["b_dec"]}
    return portable.build(weights | biases, activation, metadata)
