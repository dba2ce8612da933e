"""An SAE's dashboards as Neuronpedia imports them: rows of its tables, as JSON lines.

The columns are those of Neuronpedia's published database schema that its own exporter fills. What the
report does not collect (correlations, histograms over the vocabulary) stays at the schema's default, [].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..files import replacing, write_text
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel
from ..progress import progress
from ..sae.cfg import transformer_lens_name
from ..sae.module import SAE
from .dashboard.collect import BEFORE, Collector, Passages
from .dashboard.geometry import Ranked, TokenNames, logit_effects, neighbours

LATENTS_PER_BATCH = 256
_TOP = -1
"""What the bins of a row hold that is there for its activation, and no draw from an interval."""
_NOT_COLLECTED = (
    *(f"correlated_{what}_{of}" for what in ("neurons", "features") for of in ("indices", "pearson", "l1")),
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "vector", "decoder_weights_dist",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What Neuronpedia calls things.

    ``model``, ``source_set`` and ``release`` are ids of letters, digits, dots, dashes and underscores;
    ``creator`` is the author that pages show, ``creator_id`` the id of a user in the database imported to.
    """

    model: str
    source_set: str
    release: str
    creator: str
    creator_id: str

    def __post_init__(self) -> None:
        for name in ("model", "source_set", "release"):
            if not re.fullmatch(r"[\w.-]+", getattr(self, name), re.ASCII):
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r}: Neuronpedia's ids are of letters, digits, dots, "
                    f"dashes and underscores"
                )


