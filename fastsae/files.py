"""Files: whole or absent, JSON that every parser reads, checksums, and one process at a time in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError

# --- writing ---


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes the place of ``path`` when the block ends well."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write ``value`` as :func:`to_json` has it, whole or not at all."""
    write_text(path, to_json(value, indent=indent) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with replacing(path) as aside:
        save_tensors(tensors, aside)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """``safetensors.torch.save_file`` with the permissions that any new file gets here (the umask's).

    safetensors gives its files to their owner alone, which locks a group out of shared SAEs and caches.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def flush(path: Path) -> None:
    """Have a file or a folder on the disk itself before anything else happens."""
    if path.is_dir() and os.name == "nt":  # Windows cannot do this for a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- JSON ---


def to_json(value: Any, **options: Any) -> str:
    """``value`` as strict JSON: what :func:`plain` makes of it; ``options`` are those of ``json.dumps``."""
    return json.dumps(plain(value), allow_nan=False, **options)


def plain(value: Any) -> Any:
    """``value`` as it reads after a way through JSON: tuples are lists, numbers that are not finite None."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, or ValueError if it is not strict JSON in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON; a missing number is null")


# --- checksums ---


def checksum(content: Path | Tensor) -> str:
    """SHA-256, in hexadecimal, of a file or of the values of a tensor on the CPU."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    data = content.contiguous().view(torch.uint8).numpy().data if content.numel() else b""
    return hashlib.sha256(data).hexdigest()


# --- what tells files apart ---

_BLOCK, _BLOCKS = 4096, 256


def fingerprint(path: Path) -> str:
    """The size of a file and a hash of its content: of all of a small one, of 1 MB evenly spread over a
    large one, so that gigabytes of weights take no time."""
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            found.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return describe_content(size, found.hexdigest())


def describe_content(size: int, sha256: str) -> str:
    """A fingerprint as it is kept and shown."""
    return f"{size:,} bytes, sha256 {sha256[:16]}"


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each name whose value is not what it was, for messages."""
    return [
        f"{name}: {then.get(name, 'not there')} in the run, {now.get(name, 'not there')} now"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


# --- folders ---


def existing_ancestor(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def require_writable(directory: Path, option: str = "--out") -> None:
    """Raise ConfigError, which names ``option``, if nothing can be created under ``directory``.

    Creates nothing that stays.
    """
    ancestor = existing_ancestor(directory)
    probe = ancestor / f".fastsae-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        reason = f"{error.strerror or error} in {ancestor}"
        if not ancestor.is_dir():
            reason = f"{ancestor} is a file"
        raise ConfigError(
            f"cannot write to {directory}: {reason}. Choose another folder with {option}"
        ) from error


def hold(directory: Path) -> AbstractContextManager[object]:
    """Hold a folder, which is created if absent, for this process until the context ends.

    Raises ``filelock.Timeout`` if another process holds it, another OSError if it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # A moment's patience, for is_held holds it for a moment.
    return FileLock(directory / ".lock").acquire(timeout=0.5)


def is_held(directory: Path) -> bool:
    """Whether a process holds ``directory`` now; False where that cannot be found out."""
    lock = directory / ".lock"
    try:
        if lock.exists():
            with FileLock(lock).acquire(blocking=False):
                pass
    except OSError as error:
        return isinstance(error, Timeout)
    return False
