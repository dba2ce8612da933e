"""The report as files: one HTML page, and beside it the data it loads when somebody asks for it.

A page opened from a disk may not fetch files, but it may add scripts: so the data are scripts that
call ``fastsaeData(name, value)``. Every string reaches the page as JSON in ASCII with ``<`` escaped,
and is put there as text, never as HTML: whatever a token holds, it stays text.
"""

from __future__ import annotations

import html
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import to_json, write_text
from ...lm.held_out import HeldOutText
from ...progress import progress
from .collect import BEFORE, Collector, Passages
from .geometry import Ranked, TokenNames, name_in_row

LATENTS_PER_FILE = 256
TOKENS_PER_FILE = 65_536


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


def write_latents(
    folder: Path,
    collector: Collector | None,
    near: Ranked,
    effects: tuple[Ranked, Ranked] | None,
    text: HeldOutText | None,
    names: TokenNames | None,
) -> dict[str, Any]:
    """Write ``index.js``, ``latents-N.js`` and ``text-N.js``; returns what the page must know of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.js"):
        old.unlink()
    d_sae = len(near.indices)
    index: dict[str, Any] = {"near": _rounded(near.values[:, 0]) if near.values.shape[1] else []}
    rows_per_file = 1
    if collector is not None and text is not None and names is not None:
        rows_per_file = max(1, TOKENS_PER_FILE // max(map(len, text.rows)))
        rows = [names.row(row.tolist()) for row in text.rows]
        for number, start in enumerate(range(0, len(text), rows_per_file)):
            _write_data(folder, f"text-{number}", rows[start : start + rows_per_file])
        fired = collector.fired.cpu()
        index |= {
            "density": _rounded(fired.double() / max(1, collector.tokens)),
            "max": _rounded(collector.max.cpu()),
            "mean": _rounded(collector.sum.cpu() / fired.clamp(min=1)),
            "peak": _peak_tokens(collector.top, rows),
        }
    if effects is not None and names is not None:
        index["promoted"] = [[names(t) for t in row[:3]] for row in effects[0].indices.tolist()]
    _write_data(folder, "index", index)
    with progress("report: pages", d_sae, "latents") as advance:
        for number, start in enumerate(range(0, d_sae, LATENTS_PER_FILE)):
            part = slice(start, min(d_sae, start + LATENTS_PER_FILE))
            entries: list[dict[str, Any]] = [{} for _ in range(part.stop - part.start)]
            _fill(entries, "near", near, part, lambda latent: latent)
            if effects is not None and names is not None:
                _fill(entries, "promoted", effects[0], part, names)
                _fill(entries, "suppressed", effects[1], part, names)
            if collector is not None:
                counts = collector.histogram[part].cpu().tolist()
                for kind, passages in (("top", collector.top), ("random", collector.random)):
                    for entry, found in zip(entries, _passages(passages, part), strict=True):
                        entry[kind] = found
                for entry, count in zip(entries, counts, strict=True):
                    entry["histogram"] = _trimmed(count, collector.lowest or 0)
            _write_data(folder, f"latents-{number}", entries)
            advance(len(entries))
    return {
        "folder": folder.name,
        "count": d_sae,
        "latents_per_file": LATENTS_PER_FILE,
        "rows_per_file": rows_per_file,
        "before": BEFORE,
    }


def _fill(entries: list[dict[str, Any]], name: str, ranked: Ranked, part: slice, of: Any) -> None:
    indices, values = ranked.indices[part].tolist(), ranked.values[part].tolist()
    for entry, ids, numbers in zip(entries, indices, values, strict=True):
        entry[name] = [[of(i), _digits(v)] for i, v in zip(ids, numbers, strict=True)]


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


def _peak_tokens(top: Passages, named: list[list[str]]) -> list[list[str]]:
    """The tokens a latent peaks on, most frequent among its top passages first; at most three. ``named``
    are the rows of the text."""
    found = []
    for keys, rows, positions in zip(
        top.keys.tolist(), top.rows.tolist(), top.positions.tolist(), strict=True
    ):
        tokens = [
            name_in_row(named[row], position)
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
