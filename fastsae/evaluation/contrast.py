"""Which latents tell two sets of texts apart? A document is one observation: each latent's mean activation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel
from ..sae.module import SAE
from .evaluate import text_activations
from .statistics import benjamini_hochberg, fit_logistic, midranks, rank_sum_test

FOLDS = 5
PERMUTATIONS = 20
FEWEST = 10
"""Documents that each side must have: below, the normal approximation of the test is poor."""
_RANKS = 2**24  # ranks held at a time: 128 MB


class Pooled(NamedTuple):
    """Documents as rows: ``mean [N, F]`` activation of each latent over a document's tokens, ``active
    [N, F]`` whether it is active at all, ``dense [N, D]`` the mean residual; all on the CPU."""

    mean: Tensor
    active: Tensor
    dense: Tensor


@torch.no_grad()
def pool(
    sae: SAE,
    model: SplicedModel,
    texts: Iterable[str],
    context_length: int,
    rows: int = 32,
    outlier_norm: float | None = None,
) -> Pooled:
    """Run documents through the model and the SAE; one row for each document with a measured token."""
    text = HeldOutText.tokenize(texts, model.tokenizer, context_length)
    count = max(text.documents) + 1
    tokens = torch.zeros(count, 1)
    mean, dense = torch.zeros(count, sae.d_sae), torch.zeros(count, sae.d_in)
    longest = max(map(len, text.rows))
    rows = max(1, min(rows, 2**27 // (longest * sae.d_sae)))
    for batch, measured, x in text_activations(model, text, rows, outlier_norm):
        documents = batch.documents_of(measured)
        z = sae.encode(x.to(sae.W_dec.device)).float().cpu()
        tokens.index_add_(0, documents, torch.ones(len(z), 1))
        mean.index_add_(0, documents, z)
        dense.index_add_(0, documents, x.cpu())
    there = tokens[:, 0] > 0
    mean, dense, tokens = mean[there], dense[there], tokens[there]
    return Pooled(mean / tokens, mean > 0, dense / tokens)


def contrast(
    positive: Pooled, negative: Pooled, fdr: float = 0.05, probe_latents: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compare two sets of documents; returns what ``contrast.json`` holds.

    Tested are the latents active in at least ``FEWEST`` documents of both sets together, which is
    decided without the labels. ``shuffled`` says how many latents the same procedure reports when the
    labels are shuffled: there is nothing to find then. ``probes`` are held-out accuracies of logistic
    regressions over ``FOLDS`` folds: on the ``probe_latents`` latents that differ most on the other
    folds, on the mean raw activation, and on the latents with shuffled labels.

    Raises ConfigError: too few documents, or settings that make no sense.
    """
    check(fdr, probe_latents, len(positive.mean), len(negative.mean))
    x, active, dense = map(torch.cat, zip(positive, negative, strict=True))
    n = len(positive.mean)
    y = torch.arange(len(x)) < n
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(PERMUTATIONS)]
    shuffled = y[torch.stack(orders)]
    tested = (active.sum(0) >= FEWEST).nonzero()[:, 0]
    auroc, p = _test(x, tested, torch.cat([y[None], shuffled]))
    discoveries = [int((benjamini_hochberg(column) <= fdr).sum()) for column in p.T]
    q = benjamini_hochberg(p[:, 0])
    order = torch.argsort((auroc[:, 0] - 0.5).abs(), descending=True)
    latents = [
        {
            "latent": int(tested[i]),
            "auroc": float(auroc[i, 0]),
            "p_value": float(p[i, 0]),
            "q_value": float(q[i]),
            "fires_positive": float(active[:n, tested[i]].double().mean()),
            "fires_negative": float(active[n:, tested[i]].double().mean()),
            "mean_positive": float(x[:n, tested[i]].mean()),
            "mean_negative": float(x[n:, tested[i]].mean()),
        }
        for i in order.tolist()
        if q[i] <= fdr
    ]
    return {
        "documents": {"positive": n, "negative": len(x) - n},
        "fdr": fdr,
        "latents_tested": len(tested),
        "latents_found": len(latents),
        "shuffled": {"permutations": PERMUTATIONS, "latents_found": discoveries[1:]},
        "probes": _probes(x, dense, y, shuffled[0], probe_latents, generator),
        "latents": latents,
    }


