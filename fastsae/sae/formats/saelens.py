"""SAELens: ``cfg.json``, ``sae_weights.safetensors`` and the same tensors as ``sae_weights.pt``.

Written for, and tested against, the version in ``SAE_LENS_VERSION``. SAELens has no BatchTopK for
inference: it is an SAE of architecture ``topk`` (per token, a whole k) or ``jumprelu`` (a threshold
per latent), and a transcoder one of those with a threshold. What these lose, the exact k and the tracked threshold, stands in ``metadata.fastsae``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..activation import JumpReLU
from ..cfg import transformer_lens_name
from ..module import SAE
from . import portable

CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")

HF_HOOK_NAME = "hf_hook_name"
"""Where the path of the hooked module stands, beside TransformerLens's name of it."""

_TRANSCODERS = (
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip

SAE_LENS_VERSION = "6.54.12"
"""The version whose format is written. SAELens takes a config without one as older than 6.0."""


_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""How SAELens calls what it trains with one threshold for all latents and a k that is an average."""


def to_files(sae: portable.ExportedSAE) -> dict[str, Any]:
    """File names and contents."""
    tensors = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    settings: dict[str, Any] = {
        "d_in": sae.W_enc.shape[0],
        "d_sae": sae.W_enc.shape[1],
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
    }
    kind = ""
    if sae.transcoder:
        if sae.k is not None:
            raise FormatError(
                "SAELens has no transcoder that selects k latents of each token; save it with "
                "inference='threshold'"
            )
        settings |= {"d_out": sae.W_dec.shape[1], "apply_b_dec_to_input": False}
        kind = "_transcoder"
        if sae.W_skip is not None:
            kind, tensors["W_skip"] = "_skip_transcoder", sae.W_skip
    if sae.k is not None:
        settings |= {"k": sae.k, "rescale_acts_by_decoder_norm": False, "architecture": "topk"}
    else:
        settings["architecture"] = f"jumprelu{kind}"
        assert sae.threshold is not None
        threshold = sae.threshold.to(sae.b_enc.dtype)
        tensors["threshold"] = threshold.expand_as(sae.b_enc).contiguous()
    # SAELens's own tools fail on an absent entry of these; they say "nothing special".
    defaults: dict[str, Any] = {"sae_lens_training_version": None, "hook_head_index": None}
    defaults |= {"seqpos_slice": [None], "model_from_pretrained_kwargs": {}}
    if "k" in sae.provenance:
        defaults["training_architecture"] = "batchtopk"
        defaults["training_architecture_details"] = {"k": sae.provenance["k"]}
    # SAELens attaches an SAE by TransformerLens's name of its hook, and passes over one it does not know.
    path = sae.metadata.get("hook_name")
    name = transformer_lens_name(path)
    if name not in (None, path):
        defaults[HF_HOOK_NAME] = path
    filled_in = [name for name in defaults if name not in sae.metadata]
    own: dict[str, Any] = {"sae_lens_version": SAE_LENS_VERSION}
    own |= {"fastsae": {**sae.provenance, "filled_in": filled_in}}
    settings["metadata"] = defaults | sae.metadata | own
    if name is not None:
        settings["metadata"]["hook_name"] = name
    return {CONFIG: settings, **dict.fromkeys(WEIGHTS, tensors)}


def from_files(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """The SAE of a config and its weights. Raises FormatError if fastsae has none like it."""
    metadata = portable.section(config, "metadata")
    architecture = _architecture(config, metadata)
    d_in, d_sae = portable.positive_int(config, "d_in"), portable.positive_int(config, "d_sae")
    transcoder = "transcoder" in architecture
    d_out = portable.positive_int(config, "d_out") if transcoder else d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (d_sae,)
    dtype = portable.DTYPES.get(str(config.get("dtype")).removeprefix("torch."))
    if dtype is None:
        raise FormatError(
            f"dtype = {config.get('dtype')!r} in cfg.json is not one of {', '.join(portable.DTYPES)}"
        )
    weights = {name: t.to(dtype) for name, t in portable.take_tensors(tensors, shapes).items()}
    threshold = weights.pop("threshold", None)
    if not transcoder:  # SAELens applies none of its options to one
        _fold_options(config, architecture, weights)

    provenance = portable.section(metadata, "fastsae")
    if not provenance and metadata.get("training_architecture") in _BATCH_TOPK:
        provenance = {"k": portable.section(metadata, "training_architecture_details").get("k")}
    if architecture == "topk":
        activation = portable.topk_activation(portable.positive_int(config, "k"), d_sae, provenance)
    elif threshold is not None:
        activation = portable.threshold_activation(threshold, provenance)
    else:
        activation = JumpReLU(torch.zeros((), dtype=dtype))

    filled_in = provenance.get("filled_in")
    own = {"sae_lens_version", "fastsae", *(filled_in if isinstance(filled_in, list) else ())}
    kept = {name: value for name, value in metadata.items() if name not in own}
    path = metadata.get(HF_HOOK_NAME)
    if HF_HOOK_NAME in own and kept.get("hook_name") == transformer_lens_name(path):
        kept["hook_name"] = path
    return portable.build(weights, activation, kept, _normalize(config), transcoder)


def _architecture(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < 6:
        raise FormatError(
            f"cfg.json was written by SAELens {version or 'of unknown version'}; before 6.0 a config "
            f"left its architecture to be guessed. Load the SAE with SAELens 6 and save it again "
            f"with save_model"
        )
    architecture = config.get("architecture")
    if architecture == "batchtopk":
        raise FormatError(
            "this is a training checkpoint of SAELens (architecture 'batchtopk'); load it there with "
            "TrainingSAE.load_from_disk and write the SAE with save_inference_model"
        )
    if architecture not in ("standard", "topk", "jumprelu", *_TRANSCODERS):
        raise FormatError(
            f"architecture = {architecture!r}; fastsae reads 'standard', 'topk', 'jumprelu' and "
            f"{', '.join(map(repr, _TRANSCODERS))}"
        )
    return architecture


def _normalize(config: dict[str, Any]) -> Any:
    normalize = config.get("normalize_activations", "none")
    if normalize not in ("none", "layer_norm"):
        raise FormatError(
            f"normalize_activations = {normalize!r}; fastsae reads 'none' and 'layer_norm'. SAELens's "
            f"trainer folds scaling and whitening by constants into the weights when it ends: save the "
            f"SAE from there"
        )
    reshape = config.get("reshape_activations", "none")
    if reshape != "none":
        raise FormatError(
            f"reshape_activations = {reshape!r}: fastsae's SAEs read [..., d_in]; set it to 'none' in "
            f"cfg.json and flatten the heads of the activations yourself"
        )
    return normalize


def _fold_options(config: dict[str, Any], architecture: str, weights: dict[str, Tensor]) -> None:
    """Rewrite ``weights`` so that the options of SAELens which fastsae does not have are off.

    Algebraically exact; worked out in float64.
    """
    if not config.get("apply_b_dec_to_input", True):
        # x W + b = (x - b_dec) W + (b + b_dec W)
        shift = weights["b_dec"].double() @ weights["W_enc"].double()
        weights["b_enc"] = (weights["b_enc"].double() + shift).to(weights["b_enc"].dtype)
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False):
        # Latents are compared, and given out, times the norm of their decoder row.
        norms = weights["W_dec"].double().norm(dim=-1)
        if not norms.all():
            raise FormatError(
                f"rescale_acts_by_decoder_norm is set and decoder row {int(norms.argmin())} is zero: "
                f"SAELens would divide by its norm; remove that latent or turn the option off"
            )
        for name, factor in (("W_enc", norms), ("b_enc", norms), ("W_dec", 1 / norms[:, None])):
            weights[name] = (weights[name].double() * factor).to(weights[name].dtype)
