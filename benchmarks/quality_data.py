"""What ``quality.py`` trains and measures on: activations of a language model, or made-up ones whose
features are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from results import Row
from torch import Tensor

from fastsae import SAE, TrainConfig, evaluate
from fastsae.data.demo_text import documents
from fastsae.data.opening import open_text_chunks
from fastsae.data.stream import open_stream
from fastsae.evaluation.evaluate import text_activations
from fastsae.evaluation.statistics import fit_logistic
from fastsae.lm.held_out import HeldOutText
from fastsae.lm.hooked import SplicedModel

HELD_OUT = 65_536
"""So many held-out tokens that a latent which fires once in 20,000 is seen to be alive."""
SPLICED_TOKENS = 8_192
LABELS, DOCUMENTS, LEAST, PROBED = ("numpy", "torch", "transformers", "pandas"), 60, 300, 5
"""Probing tells apart so many documents of each package, of so many characters, by so many latents."""
TRUTH_SEED = 0
"""Of the true features."""


@dataclass(frozen=True)
class Data:
    """``train [n, D]`` in an order that means nothing, ``held_out [m, D]``, and what else a trained SAE
    is measured by."""

    train: Tensor
    held_out: Tensor
    scores: Callable[[SAE], Row]
    drawn_with: int | None = None
    """The seed of what a dictionary is to find. Whoever draws a decoder alike with the same seed has found it."""


class Batches(Sequence[Tensor]):
    """The batches ``[B, D]`` (fp32) of a seed: rows of ``pool`` without repetition, in random order."""

    def __init__(self, pool: Tensor, size: int, steps: int, seed: int) -> None:
        if len(pool) < size * steps:
            raise SystemExit(
                f"there are {len(pool):,} activations, fewer than the {size * steps:,} of a run"
            )
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        self.pool, self.rows = pool, order[: size * steps].split(size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.pool[self.rows[i]].float()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def language_model(config: TrainConfig) -> Data:
    """Activations of ``config``'s stream; loss recovered, and k-sparse probing for the package that a
    docstring is from."""
    stream = open_stream(config)
    batches = (layers[0] for layers in iter(stream.next_batch, None))
    train = torch.cat([x.bfloat16() for x in islice(batches, config.steps)])[: config.tokens]
    chunks = open_text_chunks(config, (config.site,), torch.device("cpu"))
    text = chunks.held_out_text()  # which a cache does not have
    del chunks
    model = SplicedModel.load(
        config.model, config.site, quantization=config.quantization, device="cpu"
    )
    labelled, labels = _labelled(model, config)

    @torch.no_grad()
    def scores(sae: SAE) -> Row:
        # What was trained on has no outliers: no latent knows them.
        limits = {"outlier_norm": config.stream_outlier_norm}
        spliced = evaluate(sae, text.part(SPLICED_TOKENS), "topk", model=model, **limits)
        pooled = torch.stack([sae.encode(x.float(), "topk").mean(0) for x in labelled])
        return {
            "loss_recovered": float(spliced["topk"].loss_recovered),
            "probing": _probing(pooled, labels),
        }

    return Data(train, stream.held_out()[0].float(), scores)


def _labelled(model: SplicedModel, config: TrainConfig) -> tuple[list[Tensor], Tensor]:
    """Activations ``[t, D]`` of the beginning of each document, and which package it is of."""
    everywhere = set(documents(()))
    texts: list[str] = []
    for package in LABELS:
        own = [d for d in documents((package,)) if d not in everywhere and len(d) >= LEAST]
        texts += own[:DOCUMENTS]
    labels = torch.arange(len(LABELS)).repeat_interleave(DOCUMENTS)
    if len(texts) < len(labels):
        raise SystemExit(f"the docstrings of {', '.join(LABELS)} have too few long documents")
    beginnings = [text[: 4 * LEAST] for text in texts]
    length = config.context_length
    held = HeldOutText.tokenize(beginnings, model.tokenizer, length)
    found: list[list[Tensor]] = [[] for _ in texts]
    for batch, measured, x in text_activations(model, held, 8, config.stream_outlier_norm):
        at = batch.documents_of(measured)
        for document in at.unique().tolist():
            found[document].append(x[at == document])
    return [torch.cat(parts) for parts in found], labels


def _probing(pooled: Tensor, labels: Tensor) -> float:
    """Accuracy of telling two packages apart by ``PROBED`` latents: the mean over all pairs.

    The latents are those whose means differ most against their spread, in one half of the documents,
    on which a logistic regression is fitted; it is tested on the other half.
    """
    half = torch.arange(len(labels)) % 2 == 0
    accuracies = []
    for a in range(len(LABELS)):
        for b in range(a + 1, len(LABELS)):
            pair = (labels == a) | (labels == b)
            (x, y), (test, truth) = (
                (pooled[pair & part], labels[pair & part] == a) for part in (half, ~half)
            )
            center, spread = x.mean(0), x.std(0)
            gap = (x[y].mean(0) - x[~y].mean(0)).abs() / spread.clamp_min(1e-6)
            chosen = torch.where(spread > 0, gap, 0.0).topk(PROBED).indices
            fit = lambda z, c=chosen, m=center, s=spread: (
                (z[:, c] - m[c]) / s[c].clamp_min(1e-6)
            ).double()
            with torch.enable_grad():
                w = fit_logistic(fit(x), y)
            accuracies.append(((fit(test) @ w[:-1] + w[-1] > 0) == truth).double().mean())
    return float(torch.stack(accuracies).mean())


def synthetic(features: int, width: int, tokens: int, cache: Path | None = None) -> Data:
    """SAELens's synthetic model with ``features`` true features in ``width`` dimensions, a few of which
    fire often and most seldom (Zipf), correlated and in hierarchies: F1 and MCC."""
    from sae_lens.synthetic import (
        HierarchyConfig,
        LowRankCorrelationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        compute_classification_metrics,
        mean_correlation_coefficient,
    )

    torch.manual_seed(TRUTH_SEED)
    model = SyntheticModel(
        SyntheticModelConfig(
            features, width, seed=TRUTH_SEED, std_firing_magnitudes=0.3, bias=1.0,
            hierarchy=HierarchyConfig(features // 32, 4, 2, compensate_probabilities=True),
            correlation=LowRankCorrelationConfig(rank=16),
        )
    )  # fmt: skip
    truth = model.feature_dict.feature_vectors.detach()

    @torch.no_grad()
    def sample(n: int) -> tuple[Tensor, Tensor]:
        acts = [model.activation_generator.sample(4096) for _ in range(-(-n // 4096))]
        hidden = [model.feature_dict(a) for a in acts]
        return torch.cat([(a > 0) for a in acts])[:n], torch.cat(hidden)[:n]

    kept = cache / f"features-{features}-{width}-{tokens}.pt" if cache else None
    if kept is None or not kept.exists():
        fires, held_out = sample(HELD_OUT // 4)
        parts = [sample(4096)[1] for _ in range(-(-tokens // 4096))]
        made = torch.cat(parts)[:tokens], fires, held_out
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, kept)
    else:
        made = torch.load(kept)
    train, fires, held_out = made

    @torch.no_grad()
    def scores(sae: SAE) -> Row:
        latents = torch.cat([sae.encode(x, "topk") for x in held_out.split(4096)])
        found = compute_classification_metrics(latents, fires.float(), sae.W_dec, truth)
        return {
            "f1": found.f1_score,
            "mcc": mean_correlation_coefficient(sae.W_dec, truth),
            "true_l0": float(fires.sum(1).double().mean()),
        }

    return Data(train, held_out, scores, TRUTH_SEED)


def smollm2(folder: Path, cache: Path | None, tokens: int) -> TrainConfig:
    """Layer 15 of SmolLM2-135M as ``smollm2.py`` wrote it and its text to ``folder``."""
    return TrainConfig(
        model=str(folder), text_files=(str(folder / "text.jsonl"),), layer=15, quantization="none",
        context_length=256, harvest_batch=8, pool_tokens=65_536, eval_tokens=HELD_OUT, tokens=tokens,
        d_sae=9216, k=32, seed=0, device="cpu", cache_dir=str(cache / "smollm2") if cache else None,
    )  # fmt: skip


def demo(config: TrainConfig, tokens: int) -> TrainConfig:
    """The demo's, at another size of run."""
    return replace(config, tokens=tokens, eval_tokens=HELD_OUT, seed=0, device="cpu")
