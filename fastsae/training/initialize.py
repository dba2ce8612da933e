"""Where the SAE of a run comes from: its first activations, or the latents of a finished SAE (warm start).

What :func:`fastsae.load` gives takes raw activations, with any scaling folded into its biases. A run
scales its inputs by a constant of its own, so the SAE is unfolded by that constant first; either way
the run's first reconstructions are those of the SAE it came from. Unless its scale and bias are those of
other activations, as of a base model's where an instruct model's come: then they are estimated anew.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastsae_kernels import reference

from ..config import Sweep, TrainConfig, checked_levels
from ..device import resolve_device, resolve_precision
from ..errors import ConfigError, StreamError
from ..sae.activation import BatchTopK
from ..sae.io import load
from ..sae.module import SAE
from ..sae.transcoder import Transcoder

log = logging.getLogger(__name__)

LEAST_SPREAD = 1e-6
"""Activations that differ by less than this share of their norm differ by rounding alone."""
REFIT_GAIN = 0.01
"""What a new scale and bias must add to the explained variance to be taken."""
REFIT_SCALES = [2.0**i for i in range(-6, 7)]
"""What the activations of the origin may be, as multiples of the run's."""
REFIT_ROWS = 1024
UNIT_NORM_TOLERANCE = 1e-5
"""Decoder rows whose norm is this close to 1 are taken as they are: they differ by rounding alone."""


def initialize_sae(
    config: TrainConfig,
    rows: Tensor,
    origin: SAE | None = None,
    metadata: dict[str, Any] | None = None,
    target: Tensor | None = None,
    part: range | None = None,
) -> SAE:
    """The SAE that a run begins with: scaled by its first activations, with latents of its own seed or
    those of ``origin``.

    Args:
        rows: ``[N, D]``, the first activations.
        origin: what ``config.init_from`` names, see :func:`load_origin`; not changed.
        metadata: provenance of the activations, which travels with the SAE.
        target: ``[N, D_out]``, what a transcoder is to reconstruct of the same tokens.
        part: of an autoencoder, hold these latents alone.

    Raises:
        ConfigError: k exceeds the dictionary, or ``origin`` has another width.
        StreamError: the rows are not finite, or all the same.
    """
    d_in = rows.shape[1]
    d_sae = config.resolve_d_sae(d_in) if origin is None else origin.d_sae
    if config.target is not None and target is not None:
        sae = new_sae(config, d_in, d_sae, metadata, target.shape[1])
        _estimate_of_transcoder(sae, rows, target)
        return sae
    sae = new_sae(config, d_in, d_sae, metadata, part=part if origin is None else None)
    _estimate_scaling(sae, rows)
    if origin is not None:
        assert config.init_from is not None
        center = sae.b_dec.detach().clone()
        _continue_from(origin, sae, config.init_from)
        _refit(sae, rows[:REFIT_ROWS], center)
        if part is not None:
            return _part_of(sae, part, config)
    return sae


def new_sae(
    config: TrainConfig,
    d_in: int,
    d_sae: int,
    metadata: dict[str, Any] | None = None,
    d_out: int | None = None,
    part: range | None = None,
) -> SAE:
    """The SAE of a run, of its latents ``part`` alone if given, or its transcoder to width ``d_out``, before it
    has seen any activation."""
    if config.matryoshka:
        details = {"k": config.k, "matryoshka_widths": list(config.matryoshka)}
        nested = {"training_architecture": "matryoshka_batchtopk"}
        metadata = (metadata or {}) | nested | {"training_architecture_details": details}
    device = resolve_device(config.device)
    options: dict[str, Any] = {
        "normalize": config.normalize,
        "metadata": metadata,
        "device": device,
        "generator": torch.Generator().manual_seed(config.seed),
    }
    if config.target is None:
        sae = SAE(d_in, d_sae, config.k, part=part, **options)
    else:
        assert d_out is not None
        sae = Transcoder(d_in, d_out, d_sae, config.k, skip=config.skip, **options)
    sae.precision = resolve_precision(config.precision, device)
    return sae


def _part_of(whole: SAE, part: range, config: TrainConfig) -> SAE:
    """An SAE of some latents of ``whole``."""
    sae = new_sae(config, whole.d_in, whole.d_sae, part=part)
    state, at = whole.state_dict(), slice(part.start, part.stop)
    state |= {"W_enc": state["W_enc"][:, at]}
    state |= {name: state[name][at] for name in ("W_dec", "b_enc")}
    sae.load_state_dict(state)
    sae.metadata = whole.metadata
    return sae


@torch.no_grad()
def _estimate_scaling(sae: SAE, rows: Tensor) -> None:
    """Set the scaling constant and ``b_dec`` (the geometric median) of a new SAE from ``rows [N, D]``."""
    rows = sae.scale_input(_finite(rows, sae))[0]
    center = reference.geometric_median(rows)
    if sae.normalize == "scalar":
        sae.scale.copy_(_scale_constant(rows, center, sae, "input"))
    sae.b_dec.copy_(center * sae.scale)


