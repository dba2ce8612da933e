"""The report of an SAE: ``report.html``, which opens anywhere, with a page for every latent.

A page opened from a disk may not fetch files, but it may add scripts: so the data that it loads when
somebody asks for them are scripts that call ``fastsaeData(name, value)``. Every string reaches the page
as JSON in ASCII with ``<`` escaped, and is put there as text, never as HTML: whatever a token holds, it
stays text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.evaluate import Evaluation
from ...files import to_json, write_text
from ...lm.held_out import HeldOutText
from ...lm.hooked import SplicedModel
from ...sae.module import SAE
from ..tracking import read_metrics
from .collect import BEFORE, Collector, Passages
from .geometry import Ranked, TokenNames, logit_effects, neighbours, random_cosines

PAGE = "report.html"
LATENTS_PER_FILE = 256
TOKENS_PER_FILE = 65_536
_CURVES = ("explained_variance", "objective", "l0", "alive_fraction", "threshold")


def write_report_page(
    directory: Path,
    sae: SAE,
    evaluation: Evaluation | None = None,
    collector: Collector | None = None,
    model: SplicedModel | None = None,
    text: HeldOutText | None = None,
    *,
    title: str | None = None,
    page: str = PAGE,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the report of ``sae`` to ``directory``; returns the path of the page.

    Args:
        directory: if it holds the ``metrics.jsonl`` of a run, its curves are shown.
        evaluation: numbers to show; the distributions are those of its first mode.
        collector, model, text: for passages, and the tokens that a latent promotes and suppresses, if all
            are given; ``collector`` has observed the evaluation of ``text``.
        extra: more data for the page, such as a contrast.

    The data of the latents lie beside the page in ``PAGE`` less its ending plus ``_data``.
    """
    near = neighbours(sae)
    folder = directory / f"{Path(page).stem}_data"
    latents = _write_latents(folder, sae, near, collector, model, text)
    metrics = read_metrics(directory)
    data: dict[str, Any] = {
        "facts": {
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "k": sae.k,
            "activation": type(sae.activation).__name__,
            "model": sae.metadata.get("model_name"),
            "hook": sae.hook_name,
        },
        "curves": {
            "tokens": [m["tokens_seen"] for m in metrics],
            **{name: [m.get(name) for m in metrics] for name in _CURVES},
        },
        "cosines": {
            "found": _histogram(near.values[:, 0]) if near.values.numel() else None,
            "random": _histogram(random_cosines(sae)) if near.values.numel() else None,
        },
        "latents": latents,
        **(extra or {}),
    }
    if evaluation is not None:
        data["evaluation"] = evaluation.to_json()
        # k per token says nothing: the mode in which L0 varies most is shown.
        mode = max(evaluation.scores, key=lambda m: int((evaluation[m].l0_counts > 0).sum()))
        data["l0"] = {"mode": mode, "counts": evaluation[mode].l0_counts.tolist()}
    return write_page(directory / page, title or directory.resolve().name, data)


def _histogram(values: Tensor, bins: int = 40) -> dict[str, list[float]]:
    edges = torch.linspace(-0.2, 1, bins + 1)
    counts = torch.histogram(values.float().clamp(-0.2, 1), edges).hist
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def write_page(path: Path, title: str, data: dict[str, Any]) -> Path:
    """Write the page: styles, script and ``data`` are all in it."""
    assets = files("fastsae.reporting.dashboard") / "assets"
    page = (assets / "report.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "css": (assets / "report.css").read_text(encoding="utf-8"),
        "js": (assets / "report.js").read_text(encoding="utf-8"),
        "data": encode({"title": title, **data}),
    }
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text, 1)
    write_text(path, page)
    return path


def encode(value: Any) -> str:
    """JSON in ASCII that may stand inside a script element; numbers that are not finite are null."""
    return to_json(value, separators=(",", ":")).replace("<", "\\u003c")


