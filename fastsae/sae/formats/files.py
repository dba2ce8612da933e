"""Files of an SAE: read with a reason when it fails, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import FormatError
from ...files import flush, save_tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path.name} is missing; it must lie beside the weights") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path.name} is not readable JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path.name} holds a {type(content).__name__} where an object belongs")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a ``.safetensors`` or ``.pt`` file, on the CPU; code in it is never run.

    Raises:
        FormatError: the file is damaged, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path.name} is damaged, or holds more than tensors, which would mean running code from "
            f"it ({first_line(error)}); get it again, or save its state_dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        raise FormatError(f"{path.name} is damaged ({first_line(error)}); get it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path.name} holds a {type(content).__name__}, not a dict of tensors")
    strangers = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise FormatError(
            f"{path.name} holds {', '.join(map(repr, strangers))} that are not tensors, as a training "
            f"backup does; it must be the state_dict of the SAE alone"
        )
    return content


def first_line(error: Exception) -> str:
    """What an error of another library says, without its paragraphs of advice."""
    return (str(error) or type(error).__name__).splitlines()[0]


def replace_files(directory: Path, contents: dict[str, Any], last: str) -> None:
    """Write ``contents`` (file name -> tensors for .safetensors and .pt, an object for .json, and for
    .yaml, of which JSON is a part).

    All files are written aside first; then the old ``last`` is removed, the others take their places,
    and the new ``last`` comes in the end. An interruption at any moment leaves the old files, the new
    files, or a folder without ``last``, which no reader takes for an SAE.
    """
    if directory.exists() and not directory.is_dir():
        raise FormatError(f"{directory} is a file; give a folder")
    encoded = {n: _encode_json(c) for n, c in contents.items() if n.endswith((".json", ".yaml"))}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as aside:
        for name, content in contents.items():
            path = Path(aside, name)
            if name in encoded:
                path.write_bytes(encoded[name])
            elif path.suffix == ".safetensors":
                save_tensors(content, path)
            else:
                # The archive inside is named after the file, so the name aside must be the final one.
                torch.save(content, path)
            flush(path)
        if last in contents:
            (directory / last).unlink(missing_ok=True)
        for name in sorted(contents, key=lambda name: name == last):
            os.replace(Path(aside, name), directory / name)


def _encode_json(content: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"the SAE's metadata cannot be written as JSON ({error}); keep finite numbers, strings, "
            f"booleans, None, lists and dicts in it"
        ) from error
    return (text + "\n").encode()
