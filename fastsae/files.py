"""Tensors in a file, readable by whom the user's other files are."""

from __future__ import annotations

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
