"""Documents of a data set: streamed from the hub, from a local directory, or saved by ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StreamError
from ..lm.hub_access import access_error, hub_is_reachable
from .text import TextSource, as_text, no_column

_SHARD_DOCUMENTS = 1000
_MOST_SHARDS = 256


def open_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    text_column: str = "text",
    seed: int = 0,
) -> TextSource:
    """Documents of a data set: an id on the hub (streamed), or a local directory that ``datasets``
    reads, also one that ``save_to_disk`` wrote.

    Raises StreamError: unknown, gated, unreachable, no such configuration, split or column.
    """
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if not Path(name).is_dir() and not hub_is_reachable():
        raise access_error("data set", name, ConnectionError("no network, or offline mode"))
    try:
        if saved:
            dataset, shards = _open_saved(name, split)
        else:
            import datasets

            dataset: Any = datasets.load_dataset(name, config, split=split, streaming=True)
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

    def read(shard: int) -> Iterator[str]:
        for record in dataset.shard(shards, shard):
            yield as_text(record[text_column], where, text_column)

    return TextSource(range(shards), read, name=name, seed=seed)


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
