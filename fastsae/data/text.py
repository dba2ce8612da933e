"""Text: documents, one at a time, from shards in an order drawn from a seed.

Text is shuffled by the order of its shards alone, so that a position in it is two numbers; activations
are mixed later, by the buffer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..errors import CheckpointError, StreamError
from ..lm.hub_access import is_transient

log = logging.getLogger(__name__)

RETRY_SECONDS = (1, 2, 4, 8, 16, 30, 60, 60, 60, 60)
"""Waits between attempts to read on when the network fails; after the last one the run stops."""


class TextSource:
    """An iterator of documents (non-blank ``str``) over shards, in an order drawn from ``seed``.

    ``read(shard)`` iterates over the documents of a shard. The state is the position: the number of
    shards finished and of documents read in the current one. When the network fails for a while, the
    shard is opened again and read on from the position; no document is lost or comes twice. Raises
    StreamError if the network stays away for the whole of ``RETRY_SECONDS``.
    """

    def __init__(
        self,
        shards: Sequence[Any],
        read: Callable[[Any], Iterable[str]],
        *,
        name: str,
        seed: int,
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(shards))
        self.name = name
        self._shards = [shards[i] for i in order]
        self._read = read
        self._shard = 0
        self._document = 0
        self._reader: Iterator[str] | None = None
        self._failures = 0

    def __iter__(self) -> TextSource:
        return self

    def __next__(self) -> str:
        while self._shard < len(self._shards):
            try:
                document = self._next_of_shard()
            except Exception as error:  # every library has its own for a lost connection
                if not is_transient(error):
                    raise
                self._wait(error)
                continue
            self._failures = 0
            if document is None:
                self._shard, self._document, self._reader = self._shard + 1, 0, None
            elif document and not document.isspace():
                return document
        raise StopIteration

    def _next_of_shard(self) -> str | None:
        if self._reader is None:
            self._reader = islice(self._read(self._shards[self._shard]), self._document, None)
        document = next(self._reader, None)
        self._document += document is not None
        return document

    def _wait(self, error: Exception) -> None:
        self._reader = None  # a reader that has failed does not go on
        if self._failures == len(RETRY_SECONDS):
            raise StreamError(
                f"{self.name} could not be read for {sum(RETRY_SECONDS) // 60} minutes: {error}; check "
                f"the network, then give the same command again to go on from the last checkpoint"
            ) from error
        seconds = RETRY_SECONDS[self._failures]
        self._failures += 1
        log.warning("reading %s failed (%s); trying again in %d s", self.name, error, seconds)
        time.sleep(seconds)

    def state_dict(self) -> dict[str, int]:
        return {"shard": self._shard, "document": self._document, "shards": len(self._shards)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if the number of shards changed."""
        if state["shards"] != len(self._shards):
            raise CheckpointError(
                f"the run was started on {state['shards']} shards of text, {self.name} now has "
                f"{len(self._shards)}; give the same text to go on, or another --name to start anew"
            )
        self._shard, self._document, self._reader = state["shard"], state["document"], None


def as_text(value: object, where: str, text_column: str) -> str:
    """A cell of a text column; an empty one is "". Raises StreamError if it holds anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise StreamError(
            f"{where}: column {text_column!r} holds {type(value).__name__}, expected text; "
            f"choose another with --text-column"
        )
    return value


def no_column(where: str, text_column: str, columns: Iterable[str]) -> StreamError:
    """The error of data that has other columns."""
    return StreamError(
        f"{where} has no column {text_column!r}; its columns are {', '.join(map(repr, columns))}: "
        f"choose one with --text-column"
    )