def export(
    directory: Path,
    sae: SAE,
    collector: Collector,
    model: SplicedModel,
    text: HeldOutText,
    names: Names,
) -> Path:
    """Write ``directory / model / LAYER-SOURCE_SET`` with ``release.jsonl``, ``model.jsonl``,
    ``sourceset.jsonl``, ``source.jsonl``, ``features/batch-N.jsonl.gz`` and ``activations/batch-N.jsonl.gz``;
    returns that folder. ``collector`` has observed the evaluation of ``text``.

    Files appear whole. Ids of rows are made of what the rows are of, so that exporting again replaces them.
    """
    source = f"{model.site.layer}-{names.source_set}"
    folder = directory / names.model / source
    for part in ("features", "activations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).glob("batch-*.jsonl.gz"):
            old.unlink()
    near, effects = neighbours(sae), logit_effects(sae, model)
    token_names = TokenNames(model.tokenizer)
    rows = [token_names.row(row.tolist()) for row in text.rows]
    of = {
        "creatorId": names.creator_id,
        "createdAt": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name, row in _tables(sae, model, text, names, source).items():
        write_text(folder / f"{name}.jsonl", json.dumps(row | of) + "\n")
    of |= {"modelId": names.model, "layer": source}
    hook = transformer_lens_name(sae.hook_name) or sae.hook_name
    with progress("neuronpedia", sae.d_sae, "latents") as advance:
        for number, start in enumerate(range(0, sae.d_sae, LATENTS_PER_BATCH)):
            part = slice(start, min(sae.d_sae, start + LATENTS_PER_BATCH))
            features = _features(part, sae, collector, near, effects, token_names)
            common = of | {"hookName": hook, "sourceSetName": names.source_set}
            _write(folder / f"features/batch-{number}.jsonl.gz", (common | row for row in features))
            passages = _activations(part, collector, rows, text.name, f"{names.model}/{source}")
            _write(folder / f"activations/batch-{number}.jsonl.gz", (of | row for row in passages))
            advance(part.stop - part.start)
    return folder


def _tables(
    sae: SAE, model: SplicedModel, text: HeldOutText, names: Names, source: str
) -> dict[str, dict[str, Any]]:
    """The rows that each of a release, a model, a source set and a source have."""
    about = f"BatchTopK SAE of {model.name}, {model.site}: {sae.d_sae} latents"
    if sae.k is not None:
        about += f", k = {sae.k:g}"
    public = {"visibility": "PUBLIC"}
    return {
        "release": public
        | {
            "name": names.release,
            "description": about,
            "descriptionShort": about,
            "urls": [],
            "creatorName": names.creator,
            "creatorNameShort": names.creator,
            "isNewUi": False,
            "featured": False,
            "defaultUmapSourceIds": [],
        },
        "model": public
        | {
            "id": names.model,
            "displayName": model.name,
            "displayNameShort": names.model,
            "instruct": getattr(model.tokenizer, "chat_template", None) is not None,
            "layers": model.num_layers,
            "neuronsPerLayer": 0,
            "dimension": model.d_model,
            "owner": "",
            "inferenceEnabled": False,
        },
        "sourceset": public
        | {
            "modelId": names.model,
            "name": names.source_set,
            "description": about,
            "type": "",
            "creatorName": names.creator,
            "releaseName": names.release,
            "urls": [],
            "hasDashboards": True,
        },
        "source": public
        | {
            "id": source,
            "modelId": names.model,
            "setName": names.source_set,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_prompts": len(text),
            "num_tokens_in_prompt": max(map(len, text.rows)),
            "dataset": text.name,
        },
    }


def _features(
    part: slice,
    sae: SAE,
    collector: Collector,
    near: Ranked,
    effects: tuple[Ranked, Ranked] | None,
    names: TokenNames,
) -> Iterator[dict[str, Any]]:
    """Rows of the latents in ``part``, for the table Neuron."""
    decoder = sae.W_dec[part].detach().float()
    aligned = decoder.abs().topk(min(3, sae.d_in), dim=1).indices
    of_neurons = decoder.gather(1, aligned)
    share = of_neurons.abs() / decoder.abs().sum(1, keepdim=True).clamp_min(1e-30)
    fired = collector.fired[part].double() / max(1, collector.tokens)
    columns: dict[str, list[Any]] = {
        "index": [str(i) for i in range(part.start, part.stop)],
        "maxActApprox": _rounded(collector.max[part]),
        "frac_nonzero": _rounded(fired),
        "topkCosSimIndices": near.indices[part].tolist(),
        "topkCosSimValues": _rounded(near.values[part]),
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": _rounded(of_neurons),
        "neuron_alignment_l1": _rounded(share),
    }
    for name, ranked in zip(("pos", "neg"), effects or (), strict=False):
        columns[f"{name}_str"] = [[names(t) for t in row] for row in ranked.indices[part].tolist()]
        columns[f"{name}_values"] = _rounded(ranked.values[part])
    first = collector.lowest or 0
    rest: dict[str, Any] = {"hasVector": False, **{name: [] for name in _NOT_COLLECTED}}
    counts = collector.histogram[part].tolist()
    for values, count in zip(zip(*columns.values(), strict=True), counts, strict=True):
        filled = [i for i, n in enumerate(count) if n]
        bars = range(filled[0], filled[-1] + 1) if filled else ()
        yield rest | dict(zip(columns, values, strict=True)) | {
            "freq_hist_data_bar_values": [_digits(2 ** ((first + i + 0.5) / 2)) for i in bars],
            "freq_hist_data_bar_heights": [count[i] for i in bars],
        }  # fmt: skip


def _activations(
    part: slice, collector: Collector, rows: list[list[str]], name: str, source: str
) -> Iterator[dict[str, Any]]:
    """Rows of the passages of the latents in ``part``, for the table Activation."""
    largest = _rounded(collector.max[part])
    for kind, passages in (("top", collector.top), ("random", collector.random)):
        for latent, found in zip(
            range(part.start, part.stop), _passages(passages, part), strict=True
        ):
            for row, position, window in found:
                start = max(0, position - BEFORE)
                tokens = rows[row][start : position - BEFORE + len(window)]
                values = [
                    _digits(v) if v else 0
                    for v in window[start - position + BEFORE :][: len(tokens)]
                ]
                peak = position - start
                key = f"{source}/{latent}/{kind}/{row}".encode()
                drawn = kind == "random"
                yield {
                    "id": f"c{hashlib.blake2b(key, digest_size=12).hexdigest()}",
                    "index": str(latent),
                    "tokens": tokens,
                    "values": values,
                    "maxValue": values[peak],
                    "maxValueTokenIndex": peak,
                    "qualifyingTokenIndex": peak,
                    "minValue": min(values),
                    "dataIndex": str(row),
                    "dataSource": name,
                    "lossValues": [],
                    "dfaValues": [],
                    "binMin": 0 if drawn else _TOP,
                    "binMax": largest[latent - part.start] if drawn else _TOP,
                    "binContains": 1 if drawn else _TOP,
                }


def _passages(passages: Passages, part: slice) -> Iterator[list[tuple[int, int, list[float]]]]:
    """For each latent, the row, the position of the peak, and the activations around it."""
    columns = (passages.keys, passages.rows, passages.positions, passages.windows)
    for keys, *found in zip(*(column[part].tolist() for column in columns), strict=True):
        yield [row for key, *row in zip(keys, *found, strict=True) if math.isfinite(key)]  # type: ignore[misc]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(values: Tensor) -> list[Any]:
    """Lists of numbers of four digits, nested as ``values`` is."""
    nested = lambda v: [nested(part) for part in v] if isinstance(v, list) else _digits(v)
    return nested(values.tolist())


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    with replacing(path) as aside:
        aside.write_bytes(gzip.compress(lines.encode(), compresslevel=5, mtime=0))