def _write_latents(
    folder: Path,
    sae: SAE,
    near: Ranked,
    collector: Collector | None,
    model: SplicedModel | None,
    text: HeldOutText | None,
) -> dict[str, Any]:
    """Write ``index.js``, ``latents-N.js`` and ``text-N.js``; returns what the page must know of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.js"):
        old.unlink()
    index: dict[str, Any] = {"near": _rounded(near.values[:, 0]) if near.values.shape[1] else []}
    lists: list[tuple[str, Ranked, Callable[[int], Any]]] = [("near", near, int)]
    rows_per_file = 1
    if collector is not None:
        assert model is not None and text is not None
        names = TokenNames(model.tokenizer)
        rows_per_file = max(1, TOKENS_PER_FILE // max(map(len, text.rows)))
        for number, start in enumerate(range(0, len(text), rows_per_file)):
            rows = [names.row(r.tolist()) for r in text.rows[start : start + rows_per_file]]
            _write_data(folder, f"text-{number}", rows)
        fired = collector.fired.cpu()
        index |= {
            "density": _rounded(fired.double() / max(1, collector.tokens)),
            "max": _rounded(collector.max.cpu()),
            "mean": _rounded(collector.sum.cpu() / fired.clamp(min=1)),
            "peak": _peak_tokens(collector.top, text, names),
        }
        if effects := logit_effects(sae, model):
            lists += [("promoted", effects[0], names), ("suppressed", effects[1], names)]
            index["promoted"] = [[names(t) for t in row[:3]] for row in effects[0].indices.tolist()]
    _write_data(folder, "index", index)
    for number, start in enumerate(range(0, sae.d_sae, LATENTS_PER_FILE)):
        part = slice(start, start + LATENTS_PER_FILE)
        entries: list[dict[str, Any]] = [{} for _ in near.indices[part]]
        for name, ranked, of in lists:
            found = (ranked.indices[part].tolist(), ranked.values[part].tolist())
            for entry, ids, values in zip(entries, *found, strict=True):
                entry[name] = [[of(i), _digits(v)] for i, v in zip(ids, values, strict=True)]
        if collector is not None:
            for kind, passages in (("top", collector.top), ("random", collector.random)):
                for entry, shown in zip(entries, _passages(passages, part), strict=True):
                    entry[kind] = shown
            counts = collector.histogram[part].tolist()
            for entry, count in zip(entries, counts, strict=True):
                entry["histogram"] = _trimmed(count, collector.lowest or 0)
        _write_data(folder, f"latents-{number}", entries)
    return {
        "folder": folder.name,
        "count": sae.d_sae,
        "latents_per_file": LATENTS_PER_FILE,
        "rows_per_file": rows_per_file,
        "before": BEFORE,
    }


def _passages(passages: Passages, part: slice) -> list[list[Any]]:
    """For each latent, ``[row, position, [offset, activation, offset, activation, ...]]``."""
    keys, rows = passages.keys[part].tolist(), passages.rows[part].tolist()
    positions, windows = passages.positions[part].tolist(), passages.windows[part].tolist()
    found = []
    for k, r, p, w in zip(keys, rows, positions, windows, strict=True):
        found.append([
            [row, position, [n for i, a in enumerate(window) if a > 0 for n in (i, _digits(a))]]
            for key, row, position, window in zip(k, r, p, w, strict=True)
            if math.isfinite(key)
        ])  # fmt: skip
    return found


def _peak_tokens(top: Passages, text: HeldOutText, names: TokenNames) -> list[list[str]]:
    """The tokens a latent peaks on, most frequent among its top passages first; at most three."""
    found = []
    lists = (top.keys.tolist(), top.rows.tolist(), top.positions.tolist())
    for keys, rows, positions in zip(*lists, strict=True):
        tokens = [
            names.in_row(text.rows[row].tolist(), position)
            for key, row, position in zip(keys, rows, positions, strict=True)
            if math.isfinite(key)
        ]
        found.append(sorted(dict.fromkeys(tokens), key=tokens.count, reverse=True)[:3])
    return found


def _trimmed(counts: list[int], lowest: int) -> list[int]:
    """``[first half-octave, count, count, ...]`` without the empty ends."""
    filled = [i for i, count in enumerate(counts) if count]
    return [lowest + filled[0], *counts[filled[0] : filled[-1] + 1]] if filled else []


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _rounded(values: Tensor) -> list[float]:
    return [_digits(v) for v in values.tolist()]


def _write_data(folder: Path, name: str, value: Any) -> None:
    write_text(folder / f"{name}.js", f"fastsaeData({encode(name)},{encode(value)});\n")
