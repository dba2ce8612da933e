"""Activations on disk: written once, then read in this run and others without the language model.

A cache is a folder of shards, ``activations_00000.safetensors`` and on, with one tensor ``[rows, D]``
for each site (``layer.17``, ``layer.17.mlp_out``), ``held_out.safetensors``, and ``manifest.json``: what the
activations are of, and for every chunk its rows and a checksum of them for each site. The manifest is
replaced after each shard, and the shard also holds the position in the text behind it: writing that
was interrupted goes on there, and so does a later run that wants more.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from filelock import Timeout
from safetensors.torch import load_file
from torch import Tensor

from ..config import Site, TrainConfig
from ..errors import CheckpointError, ConfigError, StreamError
from ..files import (
    checksum,
    existing_ancestor,
    fingerprint,
    hold,
    plain,
    read_json,
    write_json,
    write_tensors,
)
from ..lm.loading import weights_of
from ..progress import progress
from ..team import ALONE, Team
from .harvest import NONFINITE, OUTLIER, ChunkSource, Harvest, to_device
from .opening import open_text_chunks

log = logging.getLogger(__name__)

FORMAT = 2
SHARD_BYTES = 1 << 28
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STATE = "state."
_HELD_OUT = "held_out.safetensors"


def open_cache(
    config: TrainConfig, sites: Sequence[Site], device: torch.device, team: Team = ALONE
) -> CachedChunks:
    """The cache of ``config`` with ``sites``, complete: what is missing in it is harvested and written
    first.

    Raises ConfigError if something is missing and there are several processes: one writes it. Raises StreamError if the folder holds something else: activations of another model, place or text
    (it says which setting differs), a damaged cache, one that another process is writing; and if the
    disk is too small.
    """
    assert config.cache_dir is not None
    folder = Path(config.cache_dir)
    lanes, chunk = config.lanes or 1, config.harvest_batch * config.context_length
    wanted = -(-config.steps * config.batch_size // config.reuse) + config.pool_tokens
    wanted += (lanes - 1) * chunk  # a lane may get a chunk less than another
    manifest = _read_manifest(folder)
    if manifest is not None:
        _refuse_foreign(manifest, config, sites)
    if manifest is None or not (_rows(manifest) >= wanted or manifest["text_ended"]):
        if team.size > 1:
            held = _rows(manifest) if manifest else 0
            raise ConfigError(
                f"the cache in {folder} holds {held:,} of the {wanted:,} activations that this run reads, and "
                f"one process writes it: give the same command without torchrun and with --lanes {lanes}. As "
                f"soon as that trains it may be stopped, and this command goes on"
            )
        manifest = _write(folder, manifest, config, sites, device, wanted)
    return CachedChunks(folder, manifest, config, sites, device)


class CachedChunks(ChunkSource):
    """The chunks of a cache, as the buffer wants them; a chunk is its number.

    They come in the order they were written in, or, if ``config`` has another seed of the stream than
    the run that wrote them, in an order drawn from it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        config: TrainConfig,
        sites: Sequence[Site],
        device: torch.device,
    ) -> None:
        self._folder = folder
        self._sites = [site.key for site in sites]
        self._manifest = manifest
        self._held_out_tokens = config.eval_tokens
        with safetensors.safe_open(folder / _HELD_OUT, "pt") as held_out:
            found = (held_out.get_slice(f"layer.{key}").get_shape() for key in self._sites)
            self.widths = tuple(width for _, width in found)
        self.device = device
        self._chunks: list[tuple[str, int, dict[str, Any]]] = []
        for shard in manifest["shards"]:
            starts = accumulate((chunk["rows"] for chunk in shard["chunks"]), initial=0)
            chunks = zip(starts, shard["chunks"], strict=False)  # the last start is the end
            self._chunks += [(shard["file"], start, chunk) for start, chunk in chunks]
        self.chunk_tokens: int = manifest["identity"]["harvest_batch"] * config.context_length
        seed = config.resolved_stream_seed
        self._seed = None if seed == manifest["stream_seed"] else seed
        self._shuffle(len(self._chunks))
        self._lane, self._lanes, self._position = 0, 1, 0
        self._files: dict[str, Any] = {}

    def _shuffle(self, count: int) -> None:
        """Draw the order of the first ``count`` chunks; what was written later follows them."""
        self._shuffled = count
        self._order = np.arange(len(self._chunks))
        if self._seed is not None:
            self._order[:count] = np.random.default_rng(self._seed).permutation(count)

    @property
    def counts(self) -> dict[str, int]:
        """What was dropped when the whole cache was written; the first lane tells it."""
        counts = {} if self._lane else self._manifest["counts"]
        return {f"cache_{name}": count for name, count in counts.items()}

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        return tuple(self._manifest["metadata"][layer] for layer in self._sites)

    def lane(self, lane: int, lanes: int) -> CachedChunks:
        mine = copy(self)
        mine._lane, mine._lanes = lane, lanes
        return mine

    def draw(self) -> int | None:
        chunk = self._lane + self._position * self._lanes
        if chunk >= len(self._order):
            return None
        self._position += 1
        return int(self._order[chunk])

    def harvest(self, chunk: int) -> Harvest:
        """Read a chunk. Raises StreamError if it is not what was written."""
        name, start, written = self._chunks[chunk]
        path = self._folder / name
        end, layers = start + written["rows"], []
        try:
            if name not in self._files:
                self._files[name] = safetensors.safe_open(path, "pt")
            for layer in self._sites:
                rows = self._files[name].get_slice(f"layer.{layer}")[start:end]
                if checksum(rows) != written["checksums"][layer]:
                    raise ValueError(f"the content of rows {start} and on is not what was written")
                layers.append(to_device(rows, self.device))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise _damaged(path, error) from error
        verdict = torch.zeros(written["rows"], dtype=torch.uint8, device=self.device)
        return Harvest(tuple(layers), verdict, 0)

    def explain(self, verdict: Tensor) -> StreamError:
        raise AssertionError("a cache holds finite activations alone")

    def held_out(self) -> tuple[Tensor, ...]:
        path = self._folder / _HELD_OUT
        try:
            tensors = load_file(path)
            found = {name: checksum(tensor) for name, tensor in tensors.items()}
            if found != self._manifest["held_out"]["checksums"]:
                raise ValueError("the content is not what was written")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise _damaged(path, error) from error
        rows = [tensors[f"layer.{layer}"][: self._held_out_tokens] for layer in self._sites]
        return tuple(layer.to(self.device).float() for layer in rows)

    def pack(self, chunks: Sequence[int]) -> dict[str, Tensor]:
        return {"chunks": torch.tensor(chunks, dtype=torch.int64)}

    def unpack(self, tensors: dict[str, Tensor]) -> list[int]:
        return tensors["chunks"].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"position": self._position, "shuffled": self._shuffled}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position, shuffled = state["meta"]["position"], state["meta"]["shuffled"]
        if max(position, shuffled) > len(self._chunks):
            raise CheckpointError(
                f"the run has read {position} chunks of a cache of {shuffled}, and {self._folder} now "
                f"holds {len(self._chunks)}; give it the cache it was started with"
            )
        self._shuffle(shuffled)
        self._position = position


