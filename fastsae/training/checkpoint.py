"""Checkpoints that are whole or absent, whatever happens while one is being written.

A checkpoint is the folder ``checkpoints/step_N``: written aside under another name, flushed to the
disk, and renamed. It holds ``sae_weights.safetensors`` and ``cfg.json`` (the SAE so far, as any saved
one), ``state.safetensors`` and ``stream.safetensors`` (everything else that a step and the stream read), of
a dictionary in shards ``shard_00.safetensors`` and so on, and ``state.json`` (counters, settings, and the
checksums of the tensor files). Each process writes what it has; the first makes it a checkpoint.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import checksum, flush, read_json, save_tensors, write_json
from ..sae import io
from ..sae.module import SAE
from ..sae.transcoder import Transcoder
from ..team import ALONE, Team

_NAME = re.compile(r"step_(\d+)")
_SAE_FILES = ("cfg.json", "sae_weights.safetensors")
# The SAE's own file already holds these, and scaling leaves them untouched.
_IN_SAE = {"sae.W_enc": "W_enc", "sae.W_dec": "W_dec"}


class Checkpoint(NamedTuple):
    """The content of one checkpoint, or some of it."""

    parts: dict[str, dict[str, Tensor]]
    """By file, without ``.safetensors``."""
    meta: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is not in shards: what a step reads by its name, and the stream's behind ``stream.``."""
        weights = self.parts.get("sae_weights", {})
        own = {name: weights[key] for name, key in _IN_SAE.items() if key in weights}
        return own | self.parts.get("state", {}) | self.parts.get("stream", {})


def shard_name(shard: int) -> str:
    """What a shard's part is called."""
    return f"shard_{shard:02}"


def save(
    directory: Path,
    step: int,
    sae: SAE | None,
    parts: Mapping[str, Mapping[str, Tensor]],
    meta: dict[str, Any],
    team: Team = ALONE,
    shards: int = 1,
) -> Path:
    """Write ``directory/step_{step}``, all processes together; older checkpoints stay, see :func:`prune`.

    Args:
        directory: the run's ``checkpoints`` folder; created if absent.
        sae: saved as other programs read it, scaling folded in, by the process that has it. Of a dictionary
            in ``shards`` its latents do not matter: those in the shards' parts are taken.
        parts: the tensors that this process writes, by file; the SAE's own ``W_enc`` and ``W_dec`` are not
            stored twice, but in shards.
        meta: anything JSON can hold; the first process's counts.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written. Older checkpoints are whole.
    """
    target = directory / f"step_{step}"
    aside = directory / f".step_{step}.partial"

    def begin() -> None:
        with _writing(directory, aside):
            directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(directory)
            aside.mkdir()

    def complete() -> None:
        with _writing(directory, aside):
            if shards > 1:
                assert sae is not None
                io.save(_assembled(sae, aside, shards), aside, files=_SAE_FILES)
                found[_SAE_FILES[1]] = checksum(aside / _SAE_FILES[1])
            write_json(aside / "state.json", {**meta, "checksums": found})
            for file in aside.iterdir():
                flush(file)
            flush(aside)
            aside.rename(target)
            flush(directory)

    team.on_first(begin)
    own = {}
    with _writing(directory, aside):
        if sae is not None and shards == 1:
            io.save(sae, aside, files=_SAE_FILES)
            own[_SAE_FILES[1]] = checksum(aside / _SAE_FILES[1])
        # Folding changes a transcoder's W_enc.
        twice = {} if isinstance(sae, Transcoder) else _IN_SAE
        for part, tensors in parts.items():
            file = aside / f"{part}.safetensors"
            save_tensors({n: _on_host(t) for n, t in tensors.items() if n not in twice}, file)
            own[file.name] = checksum(file)
            flush(file)
    found = {name: sum_ for each in team.share(own) for name, sum_ in each.items()}
    team.on_first(complete)
    return target


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _assembled(sae: SAE, directory: Path, shards: int) -> SAE:
    """``sae`` with the latents of all the shards whose parts are in ``directory``."""
    parts = [load_file(directory / f"{shard_name(i)}.safetensors") for i in range(shards)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "W_dec", "b_enc")}
    whole = copy.copy(sae)
    whole._parameters = {  # the others are shared with the part
        **sae._parameters,
        "W_enc": nn.Parameter(rows["W_enc"].T),
        "W_dec": nn.Parameter(rows["W_dec"]),
        "b_enc": nn.Parameter(rows["b_enc"]),
    }
    whole.d_sae = len(rows["b_enc"])
    whole.levels = (whole.d_sae,)
    return whole.cpu()


@contextmanager
def _writing(directory: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(_cannot_write(directory, error)) from error


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints.

    Runs that train side by side are all saved before any is pruned, so a kill between their writes
    leaves a step that all of them have.
    """
    _delete(directory, steps(directory)[:-keep])


def discard_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps than ``step``, which are going to be written again."""
    _delete(directory, [found for found in steps(directory) if found > step])


def _delete(directory: Path, unwanted: list[int]) -> None:
    try:
        for step in unwanted:
            # Renamed first: a half-deleted checkpoint must not look like a checkpoint.
            (directory / f"step_{step}").rename(directory / f".step_{step}.replaced")
        _remove_leftovers(directory)
    except OSError as error:
        raise CheckpointError(_cannot_write(directory, error)) from error


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    if not directory.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(name[1]) for name in names if name)


def newest(directory: Path) -> Path | None:
    """The newest checkpoint of a run's ``checkpoints`` folder, if there is one."""
    found = steps(directory)
    return directory / f"step_{found[-1]}" if found else None


def load(path: Path, parts: Collection[str] | None = None) -> Checkpoint:
    """Read and verify one checkpoint, or those of its ``parts`` that it has.

    Raises:
        CheckpointError: a file is missing, damaged or not what its checksum says.
    """
    meta = load_meta(path)
    found = {}
    try:
        for file, expected in meta["checksums"].items():
            name = file.removesuffix(".safetensors")
            if parts is not None and name not in parts:
                continue
            if checksum(path / file) != expected:
                raise ValueError(f"{file} does not have the content that was written")
            found[name] = load_file(path / file)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return Checkpoint(found, meta)


def load_meta(path: Path) -> dict[str, Any]:
    """The counters and settings of one checkpoint, without its tensors.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    try:
        meta = read_json(path / "state.json")
        if not isinstance(meta, dict) or "checksums" not in meta:
            raise ValueError("state.json does not have the content that was written")
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return meta


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"the checkpoint {path} is damaged ({error}). Delete that folder to go on from the one "
        f"before it, or train under another --name"
    )


def _cannot_write(directory: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    last = newest(directory)
    kept = f"the last checkpoint, {last}, is whole" if last else "there is no earlier checkpoint"
    return (
        f"cannot write to {directory}: {reason}; {kept}. Free some space or make the folder writable, "
        f"then give the same command again"
    )


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover)
