"""Which latents tell two sets of texts apart?

    fastsae contrast SAE --positive a.jsonl --negative b.jsonl
    fastsae contrast SAE --positive a.txt --negative b.txt --model DIR --fdr 0.01 --out DIR

A document is one observation: each latent's mean activation over its tokens. Latents are compared by
the rank-sum test, and those reported keep the false discovery rate below --fdr. Prints a table; writes
contrast.json, and contrast.html with a page for every latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .options import SaeFlags, output_folder, parse

if TYPE_CHECKING:
    from ..lm.encoding import Document


@dataclass(frozen=True)
class ContrastOptions:
    """Two sets of texts, how they are compared, and what to write."""

    sae: SaeFlags
    positive: tuple[str, ...] = ()
    """.txt, .jsonl or .parquet files of the first set, a document a record."""
    negative: tuple[str, ...] = ()
    """The same for the second set."""
    text_column: str = "text"
    """Column that holds the text; or chats, for the tokenizer's chat template; or token ids."""
    skip_bad_lines: bool = False
    """Leave out records that hold no text, and count them, instead of stopping at the first."""
    fdr: float = 0.05
    """False discovery rate among the latents reported."""
    documents: int = 2000
    """Documents of each set, at most; memory is two numbers per document and latent."""
    probe_latents: int = 8
    """Latents in the sparse probe."""
    seed: int = 0
    """Of the folds and of the shuffled labels."""
    out: str | None = None
    """Folder for contrast.json and contrast.html. [the SAE's own, if it is a folder]"""

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} texts: give files with --{name}")
        if self.documents < 1:
            raise ConfigError(f"documents must be at least 1, got {self.documents}")


def main(arguments: Sequence[str], prog: str) -> None:
    """Compare, print the table, and write what there is to write. Raises FastsaeError."""
    options = parse(ContrastOptions, arguments, prog, __doc__)
    from ..data.text_files import open_files
    from ..evaluation.contrast import check, contrast, describe, pool, summary
    from ..evaluation.evaluate import evaluate
    from ..evaluation.provenance import tokenize_for
    from ..files import write_json
    from ..reporting.dashboard.write import Collector, write_report_page

    folder = output_folder(options.out, options.sae.source)
    read = {name: getattr(options, name) for name in ("text_column", "seed", "skip_bad_lines")}
    texts: list[list[Document]] = [
        list(islice(open_files(files, **read), options.documents))
        for files in (options.positive, options.negative)
    ]
    check(options.fdr, options.probe_latents, len(texts[0]), len(texts[1]))
    sae = options.sae.load()
    context, outliers = options.sae.context(sae), options.sae.outliers(sae)
    rows = options.sae.batch_rows
    model = options.sae.load_model(sae)
    positive, negative = (
        pool(sae, model, side, context, rows, outliers, options.skip_bad_lines) for side in texts
    )
    result = contrast(positive, negative, options.fdr, options.probe_latents, options.seed)
    print(describe(result))  # noqa: T201
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "contrast.json"
    write_json(path, result)
    skip, name = options.skip_bad_lines, "both sets of texts"
    text = tokenize_for(sae, model, chain(*texts), context, name=name, skip_bad_lines=skip)
    passages = Collector(sae.d_sae, sae.W_dec.device)
    evaluation = evaluate(
        sae, text, model=model, losses=False, rows=rows, outlier_norm=outliers, observers=[passages]
    )
    shown = {"contrast": {"latents": result["latents"], "summary": summary(result)}}
    page = write_report_page(
        folder, sae, evaluation, passages, model, text,
        title="Contrast of two sets of texts", page="contrast.html", extra=shown,
    )  # fmt: skip
    print(f"wrote {path}, {page}")  # noqa: T201
