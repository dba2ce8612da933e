"""Evaluation of an SAE on held-out text: reconstruction, sparsity, and what the language model loses.

``fastsae.evaluate`` is :func:`evaluate` here; ``fastsae evaluate`` is the command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, StreamError
from ..lm.held_out import Batch, HeldOutText
from ..lm.hooked import SplicedModel
from ..lm.norms import is_outlier
from ..progress import progress
from ..sae.activation import INFERENCE_MODES, BatchTopK, Inference, JumpReLU
from ..sae.module import SAE
from ..sae.transcoder import Transcoder
from .covariance import RunningCovariance
from .estimates import Estimate
from .losses import SplicedLosses
from .provenance import require_same_activations
from .scores import Scores, ScoreSums

_AT_ONCE = 2**27
"""Logits, and latents, of one batch: with more, fewer rows are taken at a time."""

Observer = Callable[[Batch, Tensor, Tensor, Tensor], None]
"""Is given every batch, the mask ``[n, t]`` of the measured positions, and x ``[m, D]`` and z ``[m, F]``
there, the latents as the first mode selects them."""


@dataclass
class Evaluation:
    """What :func:`evaluate` returns: ``evaluation["topk"]`` are the scores of an inference mode."""

    scores: dict[str, Scores]
    tokens: int
    documents: int
    documents_are: str
    text: str
    pca_components: int
    pca_explained_variance: float | None
    """Of PCA with as many components as latents per token, fitted to half of the documents and scored
    on the other half, both ways round; None with a single document, and of a transcoder."""
    nonfinite: int = 0
    """Tokens whose activation is not finite; they are left out, and left as they are in the model."""
    outliers: int = 0
    """Tokens left out, in the same way, because the norm of their activation is far from the others'."""
    losses: dict[str, Estimate] = field(default_factory=dict)
    """Of the language model, if there was one: ``clean``, and ``zero`` (activation zero at every position)
    and ``mean`` (mean activation at every position that is text): cross-entropy in nats per token; and
    ``kl_zero``, ``kl_mean``."""

    def __getitem__(self, mode: str) -> Scores:
        return self.scores[mode]

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            self.documents_are: self.documents,
            "nonfinite": self.nonfinite,
            "outliers": self.outliers,
            "interval": f"95 %, bootstrap over {self.documents} {self.documents_are}",
            "pca": {
                "components": self.pca_components,
                "explained_variance": self.pca_explained_variance,
                "fitted_on": f"half of the {self.documents_are}, scored on the other half, both ways",
            },
            "losses": {name: value.to_json() for name, value in self.losses.items()},
            "modes": {mode: scores.to_json() for mode, scores in self.scores.items()},
        }


def inference_modes(sae: SAE) -> tuple[Inference, ...]:
    """How ``sae`` can select: all modes of a BatchTopK (no ``threshold`` before one is known), its own
    first; the one way of other activations."""
    if not isinstance(sae.activation, BatchTopK):
        return ("threshold",) if isinstance(sae.activation, JumpReLU) else ("topk",)
    own = sae.activation.inference
    modes: list[Inference] = [own, *(mode for mode in INFERENCE_MODES if mode != own)]
    if not float(sae.activation.threshold) > 0:
        modes.remove("threshold")
    return tuple(modes)


def whole_passes(modes: Sequence[Inference]) -> int:
    """How often :func:`evaluate` with ``losses`` runs the whole model on a token: clean, with the
    activations ablated to zero and to the mean, and with the reconstruction of each mode."""
    return 3 + len(modes)


