"""Evaluate an SAE, of any format fastsae reads, on text it was not trained on.

    fastsae evaluate RUN
    fastsae evaluate SAE --model DIR --text-files held-out.jsonl --out DIR

Prints a table; writes evaluation.json, and report.html with a page for every latent. A finished run is
evaluated with its own model on the text that it held out; without further flags its summary, its picture
and its repository on the hub are completed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from .options import SaeFlags, TextFlags, output_folder, parse
from .presets import preset_of


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, on what, and what to write."""

    sae: SaeFlags
    text: TextFlags
    tokens: int | None = None
    """Tokens of text to evaluate on. [as many as training holds out: 65536, in the demo 16384; of a run,
    without other flags, no more than take a tenth of its training]"""
    modes: tuple[Literal["topk", "threshold", "batch"], ...] = ()
    """Inference modes. [all that the SAE has]"""
    losses: bool = True
    """Cross-entropy and KL of the language model with its activations replaced."""
    out: str | None = None
    """Folder for evaluation.json and report.html. [the SAE's own, if it is a folder]"""
    report: bool = True
    """Write report.html with a page for every latent."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}")


def main(arguments: Sequence[str], prog: str) -> None:
    """Evaluate, print the table, and write what there is to write. Raises FastsaeError."""
    options = parse(EvaluateOptions, arguments, prog, __doc__)
    from ..evaluation.evaluate import evaluate
    from ..evaluation.provenance import tokenize_for
    from ..evaluation.table import describe
    from ..files import write_json
    from ..lm.held_out import HeldOutText
    from ..reporting.dashboard.write import Collector, write_report_page
    from ..reporting.report import report_run
    from ..reporting.run_folder import RUN, RunFolder

    folder = output_folder(options.out, options.sae.source)
    finished = None
    source, device = Path(options.sae.source), options.sae.device
    if (source / RUN).is_file():
        finished = RunFolder.read(source)
        if options == EvaluateOptions(SaeFlags(options.sae.source, device=device), TextFlags()):
            evaluation = report_run(finished, device=None if device == "auto" else device)
            if evaluation is not None:
                print(describe(evaluation))  # noqa: T201
            return
    sae = options.sae.load()
    context, outliers = options.sae.context(sae), options.sae.outliers(sae)
    preset = preset_of(options.sae.model_name(sae))
    own = None
    if finished and (options.text, options.sae.model) == (TextFlags(), None):
        own = finished.held_out()
    if isinstance(own, HeldOutText):
        text = own.part(options.tokens or own.tokens)
        model = options.sae.load_model(sae)
    else:
        texts = options.text.open(preset)
        model = options.sae.load_model(sae)
        text = tokenize_for(
            sae, model, texts, context,
            tokens=options.tokens or preset.eval_tokens, name=texts.name,
            skip_bad_lines=options.text.skip_bad_lines,
        )  # fmt: skip
    observers = [Collector(sae.d_sae, sae.W_dec.device)] if options.report and folder else []
    result = evaluate(
        sae, text, options.modes or None, model=model, losses=options.losses, rows=options.sae.batch_rows,
        outlier_norm=outliers, observers=observers,
    )  # fmt: skip
    print(describe(result))  # noqa: T201
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    write_json(path, result.to_json())
    written = [path]
    if observers:
        written.append(write_report_page(folder, sae, result, observers[0], model, text))
    print("wrote " + ", ".join(map(str, written)))  # noqa: T201
