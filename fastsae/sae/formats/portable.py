"""What all formats share: an SAE as other programs hold one, and an SAE made of what they hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import FormatError
from ...version import __version__
from ..activation import BatchTopK, Inference, JumpReLU, TopK
from ..module import SAE
from ..transcoder import Transcoder

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


class ExportedSAE(NamedTuple):
    """An SAE that takes raw activations: tensors on the CPU, contiguous, finite, of one dtype."""

    W_enc: Tensor  # [D, F]
    W_dec: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    b_dec: Tensor  # [D]
    k: int | None  # active latents per token; None: the latents above the threshold
    threshold: Tensor | None  # [] or [F]; beside a k, what BatchTopK tracked, if anything
    normalize: Literal["none", "layer_norm"]
    metadata: dict[str, Any]
    provenance: dict[str, Any]  # what only fastsae knows and needs to read the SAE back as it was
    transcoder: bool = (
        False  # W_dec and b_dec are [F, D_out] and [D_out], and b_dec is not the input's
    )
    W_skip: Tensor | None = None  # [D_out, D_in]


def export(sae: SAE, inference: Inference | None) -> ExportedSAE:
    """``sae`` with its scaling folded in, selecting by ``inference`` (its own mode if absent).

    Raises:
        FormatError: no program could select that way, or a value is not finite.
    """
    k = _k_per_token(sae, inference)
    transcoder = isinstance(sae, Transcoder)
    if transcoder:
        sae = copy.deepcopy(sae).fold_scaling()
    # Folding: the scaled SAE sees c x, so dividing what is added or compared by c gives the same.
    # c is 1 without scalar scaling.
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec}
    tensors |= {"b_enc": sae.b_enc / sae.scale, "b_dec": sae.b_dec / sae.scale}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    if isinstance(sae, Transcoder) and sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    # Copied always: a tensor that is a view of a larger one would take all of that to the file.
    weights = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    _require_finite(weights)
    threshold, W_skip = weights.pop("threshold", None), weights.pop("W_skip", None)
    dtypes = {t.dtype for t in weights.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        raise FormatError(
            f"the SAE's weights are {', '.join(sorted(map(str, dtypes)))}; they must all be one of "
            f"{', '.join(DTYPES)}: convert the SAE, for example with sae.float()"
        )
    provenance: dict[str, Any] = {"fastsae_version": __version__}
    if isinstance(sae.activation, BatchTopK) and threshold is not None:
        provenance |= {
            "k": sae.activation.k,
            "threshold": threshold.item(),
            "threshold_updates": int(sae.activation.threshold_updates),
            "inference": "threshold" if k is None else "topk",
        }
    normalize = "layer_norm" if sae.normalize == "layer_norm" else "none"
    metadata = dict(sae.metadata)
    rest = (k, threshold, normalize, metadata, provenance, transcoder, W_skip)
    return ExportedSAE._make((*weights.values(), *rest))


def refuse_transcoder(sae: ExportedSAE, format: str) -> None:
    """Raise FormatError if ``sae`` is one."""
    if sae.transcoder:
        raise FormatError(
            f"{format}'s format holds autoencoders, and this is a transcoder; save it as 'saelens'"
        )


def _k_per_token(sae: SAE, inference: Inference | None) -> int | None:
    activation, mode = sae.activation, inference or sae.inference
    if isinstance(activation, BatchTopK) and mode == "batch":
        raise FormatError(
            "inference = 'batch' selects over whatever batch comes, which no format can hold; "
            "save with inference='topk' or 'threshold'"
        )
    if isinstance(activation, (BatchTopK, TopK)) and mode in ("topk", None):
        return min(max(1, round(activation.k)), sae.d_sae)
    if isinstance(activation, (BatchTopK, JumpReLU)) and mode in ("threshold", None):
        return None
    raise FormatError(
        f"an SAE that selects by {type(activation).__name__} cannot be saved with inference = "
        f"{inference!r}; BatchTopK can be saved as 'topk' or 'threshold', TopK as 'topk', JumpReLU as "
        f"'threshold'"
    )


def build(
    weights: dict[str, Tensor],
    activation: nn.Module,
    metadata: dict[str, Any],
    normalize: Literal["none", "layer_norm"] = "none",
    transcoder: bool = False,
) -> SAE:
    """An SAE of ``W_enc [D, F]``, ``W_dec [F, D]``, ``b_enc [F]`` and ``b_dec [D]``, in W_enc's dtype; or a
    transcoder, of ``W_skip [D_out, D_in]`` too if it is there."""
    dtype = weights["W_enc"].dtype
    if dtype not in DTYPES.values():
        raise FormatError(f"the weights are {dtype}, expected one of {', '.join(DTYPES)}")
    d_in, d_sae = weights["W_enc"].shape
    # A generator of its own: reading an SAE must not move the caller's random numbers.
    options: dict[str, Any] = {"normalize": normalize, "activation": activation}
    options |= {"metadata": metadata, "dtype": dtype, "generator": torch.Generator()}
    if transcoder:
        d_out, skip = len(weights["b_dec"]), "W_skip" in weights
        sae = Transcoder(d_in, d_out, d_sae, skip=skip, **options)
    else:
        sae = SAE(d_in, d_sae, **options)
    with torch.no_grad():
        for name, tensor in weights.items():
            getattr(sae, name).copy_(tensor)
    return sae


def topk_activation(k: int, d_sae: int, provenance: dict[str, Any]) -> BatchTopK | TopK:
    """Top-k per token; BatchTopK where ``provenance`` has an exact k that rounds to ``k``.

    What the format itself states wins: provenance that contradicts it was overtaken by an edit.
    """
    check_k(k, d_sae)
    exact = _number(provenance, "k")
    if exact is None or min(max(1, round(exact)), d_sae) != k:
        return TopK(k)
    threshold = torch.tensor(_number(provenance, "threshold") or 0.0, dtype=torch.float64)
    return _batch_topk(exact, "topk", threshold, provenance)


def threshold_activation(threshold: Tensor, provenance: dict[str, Any]) -> BatchTopK | JumpReLU:
    """A JumpReLU at ``threshold [] or [F]``; BatchTopK where it is one number and k is known."""
    exact = _number(provenance, "k")
    lowest, highest = threshold.aminmax()
    if exact is None or lowest != highest:
        return JumpReLU(threshold)
    # The file may hold a rounded copy of the number that provenance has in full.
    known = torch.tensor(_number(provenance, "threshold") or 0.0, dtype=torch.float64)
    same = known.to(threshold.dtype) == lowest
    return _batch_topk(exact, "threshold", known if same else lowest.double(), provenance)


def _batch_topk(
    k: float, inference: Inference, threshold: Tensor, provenance: dict[str, Any]
) -> BatchTopK:
    activation = BatchTopK(k, inference)
    # float32 unless the number needs more, as it does in an SAE of float64.
    exact_in_float32 = threshold.float().double() == threshold
    activation.threshold = threshold.float() if exact_in_float32 else threshold
    activation.threshold_updates.fill_(int(_number(provenance, "threshold_updates") or 0))
    return activation


def _number(provenance: dict[str, Any], name: str) -> float | None:
    value = provenance.get(name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < math.inf):
        raise FormatError(
            f"fastsae's own entry {name!r} is {value!r}, expected a finite number of at least 0; "
            f"restore it, or delete the entry 'fastsae' to read the SAE without it"
        )
    return value


def take_tensors(
    tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Exactly the tensors that ``shapes`` names. Raises FormatError for any difference or NaN."""
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise FormatError(
            f"the weights lack {', '.join(missing)}; they have {', '.join(sorted(tensors))}. Save the "
            f"SAE again with the program that made it"
        )
    strangers = sorted(set(tensors) - set(shapes))
    if strangers:
        raise FormatError(
            f"the weights hold {', '.join(strangers)} besides {', '.join(shapes)}: an SAE of a kind "
            f"fastsae does not have would lose its meaning without them"
        )
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            reason = (
                "the matrix is stored transposed: the program that wrote it keeps another format"
                if found == shape[::-1]
                else "config and weights do not belong together"
            )
            raise FormatError(f"{name} has shape {found}, expected {shape}; {reason}")
    _require_finite(tensors)
    return tensors


def _require_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise FormatError(
                f"{name} has {bad} of {tensor.numel()} values that are not finite; the training "
                f"diverged or the weights are damaged: use an earlier checkpoint"
            )


def positive_int(config: dict[str, Any], name: str) -> int:
    """``config[name]``, a whole number of at least 1."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(
            f"the config's {name} is {value!r}, expected a whole number of at least 1"
        )
    return value


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """``config[name]``, an object; empty if absent."""
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise FormatError(f"the config's {name} is a {type(value).__name__}, expected an object")
    return value


def check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise FormatError(f"k = {k} active latents of d_sae = {d_sae} is not possible")
