"""An evaluation as lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .estimates import Estimate
from .evaluate import Evaluation


def describe(evaluation: Evaluation) -> str:
    """A table, one inference mode a column; intervals are 95 %, by bootstrap over documents."""
    e, modes = evaluation, list(evaluation.scores.values())
    inner = [*modes[0].levels][:-1]
    spreads = [f"{s.l0_quantile(0.05)} to {s.l0_quantile(0.95)}" for s in modes]
    rows: list[tuple[str, list[str]]] = [
        ("explained variance", [interval(s.explained_variance) for s in modes]),
        *((f"  by the first {m:,}", [interval(s.levels[m]) for s in modes]) for m in inner),
        ("normalised MSE", [interval(s.normalized_mse) for s in modes]),
        ("cosine", [interval(s.cosine) for s in modes]),
        ("L0", [interval(s.l0) for s in modes]),
        ("L0, 5 % to 95 % of tokens", spreads),
        ("alive latents", [f"{s.alive:,} of {len(s.fired):,}" for s in modes]),
        ("dense latents (over 10 %)", [f"{s.dense:,}" for s in modes]),
    ]
    if e.losses:
        rows += [
            ("cross-entropy, nats", [interval(s.cross_entropy) for s in modes]),
            ("loss recovered", [interval(s.loss_recovered) for s in modes]),
            ("  from mean ablation", [interval(s.loss_recovered_from_mean) for s in modes]),
            ("KL, nats", [interval(s.kl) for s in modes]),
        ]
    lines = [
        f"{e.tokens:,} tokens of {e.documents:,} {e.documents_are} ({e.text}); "
        f"95 % intervals over {e.documents_are}",
        *columns([[f"  {name}", *cells] for name, cells in [("", [*e.scores]), *rows]], left=9),
    ]
    if e.nonfinite:
        lines.append(f"{e.nonfinite:,} tokens left out: their activation is not finite")
    if e.outliers:
        lines.append(f"{e.outliers:,} tokens left out: the norm of their activation is an outlier")
    if e.pca_explained_variance is not None:
        lines.append(
            f"PCA with {e.pca_components} components explains {e.pca_explained_variance:.4f} (fitted to "
            f"half of the {e.documents_are}, scored on the other half, both ways)"
        )
    if e.losses:
        clean, zero, mean = (interval(e.losses[name]) for name in ("clean", "zero", "mean"))
        lines.append(f"the model's cross-entropy: clean {clean}, zero ablation {zero}, mean {mean}")
    return "\n".join(lines)


def interval(value: Estimate | None, digits: int = 4) -> str:
    """``0.8803 [0.8790, 0.8815]``, with as many digits as ``digits`` significant ones take."""
    if value is None or not math.isfinite(value):
        return "-"
    places = max(0, digits - len(str(int(abs(value)))) + (abs(value) < 1))
    if value.low is None or value.high is None:
        return f"{value:.{places}f}"
    return f"{value:.{places}f} [{value.low:.{places}f}, {value.high:.{places}f}]"


def columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of ``rows``: the first ``left`` columns begin below each other, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'<' if i < left else '>'}{width}" for i, width in enumerate(widths)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in rows]
