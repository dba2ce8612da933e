"""Documents of a data set: streamed from the hub, from a local directory, or saved by ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StreamError
from ..files import fingerprint
from ..lm.encoding import Document
from ..lm.hub_access import access_error, commit_of, hub_is_reachable, is_transient
from .text import TextSource, as_document, no_column

_SHARD_DOCUMENTS = 1000
_MOST_SHARDS = 256


def open_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    revision: str | None = None,
    text_column: str = "text",
    **options: Any,
) -> TextSource:
    """Documents of a data set: an id on the hub (streamed), or a local directory that ``datasets``
    reads, also one that ``save_to_disk`` wrote.

    A branch of the hub is read at the commit that it has now, and a run that is resumed must find the
    same commit. ``options``: ``seed`` and ``skip_bad_lines`` of :class:`TextSource`.

    Raises StreamError: unknown, gated, unreachable, no such configuration, split or column. Raises
    ConfigError: a revision of a local directory.
    """
    local = Path(name).is_dir()
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if local and revision is not None:
        raise ConfigError(
            f"dataset_revision = {revision!r}, but {name} is a local directory, which has no revisions"
        )
    if not local and not hub_is_reachable():
        raise access_error("data set", name, ConnectionError("no network, or offline mode"))
    commit = None if local else commit_of(name, revision)
    try:
        if saved:
            dataset, shards = _open_saved(name, split)
        else:
            import datasets

            dataset: Any = datasets.load_dataset(
                name, config, split=split, streaming=True, revision=commit or revision
            )
            shards = dataset.num_shards
        columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    except StreamError:
        raise
    except Exception as error:  # the library raises many kinds; the message keeps what it says
        raise access_error("data set", name, error) from error
    where = f"the data set {name!r}, configuration {config!r}, split {split!r},"
    if text_column not in columns:
        raise no_column(where, text_column, columns)
    dataset = dataset.select_columns([text_column])

    def read(shard: int) -> Iterator[Document | StreamError]:
        number = 0
        try:
            for number, record in enumerate(dataset.shard(shards, shard), start=1):
                at = f"{where} shard {shard}, record {number}"
                yield as_document(record[text_column], at, text_column)
        except Exception as error:
            if is_transient(error):
                raise
            raise StreamError(
                f"{where} cannot be read behind record {number} of shard {shard}: {error}"
            ) from error

    content = _files(Path(name)) if local else {"revision": commit} if commit else {}
    return TextSource(
        range(shards), read, name=name, content=content, whole_shards=not local, **options
    )


def _files(folder: Path) -> dict[str, str]:
    """What tells the files of a data set apart from others; not those that ``datasets`` leaves there."""
    return {
        str(path.relative_to(folder)): fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".", "cache-"))
    }


def _open_saved(name: str, split: str) -> tuple[Any, int]:
    """What ``save_to_disk`` wrote, and how many shards to read it in: few documents each, to shuffle."""
    import datasets

    dataset = datasets.load_from_disk(name)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise StreamError(
                f"the data set {name!r} has no split {split!r}; it has "
                f"{', '.join(map(repr, dataset))}: choose one with --dataset-split"
            )
        dataset = dataset[split]
    return dataset, max(1, min(_MOST_SHARDS, len(dataset) // _SHARD_DOCUMENTS))
