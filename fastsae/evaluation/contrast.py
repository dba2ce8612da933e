"""Which latents tell two sets of texts apart?

A document is one observation: each latent's mean activation over its tokens. Latents are compared by
the rank-sum test, and those reported keep the false discovery rate below a given one. Equal documents of
a set are one observation, and near copies stay together where something is held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..lm.encoding import Document
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel
from ..sae.module import SAE
from .evaluate import text_activations
from .provenance import require_same_activations, tokenize_for
from .statistics import benjamini_hochberg, fit_logistic, midranks, rank_sum_test

FOLDS = 5
PERMUTATIONS = 20
FEWEST = 10
"""Documents that each side must have: below, the normal approximation of the test is poor."""
SIGNATURE, SHINGLE = 64, 3
NEAR = 0.7
"""Documents that share so many of their runs of ``SHINGLE`` tokens are near copies."""
_RANKS = 2**24  # ranks held at a time: 128 MB
_SHINGLES_AT_ONCE, _ROWS_AT_ONCE = 2**14, 256


@dataclass
class Pooled:
    """Documents as rows: ``mean [N, F]`` activation of each latent over a document's tokens, ``active
    [N, F]`` whether it is active at all, ``dense [N, D]`` the mean residual; all on the CPU.

    ``keys``, N of them, are all different: those of one set name the same documents as those of another;
    ``signatures [N, SIGNATURE]`` are :func:`minhash` of their tokens; ``repeated`` documents were left
    out as equal to one that is there."""

    mean: Tensor
    active: Tensor
    dense: Tensor
    keys: list[bytes]
    signatures: Tensor
    repeated: int = 0


@torch.no_grad()
def pool(
    sae: SAE,
    model: SplicedModel,
    texts: Iterable[Document],
    context_length: int,
    rows: int = 32,
    outlier_norm: float | None = None,
    skip_bad_lines: bool = False,
) -> Pooled:
    """Run documents through the model and the SAE; one row for each different document with a measured
    token. Raises ConfigError if the SAE reads other activations than the model gives."""
    text = tokenize_for(sae, model, texts, context_length, skip_bad_lines=skip_bad_lines)
    require_same_activations(sae, text, model)
    text, ids, repeated = _distinct(text)
    count = len(ids)
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
    kept = list(compress(ids, there.tolist()))
    keys = [document.tobytes() for document in kept]
    mean, dense, tokens = mean[there], dense[there], tokens[there]
    return Pooled(mean / tokens, mean > 0, dense / tokens, keys, minhash(kept), repeated)


def _distinct(text: HeldOutText) -> tuple[HeldOutText, list[np.ndarray], int]:
    """``text`` without the documents that are equal to an earlier one, numbered anew; the token ids of each
    that is left; and how many were left out."""
    rows: dict[int, list[Tensor]] = {}
    for row, document in zip(text.rows, text.documents, strict=True):
        rows.setdefault(document, []).append(row)
    ids = {document: torch.cat(parts).numpy() for document, parts in rows.items()}
    first: dict[bytes, int] = {}
    for document, tokens in ids.items():
        first.setdefault(tokens.tobytes(), document)
    kept = list(first.values())
    left = HeldOutText(
        [row for document in kept for row in rows[document]],
        [number for number, document in enumerate(kept) for _ in rows[document]],
        text.special_ids.tolist(),
        text.name,
    )
    return left, [ids[document] for document in kept], len(ids) - len(kept)


def minhash(documents: Sequence[np.ndarray]) -> Tensor:
    """``[N, SIGNATURE]`` int64 of token ids: the share of places at which two documents agree estimates the
    share that their sets of ``SHINGLE`` tokens in a row have in common (of both together).

    Source: Broder, On the resemblance and containment of documents, 1997.
    """
    random = np.random.default_rng(0)
    factors = random.integers(1, 2**63, SIGNATURE, np.uint64) * 2 + 1
    places = random.integers(1, 2**63, SHINGLE, np.uint64) * 2 + 1
    found = np.empty((len(documents), SIGNATURE), np.uint64)
    for signature, ids in zip(found, documents, strict=True):
        ids = np.pad(ids, (0, max(0, SHINGLE - len(ids)))).astype(np.uint64) + np.uint64(1)
        shingles = (np.lib.stride_tricks.sliding_window_view(ids, SHINGLE) * places).sum(1)
        shingles = np.unique(shingles ^ (shingles >> np.uint64(29)))
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            part = shingles[start : start + _SHINGLES_AT_ONCE, None] * factors
            least = ((part ^ (part >> np.uint64(32))) * factors).min(0)
            signature[:] = least if start == 0 else np.minimum(signature, least)
    return torch.from_numpy(found.view(np.int64))


def near_copies(signatures: Tensor) -> Tensor:
    """``[N]``: the number of the first document that each is a near copy of, through others if need be; its
    own if there is none."""
    n = len(signatures)
    group = torch.arange(n)
    edges = []
    for start in range(0, n, _ROWS_AT_ONCE):
        part = signatures[start : start + _ROWS_AT_ONCE]
        agree = torch.zeros(len(part), n, dtype=torch.int16)
        for ours, theirs in zip(part.T, signatures.T, strict=True):
            agree += ours[:, None] == theirs
        edges.append((agree >= NEAR * signatures.shape[1]).nonzero() + torch.tensor([start, 0]))
    one, other = torch.cat(edges).T
    while True:  # the smallest number spreads along the edges
        least = group.scatter_reduce(0, one, group[other], "amin")
        if torch.equal(least, group):
            return group
        group = least


def contrast(
    positive: Pooled, negative: Pooled, fdr: float = 0.05, probe_latents: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compare two sets of documents; returns what ``contrast.json`` holds.

    Tested are the latents active in at least ``FEWEST`` documents of both sets together, which is
    decided without the labels. ``shuffled`` says how many latents the same procedure reports when the
    labels are shuffled: there is nothing to find then. ``probes`` are held-out accuracies of logistic
    regressions over ``FOLDS`` folds: on the ``probe_latents`` latents that differ most on the other
    folds, on the mean raw activation, and on the latents with shuffled labels; None if all documents are
    near copies of each other. ``repeated`` says how many documents were equal to another one of their
    set, and left out; how many are in both sets; and how many are near copies of another one, which
    stay in its fold.

    Raises ConfigError: too few documents, or settings that make no sense.
    """
    repeats = positive.repeated, negative.repeated
    check(fdr, probe_latents, len(positive.mean), len(negative.mean), repeats)
    x = torch.cat([positive.mean, negative.mean])
    active = torch.cat([positive.active, negative.active])
    dense = torch.cat([positive.dense, negative.dense])
    n = len(positive.mean)
    y = torch.arange(len(x)) < n
    group = near_copies(torch.cat([positive.signatures, negative.signatures]))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([
        y[torch.randperm(len(y), generator=generator)] for _ in range(PERMUTATIONS)
    ])  # fmt: skip
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
    fold = _folds(y, group, generator)
    return {
        "documents": {"positive": n, "negative": len(x) - n},
        "repeated": {
            "positive": positive.repeated,
            "negative": negative.repeated,
            "in_both_sets": len({*positive.keys} & {*negative.keys}),
            "near_copies": len(group) - len(group.unique()),
        },
        "fdr": fdr,
        "latents_tested": len(tested),
        "latents_found": len(latents),
        "shuffled": {"permutations": PERMUTATIONS, "latents_found": discoveries[1:]},
        "probes": _probes(x, dense, y, fold, shuffled[0], probe_latents),
        "latents": latents,
    }


