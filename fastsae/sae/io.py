"""SAEs on disk, in the formats of SAELens, dictionary_learning and sparsify.

Each module of ``formats`` translates one format, to and from what its files contain; reading and
writing the files is done here. Whatever a format cannot hold is refused, never approximated.
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

import torch

from ..errors import ConfigError, FormatError
from .activation import Inference
from .formats import dictionary_learning, saelens, sparsify
from .formats.files import first_line, read_json, read_tensors, replace_files
from .formats.portable import export
from .module import SAE

FORMATS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def save(
    sae: SAE,
    directory: str | Path,
    inference: Inference | None = None,
    format: str = "saelens",
    files: tuple[str, ...] | None = None,
) -> Path:
    """Write ``sae`` to ``directory`` for other programs to read; the SAE itself is not changed.

    Scalar input scaling is folded into the biases and the threshold, so the files take raw
    activations. Files appear whole or not at all, and equal SAEs give equal bytes.

    Args:
        directory: created if absent; an SAE of the same format in it is replaced.
        inference: how readers select: ``"topk"`` (``max(1, round(k))`` per token) or ``"threshold"``
            (JumpReLU at the tracked threshold). The SAE's own mode if absent.
        format: ``"saelens"``, ``"dictionary_learning"`` or ``"sparsify"``.
        files: write these files of the format alone.

    Returns: the directory.

    Raises:
        FormatError: the format cannot hold this SAE, its values are not finite, or ``directory``
            holds an SAE of another format. Nothing was written.
        OSError: the disk is full or the directory cannot be written.
    """
    directory = Path(directory).expanduser()
    if format not in FORMATS:
        raise FormatError(f"format = {format!r} is not one of {', '.join(map(repr, FORMATS))}")
    module = FORMATS[format]
    contents = module.to_files(export(sae, inference))
    others = [name for name in _formats_in(directory) if name != format]
    if others:
        raise FormatError(
            f"{directory} already holds an SAE in {others[0]} format, and two formats in one folder "
            f"cannot be told apart; give another folder"
        )
    if files is not None:
        contents = {name: contents[name] for name in files}
    replace_files(directory, contents, last=module.CONFIG)
    return directory


def load(source: str | Path, device: torch.device | str = "cpu") -> SAE:
    """Read an SAE, in eval mode, from a folder or the Hugging Face hub; the format is detected.

    Args:
        source: a folder, a file of an SAE in it, or ``"owner/name"`` or ``"owner/name/folder"`` on the hub.
        device: where the SAE is put.

    An SAE that fastsae saved comes back as it was: the exact ``k``, the threshold and the metadata,
    selecting as it was saved to. Others become the activation they state: TopK, JumpReLU (a ReLU is
    one with threshold 0), or BatchTopK where k and one threshold are both known.

    Raises:
        FormatError: there is no SAE, several formats are in one folder, a file is damaged, a tensor is
            missing or has the wrong shape or values that are not finite, or the SAE is of a kind
            fastsae does not have.
    """
    directory = _local_folder(source)
    name = detect_format(directory)
    module = FORMATS[name]
    weights = next(directory / file for file in module.WEIGHTS if (directory / file).is_file())
    try:
        sae = module.from_files(read_json(directory / module.CONFIG), read_tensors(weights))
    except (FormatError, ConfigError) as error:
        raise FormatError(f"the {name} SAE in {directory} cannot be read: {error}") from error
    hook = directory.name  # by which alone sparsify says which module an SAE reads
    if name == "sparsify" and re.fullmatch(r"(\w+\.)*(layers|h|blocks)\.\d+(\.\w+)*", hook):
        sae.metadata.setdefault("hook_name", hook)
    return sae.to(device).eval()


def detect_format(directory: str | Path) -> str:
    """The format of the SAE in a folder, by its weight files. Raises FormatError unless there is one."""
    directory = Path(directory)
    found = _formats_in(directory)
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"{directory} holds SAEs in several formats ({', '.join(found)}), which may differ; move "
            f"each to a folder of its own"
        )
    weights = [file for module in FORMATS.values() for file in module.WEIGHTS]
    message = f"{directory} holds no SAE: none of {', '.join(weights)} is there"
    below = sorted({path.parent.name for file in weights for path in directory.glob(f"*/{file}")})
    if below:
        message += f"; its folders {', '.join(below[:5])} do, name one of them"
    raise FormatError(message)


def _formats_in(directory: Path) -> list[str]:
    return [
        name
        for name, module in FORMATS.items()
        if any((directory / file).is_file() for file in module.WEIGHTS)
    ]


def _local_folder(source: str | Path) -> Path:
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        known = {file for m in FORMATS.values() for file in (m.CONFIG, *m.WEIGHTS)}
        if directory.name in known:
            return directory.parent
        raise FormatError(
            f"{directory} is a file of a name fastsae does not know; expected a folder, or one of "
            f"{', '.join(sorted(known))} in it"
        )
    repository = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+?))?/*", str(source))
    if repository is None:
        raise FormatError(
            f"{directory} does not exist; give a folder that holds an SAE, or 'owner/name' or "
            f"'owner/name/folder' for one on the Hugging Face hub"
        )
    return _download(repository[1], repository[2] or "")


def _download(repository: str, folder: str) -> Path:
    from huggingface_hub import snapshot_download

    # One copy of the weights is enough: where SAELens's format has two, safetensors is the one read.
    names = {file for m in FORMATS.values() for file in (m.CONFIG, m.WEIGHTS[0])}
    prefix = f"{folder}/" if folder else ""
    try:
        patterns = sorted(escape(prefix + name) for name in names)
        snapshot = snapshot_download(repository, allow_patterns=patterns)
    except Exception as error:  # what the hub's client raises has no common base
        raise FormatError(
            f"there is no such folder here, and {repository} cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}). Check the name and the connection, log in "
            f"with `hf auth login` if the repository is private or gated, or download it where there "
            f"is a connection and give the folder"
        ) from error
    directory = Path(snapshot, folder)
    if not _formats_in(directory):
        raise FormatError(
            f"{repository} on the Hugging Face hub has no SAE in {folder or 'its top folder'}; name "
            f"the folder that holds {' or '.join(m.WEIGHTS[0] for m in FORMATS.values())}, as in "
            f"'{repository}/folder'"
        )
    return directory
