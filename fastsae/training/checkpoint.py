"""Checkpoints that are whole or absent, whatever happens while one is being written.

A checkpoint is the folder ``checkpoints/step_N``: written aside under another name, flushed to the
disk, and renamed. It holds ``sae_weights.safetensors`` and ``cfg.json`` (the SAE so far, as any saved
one), ``state.safetensors`` (everything else a step or the stream reads) and ``state.json`` (counters,
settings, and the checksums of the two tensor files).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import checksum, flush, read_json, save_tensors, write_json
from ..sae import io
from ..sae.module import SAE
from ..sae.transcoder import Transcoder

_NAME = re.compile(r"step_(\d+)")
_TENSOR_FILES = ("sae_weights.safetensors", "state.safetensors")
# The SAE's own file already holds these, and scaling leaves them untouched.
_IN_SAE = {"sae.W_enc": "W_enc", "sae.W_dec": "W_dec"}


class Checkpoint(NamedTuple):
    """The content of one checkpoint."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    directory: Path, step: int, sae: SAE, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> Path:
    """Write ``directory/step_{step}``; older checkpoints stay, see :func:`prune`.

    Args:
        directory: the run's ``checkpoints`` folder; created if absent.
        sae: saved as other programs read it, scaling folded in.
        tensors: what the run needs besides; the SAE's own ``W_enc`` and ``W_dec`` are not stored twice.
        meta: anything JSON can hold.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written. Older checkpoints are whole.
    """
    target = directory / f"step_{step}"
    aside = directory / f".step_{step}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        aside.mkdir()
        io.save(sae, aside, files=("cfg.json", "sae_weights.safetensors"))
        twice = (
            {} if isinstance(sae, Transcoder) else _IN_SAE
        )  # folding changes a transcoder's W_enc
        state = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if n not in twice}
        save_tensors(state, aside / "state.safetensors")
        checksums = {name: checksum(aside / name) for name in _TENSOR_FILES}
        write_json(aside / "state.json", {**meta, "checksums": checksums})
        for file in aside.iterdir():
            flush(file)
        flush(aside)
        aside.rename(target)
        flush(directory)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(_cannot_write(directory, error)) from error
    return target


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


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or not what its checksum says.
    """
    meta = load_meta(path)
    try:
        for name, expected in meta["checksums"].items():
            if checksum(path / name) != expected:
                raise ValueError(f"{name} does not have the content that was written")
        weights = load_file(path / "sae_weights.safetensors")
        tensors = load_file(path / "state.safetensors")
        tensors = {name: weights[key] for name, key in _IN_SAE.items()} | tensors
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return Checkpoint(tensors, meta)


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