@torch.no_grad()
def _estimate_of_transcoder(sae: SAE, rows: Tensor, target: Tensor) -> None:
    """Set both scales, the centre of the input and ``b_dec`` of a new transcoder from its first activations."""
    assert isinstance(sae, Transcoder)
    rows, target = _finite(rows, sae), _finite(target, sae)
    sae.center.copy_(reference.geometric_median(rows))
    center = reference.geometric_median(target)
    if sae.normalize == "scalar":
        sae.target_scale.copy_(_scale_constant(target, center, sae, "target"))
        sae.scale.copy_(_scale_constant(rows, sae.center, sae, "input"))
    sae.b_dec.copy_(center * sae.target_scale)


def _finite(rows: Tensor, sae: SAE) -> Tensor:
    rows = rows.to(sae.W_dec.device, sae.W_dec.dtype)
    if not rows.isfinite().all():
        raise StreamError(
            "the first activations contain values that are not finite; drop those rows from the batches"
        )
    return rows


def _scale_constant(rows: Tensor, center: Tensor, sae: SAE, what: str) -> Tensor:
    """Noted in the metadata, and told. Raises StreamError if there is no spread."""
    constant = reference.scale_constant(rows, center)
    ratio = float(center.norm() * constant)
    if not constant.isfinite() or ratio > 1 / LEAST_SPREAD:
        raise StreamError(
            "the first activations are all the same: there is no spread to scale by; give batches of "
            "different tokens"
        )
    sae.metadata["mean_to_spread"] = ratio
    log.info(
        "%s scaling: 1 / %.4g, the mean distance of the first %s activations from their geometric "
        "median, whose norm is %.2g times that",
        what, 1 / constant, f"{len(rows):,}", ratio,
    )  # fmt: skip
    return constant


# --- warm start ---


def load_origin(sweep: Sweep) -> SAE:
    """The SAE that ``init_from`` names, in fp32 on the CPU.

    Raises:
        FormatError: there is none, or fastsae cannot read it.
        ConfigError: its input scaling or its number of latents is not the run's, or not where its levels end.
    """
    config = sweep.base
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
    checked_levels(config.matryoshka, origin.d_sae)
    for k in sweep.ks:
        if k > origin.d_sae:
            raise ConfigError(
                f"k = {k:g} is more than the {origin.d_sae} latents of the SAE in {config.init_from}; "
                f"lower k"
            )
    return origin


@torch.no_grad()
def _continue_from(origin: SAE, sae: SAE, source: str) -> None:
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


@torch.no_grad()
def _refit(sae: SAE, rows: Tensor, center: Tensor) -> None:
    """Give a warm start the scale and the bias of its own activations ``rows [n, D]``, where its
    reconstructions are then nearer to them; in place.

    If the origin's activations were, up to rounding, ``s (x - center) + b_dec`` of the run's x, then all it
    said of them is said of x with ``b_dec = center`` and ``b_enc / s``, whatever its weights. ``s`` is the
    best of ``REFIT_SCALES``.
    """
    x = rows.to(sae.device, sae.dtype)
    spread = (x - x.mean(0)).square().sum()
    b_dec, b_enc = sae.b_dec.clone(), sae.b_enc.clone()

    def explained(scale: float) -> float:
        sae.b_dec.copy_(center)
        sae.b_enc.copy_(b_enc / scale)
        return float(1 - (x - sae(x, "batch")).square().sum() / spread)

    before = float(1 - (x - sae(x, "batch")).square().sum() / spread)
    found = {scale: explained(scale) for scale in REFIT_SCALES}
    best = max(found, key=lambda scale: found[scale])
    told = sae.metadata["warm_start"]
    told["explained_variance"] = before
    if not found[best] > before + REFIT_GAIN:
        sae.b_dec.copy_(b_dec)
        sae.b_enc.copy_(b_enc)
        log.info("warm start: it explains %.3f of the variance of the first activations", before)
        return
    explained(best)
    assert isinstance(sae.activation, BatchTopK)
    sae.activation.threshold.zero_()
    sae.activation.threshold_updates.zero_()
    told |= {"refitted_scale": best, "refitted_explained_variance": found[best]}
    log.info(
        "warm start: it explains %.3f of the variance of the first activations as it is, and %.3f with scale "
        "(1 / %g) and bias estimated on them: these are taken, and the threshold is tracked anew",
        before, found[best], best,
    )  # fmt: skip


def _provenance(origin: SAE, source: str, kind: str) -> dict[str, Any]:
    known = ("model_name", "hook_name", "dataset_path")
    return {
        "source": source,
        "activation": kind,
        "k": origin.k,
        **{name: origin.metadata[name] for name in known if name in origin.metadata},
    }