def check(fdr: float, probe_latents: int, positive: int, negative: int) -> None:
    """Raise ConfigError unless so many documents can be compared with these settings."""
    if not 0 < fdr < 1:
        raise ConfigError(f"fdr must be between 0 and 1, got {fdr!r}")
    if probe_latents < 1:
        raise ConfigError(f"probe_latents must be at least 1, got {probe_latents!r}")
    for name, count in (("positive", positive), ("negative", negative)):
        if count < FEWEST:
            raise ConfigError(
                f"the {name} set has {count} documents with text; give at least {FEWEST}: a .jsonl "
                f"file with one document a line, for example"
            )


def _test(x: Tensor, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and p ``[latents, labellings]``."""
    parts = latents.split(max(1, _RANKS // len(x)))
    auroc, p = zip(*(rank_sum_test(*midranks(x[:, part].T), labels) for part in parts), strict=True)
    return torch.cat(auroc), torch.cat(p)


def _probes(
    x: Tensor, dense: Tensor, y: Tensor, shuffled: Tensor, latents: int, generator: torch.Generator
) -> dict[str, Any]:
    fold = torch.empty(len(y), dtype=torch.int64)
    for side in (y, ~y):  # the same share of both sets in every fold
        where = side.nonzero()[:, 0]
        shuffled_rows = where[torch.randperm(len(where), generator=generator)]
        fold[shuffled_rows] = torch.arange(len(where)) % FOLDS
    every = torch.arange(x.shape[1])

    def sparse(train: Tensor, labels: Tensor) -> Tensor:
        auroc, _ = _test(x[train], every, labels[train][None])
        return x[:, (auroc[:, 0] - 0.5).abs().topk(min(latents, x.shape[1])).indices]

    def accuracy(features: Any, labels: Tensor) -> float:
        right = 0
        for i in range(FOLDS):
            train, test = fold != i, fold == i
            chosen = features(train, labels)
            chosen = (chosen - chosen[train].mean(0)) / chosen[train].std(0).clamp_min(1e-6)
            w = fit_logistic(chosen[train], labels[train])
            right += int(((chosen[test].double() @ w[:-1] + w[-1] > 0) == labels[test]).sum())
        return right / len(labels)

    return {
        "folds": FOLDS,
        "latents": latents,
        "majority": float(torch.maximum(y.double().mean(), (~y).double().mean())),
        "sparse": accuracy(sparse, y),
        "dense": accuracy(lambda _train, _labels: dense, y),
        "sparse_shuffled": accuracy(sparse, shuffled),
    }


def describe(result: dict[str, Any], rows: int = 20) -> str:
    """The table for the terminal."""
    lines = summary(result)
    if result["latents"]:
        lines.append(f"  {'latent':>7}  {'AUROC':>6}  {'q':>8}  {'fires in + / -':>17}  mean + / -")
    for row in result["latents"][:rows]:
        fires = f"{row['fires_positive']:.1%} / {row['fires_negative']:.1%}"
        lines.append(
            f"  {row['latent']:>7}  {row['auroc']:>6.3f}  {row['q_value']:>8.1e}  {fires:>17}  "
            f"{row['mean_positive']:.3g} / {row['mean_negative']:.3g}"
        )
    if len(result["latents"]) > rows:
        lines.append(f"  ... and {len(result['latents']) - rows:,} more")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """Sentences that say what was found."""
    probes, documents, found = result["probes"], result["documents"], result["shuffled"]
    none = sum(not count for count in found["latents_found"])
    return [
        f"{result['latents_found']:,} of {result['latents_tested']:,} latents tested differ between "
        f"{documents['positive']:,} positive and {documents['negative']:,} negative documents, at a "
        f"false discovery rate of {result['fdr']:g}.",
        f"With shuffled labels, {none} of {found['permutations']} times none is found, at most "
        f"{max(found['latents_found'])}.",
        f"Held-out accuracy: {probes['sparse']:.1%} from {probes['latents']} latents, "
        f"{probes['dense']:.1%} from the raw activations, {probes['sparse_shuffled']:.1%} from latents "
        f"with shuffled labels; the larger set is {probes['majority']:.1%}.",
    ]
