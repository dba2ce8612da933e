"""Tensors in a file, readable by whom the user's other files are; and what tells files apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """``safetensors.torch.save_file`` with the permissions that any new file gets here (the umask's).

    safetensors gives its files to their owner alone, which locks a group out of shared SAEs and caches.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


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
