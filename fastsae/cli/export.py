"""Write the dashboards of an SAE for another program to show.

    fastsae export RUN --neuronpedia DIR
    fastsae export SAE --model DIR --text-files held-out.jsonl --neuronpedia DIR

runs the language model and the SAE over text, as fastsae evaluate does, and writes a folder that Neuronpedia
imports: its release, model, source set and source, and the features and activations of every latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..errors import ConfigError
from .options import SaeFlags, TextFlags, parse
from .presets import preset_of

_KINDS = {"resid_post": "res", "attn_out": "att", "mlp_out": "mlp"}
"""What Neuronpedia's source sets begin with, by the place that an SAE reads."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export, seen on what, and what it is called there."""

    sae: SaeFlags
    text: TextFlags
    neuronpedia: str | None = None
    """Folder for the import, made if absent: MODEL-ID/LAYER-SOURCE-SET is written in it."""
    tokens: int = 1_048_576
    """Tokens of text to find passages in, at most: of a run without other flags, those it held out."""
    model_id: str | None = None
    """Neuronpedia's id of the language model. [the end of its name, in lower case]"""
    source_set: str | None = None
    """Neuronpedia's id of the set that the SAE is in. [res-, att-, mlp- or transcoder-fastsae, for the place that it
    reads; hook-fastsae for any other]"""
    release: str | None = None
    """Neuronpedia's id of the release. [the source set's]"""
    creator: str = "fastsae"
    """Author to show."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """Id of a user in the database imported to. [that of Neuronpedia's own imports]"""

    def __post_init__(self) -> None:
        if self.neuronpedia is None:
            raise ConfigError("nothing to export to: give a folder with --neuronpedia")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}")


def main(arguments: Sequence[str], prog: str) -> None:
    """Collect and export. Raises FastsaeError."""
    options = parse(ExportOptions, arguments, prog, __doc__)
    from ..evaluation.evaluate import evaluate, inference_modes
    from ..evaluation.provenance import tokenize_for
    from ..files import require_writable
    from ..lm.held_out import HeldOutText
    from ..reporting.dashboard.collect import Collector
    from ..reporting.neuronpedia import Names, export
    from ..reporting.run_folder import RUN, RunFolder
    from ..sae.transcoder import Transcoder

    assert options.neuronpedia is not None
    folder = Path(options.neuronpedia).expanduser()
    require_writable(folder)
    sae = options.sae.load()
    name = options.sae.model_name(sae)
    kind = _KINDS.get(options.sae.site(sae).hook, "hook")
    kind = "transcoder" if isinstance(sae, Transcoder) else kind
    source_set = options.source_set or f"{kind}-fastsae"
    names = Names(
        options.model_id or PurePath(name).name.lower(),
        source_set,
        options.release or source_set,
        options.creator,
        options.creator_id,
    )
    source, own = Path(options.sae.source), None
    if (source / RUN).is_file() and (options.text, options.sae.model) == (TextFlags(), None):
        own = RunFolder.read(source).held_out()
    if isinstance(own, HeldOutText):
        text, model = own.part(options.tokens), options.sae.load_model(sae)
    else:
        texts = options.text.open(preset_of(name))
        model = options.sae.load_model(sae)
        text = tokenize_for(
            sae, model, texts, options.sae.context(sae), tokens=options.tokens, name=texts.name,
            skip_bad_lines=options.text.skip_bad_lines,
        )  # fmt: skip
    collector = Collector(sae.d_sae, sae.device)
    evaluate(
        sae, text, inference_modes(sae)[:1], model=model, losses=False, rows=options.sae.batch_rows,
        outlier_norm=options.sae.outliers(sae), observers=[collector],
    )  # fmt: skip
    print(f"wrote {export(folder, sae, collector, model, text, names)}")  # noqa: T201