@torch.no_grad()
def evaluate(
    sae: SAE,
    source: Tensor | tuple[Tensor, Tensor] | HeldOutText,
    modes: Inference | Sequence[Inference] | None = None,
    *,
    model: SplicedModel | None = None,
    losses: bool = True,
    batch_size: int = 1024,
    rows: int = 32,
    outlier_norm: float | None = None,
    observers: Sequence[Observer] = (),
) -> Evaluation:
    """Evaluate ``sae`` in eval mode; nothing in it changes. Memory does not grow with the tokens.

    Args:
        source: activations ``[N, D]`` (every row counts as a document; those that are not finite are left
            out), of a transcoder a pair of them, or text, with ``model``.
        modes: inference modes; all the SAE has, its own first, if absent. ``"batch"`` selects within
            the tokens of each batch.
        losses: run the rest of the model too: clean, with the reconstruction of each mode in the place
            of the activations, and ablated.
        batch_size: tokens at a time, of activations.
        rows: rows of text at a time, at most; fewer where their logits would be too many.
        outlier_norm: leave out tokens of text whose activation has more than so many times the median
            norm of its forward pass, as training with ``--outlier-norm`` does. Few such tokens can hold
            most of the variance.
        observers: called with every batch of text and its latents.

    Special tokens are not measured, and keep their activation when others are replaced. Raises
    ConfigError if widths do not fit or there is no such mode, StreamError if nothing is finite.
    """
    if not isinstance(source, HeldOutText):
        pair = source if isinstance(source, tuple) else (source,)
        if len(pair) != len(widths := _widths(sae)) or not all(isinstance(x, Tensor) for x in pair):
            expected = " and ".join(f"[N, {width}]" for width in widths)
            raise ConfigError(
                f"expected activations {expected} as a tensor{' each, in a tuple' * (len(widths) > 1)}, or a "
                f"HeldOutText, got {type(source).__name__}"
            )
    modes = inference_modes(sae) if modes is None else (modes,) if isinstance(modes, str) else modes
    possible = INFERENCE_MODES if isinstance(sae.activation, BatchTopK) else inference_modes(sae)
    for mode in modes:
        if mode not in possible:
            raise ConfigError(
                f"inference mode {mode!r}: this SAE selects by {type(sae.activation).__name__}, which "
                f"has {', '.join(map(repr, possible))}"
            )
    if not modes or len(set(modes)) < len(modes):
        raise ConfigError(f"modes = {tuple(modes)!r}: expected at least one, and each of them once")
    if isinstance(source, HeldOutText):
        if model is None:
            raise ConfigError(
                "text needs the language model that turns it into activations: model="
            )
        if len(model.sites) != len(_widths(sae)):
            raise ConfigError(
                f"a {type(sae).__name__} needs a model that is hooked at {len(_widths(sae))} places, and this one "
                f"is hooked at {' and '.join(map(str, model.sites))}: what a transcoder reconstructs is target="
            )
        for verb, width, there, site in zip(
            ("reads", "reconstructs"), _widths(sae), model.widths, model.sites, strict=False
        ):
            if width != there:
                raise ConfigError(
                    f"the SAE {verb} activations of width {width}, but {site} of {model.name} has width "
                    f"{there}: they do not belong together"
                )
        require_same_activations(sae, source, model)
    was_training = sae.training
    sae.eval()
    try:
        if not isinstance(source, HeldOutText):
            pair = source if isinstance(source, tuple) else (source, source)
            return _evaluate_activations(sae, *pair, modes, batch_size)
        assert model is not None
        longest = max(map(len, source.rows))
        widest = max(sae.d_sae, model.vocabulary if losses else 0)
        rows = max(1, min(rows, _AT_ONCE // (longest * widest)))
        with progress("evaluating", source.tokens) as advance:
            return _evaluate_text(
                sae, source, modes, model, losses, rows, outlier_norm, observers, advance
            )
    finally:
        sae.train(was_training)


def _widths(sae: SAE) -> tuple[int, ...]:
    """Of what is read, and of what a transcoder reconstructs."""
    return (sae.d_in, sae.d_out) if isinstance(sae, Transcoder) else (sae.d_in,)


def _evaluate_activations(
    sae: SAE, x: Tensor, target: Tensor, modes: Sequence[Inference], batch_size: int
) -> Evaluation:
    for rows, width in ((x, sae.d_in), (target, sae.d_out)):
        if rows.dim() != 2 or rows.shape[1] != width or not len(rows) == len(x) > 0:
            raise ConfigError(
                f"expected activations [N, {width}] with N of at least 1, got shape {tuple(rows.shape)}"
            )
    finite = torch.cat([part.isfinite().all(dim=1) for part in x.split(batch_size)])
    if target is not x:
        finite &= torch.cat([part.isfinite().all(dim=1) for part in target.split(batch_size)])
    lost = len(x) - int(finite.sum())
    if lost == len(x):
        raise StreamError(
            f"none of the {lost:,} activations is finite; compute them in float32 or bfloat16"
        )
    x, target = (x[finite], target[finite]) if lost else (x, target)
    device = sae.W_dec.device
    documents = torch.arange(len(x))
    parts = (rows.split(batch_size) for rows in (x, target, documents))
    batches = list(zip(*parts, strict=True))
    covariance = RunningCovariance(sae.d_out, device)
    for _, y, ids in batches:
        covariance.add(y.to(device), ids)
    sums = {mode: ScoreSums(covariance.mean, sae.levels) for mode in modes}
    with progress("evaluating", len(x)) as advance:
        for batch, y, ids in batches:
            batch, y = batch.to(device), y.to(device)
            for mode in modes:
                sums[mode].add(y, *_encode_decode(sae, batch, mode), ids)
            advance(len(batch))
    result = _evaluation(sae, sums, covariance, len(x), "rows", "activations")
    result.nonfinite = lost
    return result


def _evaluate_text(
    sae: SAE,
    text: HeldOutText,
    modes: Sequence[Inference],
    model: SplicedModel,
    losses: bool,
    rows: int,
    outlier_norm: float | None,
    observers: Sequence[Observer],
    advance: Callable[[float], object],
) -> Evaluation:
    passes = whole_passes(modes) if losses else 1

    def batches(share: float) -> Iterator[Batch]:
        for batch in text.batches(rows, model.device):
            yield batch
            advance(share * int(batch.text.sum()))

    covariance = RunningCovariance(sae.d_out, sae.W_dec.device)
    nonfinite = outliers = 0
    for batch in batches(1 / (1 + passes)):
        finite, measured, *kept = _measured(batch, model.activations(batch.tokens), outlier_norm)
        nonfinite += int((batch.text & ~finite).sum())
        outliers += int(finite.sum()) - len(kept[-1])
        covariance.add(kept[-1].to(sae.W_dec.device), batch.documents_of(measured))
    if not covariance.count:
        raise StreamError(
            f"no activation of {model.site} of {model.name} is finite: the model overflows; "
            f"use another precision, or an SAE of an earlier layer"
        )
    sums = {mode: ScoreSums(covariance.mean, sae.levels) for mode in modes}
    spliced = SplicedLosses(model, covariance.mean) if losses else None
    for batch in batches(passes / (1 + passes)):
        found = spliced.begin(batch) if spliced else model.activations(batch.tokens)
        _, measured, *kept = _measured(batch, found, outlier_norm)
        if not len(kept[0]):
            continue
        x, y = (kept[i].to(sae.W_dec.device) for i in (0, -1))
        documents = batch.documents_of(measured)
        if spliced is not None:
            spliced.ablate(measured)
        for i, mode in enumerate(modes):
            z, x_hats = _encode_decode(sae, x, mode)
            sums[mode].add(y, z, x_hats, documents)
            if spliced is not None:
                spliced.replace(mode, measured, x_hats[-1])
            if i == 0:
                for observe in observers:
                    observe(batch, measured, x, z)
        if spliced is not None:
            spliced.measure()
    documents = len(set(text.documents))
    result = _evaluation(sae, sums, covariance, documents, text.documents_are, text.name)
    result.nonfinite, result.outliers = nonfinite, outliers
    if spliced is not None:
        for mode in modes:
            spliced.complete(mode, result[mode])
        result.losses = spliced.losses()
    return result


def text_activations(
    model: SplicedModel, text: HeldOutText, rows: int = 32, outlier_norm: float | None = None
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Every batch of ``text``, the mask ``[n, t]`` of what is text, finite and no outlier (see
    :func:`evaluate`), and x ``[m, D]`` there."""
    for batch in text.batches(rows, model.device):
        _, measured, x, *_ = _measured(batch, model.activations(batch.tokens), outlier_norm)
        yield batch, measured, x


def _measured(
    batch: Batch, activations: Sequence[Tensor], outlier_norm: float | None
) -> tuple[Tensor, ...]:
    """What is finite, and what of it no outlier, at every site, ``[n, t]``; and the activations there."""
    finite = batch.text
    for x in activations:
        finite = finite & x.isfinite().all(dim=-1)
    measured = finite
    if outlier_norm is not None and finite.any():
        outlying = [is_outlier(x[finite], outlier_norm) for x in activations]
        measured = finite.masked_scatter(finite, ~torch.stack(outlying).any(0))
    return finite, measured, *(x[measured].float() for x in activations)


def _encode_decode(sae: SAE, x: Tensor, mode: Inference) -> tuple[Tensor, Tensor]:
    z = sae.encode(x, mode if isinstance(sae.activation, BatchTopK) else None)
    x_hats = sae.decode_levels(z, sae.token_statistics(x.to(z.dtype)))
    return z, x_hats + sae.skip(x) if isinstance(sae, Transcoder) else x_hats


def _evaluation(
    sae: SAE,
    sums: dict[str, ScoreSums],
    covariance: RunningCovariance,
    documents: int,
    documents_are: str,
    text: str,
) -> Evaluation:
    scores = {mode: of_mode.scores() for mode, of_mode in sums.items()}
    k = sae.k or next(iter(scores.values())).l0
    components = min(max(1, round(k)), sae.d_out)
    # PCA sees what it reconstructs: beside a transcoder, which does not, it is no baseline.
    pca = None if isinstance(sae, Transcoder) else covariance.pca_explained_variance(components)
    return Evaluation(scores, covariance.count, documents, documents_are, text, components, pca)