# --- what a cache is of ---


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that the cached activations depend on, but for the seed and the sites."""
    names = ["revision", "quantization", "context_length", "harvest_batch", "separate_documents"]
    names += ["activation_dtype", "eval_tokens", "text_column"]
    if not config.text_files:
        names += ["dataset", "dataset_config", "dataset_split", "dataset_revision"]
    model = Path(config.model)
    return {
        "model": model.name if model.is_dir() else config.model,
        "model_files": weights_of(config.model) if model.is_dir() else {},
        "text_files": [_content(Path(path)) for path in config.text_files],
        **{name: getattr(config, name) for name in names},
        "outlier_norm": config.stream_outlier_norm,
        **({} if config.train_on == "all" else {"train_on": config.train_on}),
    }


def _content(path: Path) -> dict[str, str]:
    """What tells a text file, or the files of a folder, apart from others of the same names."""
    if not path.is_dir():
        return {path.name: fingerprint(path)} if path.exists() else {}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): fingerprint(file) for file in files}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.exists():
        # A run that was killed at the very beginning leaves the held-out rows alone.
        if any(file.name != _HELD_OUT for file in folder.glob("[!.]*")):
            raise StreamError(
                f"{folder} is not empty and holds no cache of activations; give --cache-dir a folder of "
                f"its own"
            )
        return None
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        sizes = [(shard["file"], shard["bytes"]) for shard in manifest["shards"]]
        for name, size in [*sizes, (_HELD_OUT, manifest["held_out"]["bytes"])]:
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, {size} were written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return manifest


def _refuse_foreign(manifest: dict[str, Any], config: TrainConfig, sites: Sequence[Site]) -> None:
    now, then = plain(_identity(config)), manifest["identity"]
    found = [
        f"{name}: {then.get(name)!r} in the cache, {now.get(name)!r} now"
        for name in sorted({*now, *then})
        if then.get(name) != now.get(name)
    ]
    missing = [site.key for site in sites if site.key not in manifest["metadata"]]
    if missing:
        held = ", ".join(manifest["metadata"])
        found.append(f"layer: {held} in the cache, {', '.join(missing)} wanted")
    if found:
        raise StreamError(
            f"the cache in {config.cache_dir} holds other activations:\n  "
            + "\n  ".join(found)
            + "\nGive another --cache-dir, or the settings it was written with"
        )


def _damaged(path: Path, error: Exception) -> StreamError:
    return StreamError(
        f"the cache of activations is damaged: {path}: {error}. Delete the folder to have it written "
        f"anew, or give another --cache-dir"
    )


# --- writing ---


def _write(
    folder: Path,
    manifest: dict[str, Any] | None,
    config: TrainConfig,
    sites: Sequence[Site],
    device: torch.device,
    wanted: int,
) -> dict[str, Any]:
    """Harvest and append shards until the cache holds ``wanted`` activations, or the text ends."""
    if manifest is not None:
        # It was written in the order of its own seed and with all its sites, and goes on so.
        config = replace(config, stream_seed=manifest["stream_seed"])
        sites = tuple(map(Site.of_key, manifest["metadata"]))
    source = open_text_chunks(config, sites, device)
    dtype = _DTYPES[config.activation_dtype]
    row_bytes = sum(source.widths) * dtype.itemsize
    missing = wanted - (_rows(manifest) if manifest else 0)
    _require_space(folder, missing * row_bytes)
    with _writing(folder), progress("writing the cache", missing) as advance:
        names = [site.key for site in sites]
        if manifest is None:
            held_out = dict(zip(names, source.held_out(), strict=True))
            held_out = {f"layer.{n}": t.to(source.model.dtype).cpu() for n, t in held_out.items()}
            manifest = {
                "format": FORMAT,
                "identity": _identity(config),
                "stream_seed": config.resolved_stream_seed,
                "metadata": dict(zip(names, source.metadata, strict=True)),
                "held_out": {
                    "bytes": _save(held_out, folder / _HELD_OUT),
                    "checksums": {name: checksum(rows) for name, rows in held_out.items()},
                },
                "shards": [],
                "counts": {"special": 0, "nonfinite": 0, "outliers": 0},
                "text_ended": False,
                "source": None,
            }
            _save(manifest, folder / "manifest.json")
        elif manifest["shards"]:
            last = load_file(folder / manifest["shards"][-1]["file"])
            state = {n.removeprefix(_STATE): t for n, t in last.items() if n.startswith(_STATE)}
            source.load_state_dict({"tensors": state, "meta": manifest["source"]})
        while _rows(manifest) < wanted and not manifest["text_ended"]:
            parts: list[tuple[Tensor, ...]] = []
            chunks: list[dict[str, Any]] = []
            rows, counts = 0, Counter(manifest["counts"])
            verdicts: list[Tensor] = []
            state: dict[str, Any] = {}  # after the last of them
            failure: Exception | None = None
            while rows * row_bytes < SHARD_BYTES and _rows(manifest) + rows < wanted:
                try:
                    chunk = source.draw()
                except Exception as error:  # what came before is written first
                    failure = error
                    break
                if chunk is None:
                    manifest["text_ended"] = True
                    break
                harvest = source.harvest(chunk)
                kept = tuple(layer.to(dtype).cpu() for layer in harvest.kept())
                if len(harvest.verdict) and not len(kept[0]):
                    raise source.explain(harvest.verdict)
                verdicts.append(harvest.verdict.cpu())
                counts["special"] += harvest.special
                parts.append(kept)
                sums = {n: checksum(layer) for n, layer in zip(names, kept, strict=True)}
                chunks.append({"rows": len(kept[0]), "checksums": sums})
                rows += len(kept[0])
                advance(len(kept[0]))
                state = source.state_dict()
            name = f"activations_{len(manifest['shards']):05}.safetensors"
            if chunks:
                verdict = torch.cat(verdicts)
                source.require_mostly_finite(verdict)
                counts["nonfinite"] += int((verdict == NONFINITE).sum())
                counts["outliers"] += int((verdict == OUTLIER).sum())
                stacked = (torch.cat(layer) for layer in zip(*parts, strict=True))
                tensors = {f"layer.{n}": t for n, t in zip(names, stacked, strict=True)}
                tensors |= {_STATE + n: t.contiguous() for n, t in state["tensors"].items()}
                size = _save(tensors, folder / name)
                manifest["shards"].append({"file": name, "bytes": size, "chunks": chunks})
                manifest["source"] = state["meta"]
                manifest["counts"] = {**counts, **source.counts}
            _save(manifest, folder / "manifest.json")
            if failure is not None:
                raise failure
    log.info("the cache in %s holds %s activations", folder, f"{_rows(manifest):,}")
    return manifest


def _save(content: dict[str, Any], path: Path) -> int:
    """Write a file of the cache, tensors or JSON; returns its size in bytes."""
    try:
        if path.suffix == ".json":
            write_json(path, content, indent=None)
        else:
            write_tensors(path, content)
    except (OSError, safetensors.SafetensorError) as error:
        raise StreamError(
            f"cannot write to the cache {path.parent}: {error}; free some space or give another "
            f"--cache-dir, then give the same command again"
        ) from error
    return path.stat().st_size


def _rows(manifest: dict[str, Any]) -> int:
    return sum(chunk["rows"] for shard in manifest["shards"] for chunk in shard["chunks"])


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(existing_ancestor(folder)).free
    if free < needed:
        raise StreamError(
            f"the cache in {folder} needs {needed / 1e9:,.1f} GB more, and its disk has "
            f"{free / 1e9:,.1f} GB free; give --cache-dir on another disk, or lower --tokens"
        )


def _writing(folder: Path) -> AbstractContextManager[object]:
    """Hold the folder for this process. Raises StreamError if another one writes there."""
    try:
        return hold(folder)
    except Timeout:
        raise StreamError(
            f"another process is writing the cache {folder}; wait for it, or give another --cache-dir"
        ) from None
    except OSError as error:
        raise StreamError(
            f"cannot write to the cache {folder}: {error.strerror or error}; give another --cache-dir"
        ) from error