def check(
    fdr: float, probe_latents: int, positive: int, negative: int, repeated: tuple[int, int] = (0, 0)
) -> None:
    """Raise ConfigError unless so many documents can be compared with these settings; ``repeated`` more of
    each set are equal to one that counts."""
    if not 0 < fdr < 1:
        raise ConfigError(f"fdr must be between 0 and 1, got {fdr!r}")
    if probe_latents < 1:
        raise ConfigError(f"probe_latents must be at least 1, got {probe_latents!r}")
    counts = zip(("positive", "negative"), (positive, negative), repeated, strict=True)
    for name, count, more in counts:
        if count < FEWEST:
            differing = f" that differ ({more} repeat them)" if more else ""
            raise ConfigError(
                f"the {name} set has {count} documents with text{differing}; give at least {FEWEST}: a .jsonl "
                f"file with one document a line, for example"
            )


def _test(x: Tensor, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and p ``[latents, labellings]``."""
    parts = latents.split(max(1, _RANKS // len(x)))
    auroc, p = zip(*(rank_sum_test(*midranks(x[:, part].T), labels) for part in parts), strict=True)
    return torch.cat(auroc), torch.cat(p)


def _folds(y: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """``[N]``: the fold of each document: the same share of both sets in every fold, as far as documents of
    the same group allow it, which are in one."""
    fold = torch.full((len(y),), -1)
    for side in (y, ~y):
        where = side.nonzero()[:, 0]
        for i in where[torch.randperm(len(where), generator=generator)].tolist():
            if fold[i] < 0:
                filled = torch.bincount(fold[side & (fold >= 0)], minlength=FOLDS)
                fold[group == group[i]] = int(filled.argmin())
    return fold


def _probes(
    x: Tensor, dense: Tensor, y: Tensor, fold: Tensor, shuffled: Tensor, latents: int
) -> dict[str, Any]:
    every = torch.arange(x.shape[1])

    def sparse(train: Tensor, labels: Tensor) -> Tensor:
        auroc, _ = _test(x[train], every, labels[train][None])
        return x[:, (auroc[:, 0] - 0.5).abs().topk(min(latents, x.shape[1])).indices]

    def accuracy(features: Any, labels: Tensor) -> float | None:
        right = tested = 0
        for i in range(FOLDS):
            train, test = fold != i, fold == i
            if labels[train].all() or not labels[train].any() or not test.any():
                continue  # there is nothing to tell apart, or to test on
            tested += int(test.sum())
            chosen = features(train, labels)
            chosen = (chosen - chosen[train].mean(0)) / chosen[train].std(0).clamp_min(1e-6)
            w = fit_logistic(chosen[train], labels[train])
            right += int(((chosen[test].double() @ w[:-1] + w[-1] > 0) == labels[test]).sum())
        return right / tested if tested else None

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
    share = lambda name: "–" if probes[name] is None else f"{probes[name]:.1%}"
    return [
        f"{result['latents_found']:,} of {result['latents_tested']:,} latents tested differ between "
        f"{documents['positive']:,} positive and {documents['negative']:,} negative documents, at a "
        f"false discovery rate of {result['fdr']:g}.",
        *_said_of_repeats(result["repeated"], sum(documents.values())),
        f"With shuffled labels, {none} of {found['permutations']} times none is found, at most "
        f"{max(found['latents_found'])}.",
        f"Held-out accuracy: {share('sparse')} from {probes['latents']} latents, "
        f"{share('dense')} from the raw activations, {share('sparse_shuffled')} from latents "
        f"with shuffled labels; the larger set is {probes['majority']:.1%}.",
    ]


def _said_of_repeats(repeated: dict[str, int], documents: int) -> list[str]:
    said = []
    if left_out := repeated["positive"] + repeated["negative"]:
        said.append(
            f"{left_out:,} documents more ({left_out / (left_out + documents):.0%}) are equal to one of "
            f"their set, and counted once with it."
        )
    if both := repeated["in_both_sets"]:
        said.append(f"{both:,} documents are in both sets.")
    if near := repeated["near_copies"]:
        said.append(
            f"{near:,} of the documents ({near / documents:.0%}) are near copies of another one: they are "
            f"held out together, but the test counts each, and so finds more than there is."
        )
    return said
