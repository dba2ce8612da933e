"""Text: documents, one at a time, from shards in an order drawn from a seed.

Text is shuffled by the order of its shards alone, so that a position in it is two numbers; activations
are mixed later, by the buffer.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

import numpy as np

from ..errors import CheckpointError, StreamError
from ..files import differences
from ..lm.encoding import SKIP, Document
from ..lm.hub_access import is_transient

log = logging.getLogger(__name__)

RETRY_SECONDS = (1, 2, 4, 8, 16, 30, 60, 60, 60, 60)
"""Waits between attempts to read on when the network fails; after the last one the run stops."""
_WHOLE = (0, 1, 1)
"""The lane that is the whole text: every shard, and every document of it."""


class TextSource:
    """An iterator of documents over shards, in an order drawn from ``seed``; blank ones are passed over.

    ``read(shard)`` iterates over the records of a shard: a document, or, where there is none to be had,
    the StreamError that says why. That is raised, or with ``skip_bad_lines`` left out, counted and told
    once. The state is the position: the number of shards finished and of records read in the current
    one. When the network fails for a while, the shard is opened again and read on from the position; no
    document is lost or comes twice. Raises StreamError if the network stays away for the whole of
    ``RETRY_SECONDS``, or if every record was left out.

    Args:
        name: for messages.
        content: what tells the text apart from another one of the same shape, by file or by name.
        whole_shards: whether lanes are dealt whole shards, where there are enough: each is far away, and
            there are many, of one size.

    ``counts``: ``documents`` read, ``blank_documents`` and ``skipped_records``.
    """

    def __init__(
        self,
        shards: Sequence[Any],
        read: Callable[[Any], Iterable[Document | StreamError]],
        *,
        name: str,
        seed: int = 0,
        skip_bad_lines: bool = False,
        content: Mapping[str, str] | None = None,
        whole_shards: bool = False,
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(shards))
        self.name = name
        self.skip_bad_lines = skip_bad_lines
        self.counts = Counter(documents=0, blank_documents=0, skipped_records=0)
        self._content = dict(content or {})
        self._whole_shards = whole_shards
        # Of the shards (by their place in the order), and of the documents of one, every how many-th is read.
        self._lane, self._of_shards, self._of_documents = _WHOLE
        self._shards = [shards[i] for i in order]
        self._read = read
        self._shard = 0
        self._document = 0
        self._reader: Iterator[Document | StreamError] | None = None
        self._failures = 0

    @property
    def revision(self) -> str | None:
        """The commit that a data set of the hub is read at."""
        return self._content.get("revision")

    def __iter__(self) -> TextSource:
        return self

    def __next__(self) -> Document:
        while self._shard < len(self._shards):
            try:
                record = self._next_of_shard()
            except Exception as error:  # every library has its own for a lost connection
                if not is_transient(error):
                    raise
                self._wait(error)
                continue
            self._failures = 0
            if record is None:
                self._shard, self._document, self._reader = self._shard + 1, 0, None
            elif isinstance(record, StreamError):
                self._skip(record)
            elif not record or (isinstance(record, str) and record.isspace()):
                self.counts["blank_documents"] += 1
            else:
                self.counts["documents"] += 1
                return record
        skipped = self.counts["skipped_records"]
        if skipped and not self.counts["documents"]:
            raise StreamError(f"{self.name}: every one of {skipped} records was left out as bad")
        raise StopIteration

    def _next_of_shard(self) -> Document | StreamError | None:
        if (self._shard - self._lane) % self._of_shards:
            return None  # another lane's
        # The shard's number rotates which lane begins.
        others = (self._lane - self._shard - self._document) % self._of_documents
        if self._reader is None:
            records = self._read(self._shards[self._shard])
            self._reader = islice(records, self._document + others, None, self._of_documents)
        record = next(self._reader, None)
        if record is not None:
            self._document += others + 1
        return record

    def _skip(self, bad: StreamError) -> None:
        if not self.skip_bad_lines:
            raise StreamError(f"{bad}; or {SKIP}")
        if not self.counts["skipped_records"]:
            log.warning(
                "left out: %s (after %s records). More of the kind are counted as skipped_records in the "
                "metrics", bad, f"{self.counts.total():,}",
            )  # fmt: skip
        self.counts["skipped_records"] += 1

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

    def lane(self, lane: int, lanes: int, start: Mapping[str, Any]) -> TextSource:
        """The share of one of ``lanes`` lanes of the documents behind ``start``, a state of this text:
        whole shards, or else every so many-th document of each. The first lane counts what came before.

        Every document is read by one lane. A lane passes over what others read, but does not keep it.
        """
        whole_shards = self._whole_shards and len(self._shards) - start["shard"] >= lanes
        dealt = [lane, lanes, 1] if whole_shards else [lane, 1, lanes]
        mine = copy(self)
        mine.load_state_dict({**start, "lane": dealt, "counts": {} if lane else start["counts"]})
        mine._content = {}  # the state of the whole text tells it
        return mine

    def state_dict(self) -> dict[str, Any]:
        dealt = (self._lane, self._of_shards, self._of_documents)
        return {
            "shard": self._shard,
            "document": self._document,
            "shards": len(self._shards),
            "counts": dict(self.counts),
            "content": self._content,
            **({} if dealt == _WHOLE else {"lane": list(dealt)}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises CheckpointError if the text is not what it was."""
        changed = differences(state.get("content", self._content), self._content)
        if changed:
            raise CheckpointError(
                "the text is not the one that the run was started on:\n  "
                + "\n  ".join(changed)
                + "\nGive the same text to go on, or another --name to start anew"
            )
        if state["shards"] != len(self._shards):
            raise CheckpointError(
                f"the run was started on {state['shards']} shards of text, {self.name} now has "
                f"{len(self._shards)}; give the same text to go on, or another --name to start anew"
            )
        self._shard, self._document, self._reader = state["shard"], state["document"], None
        self._lane, self._of_shards, self._of_documents = state.get("lane", _WHOLE)
        self.counts = Counter({**dict.fromkeys(self.counts, 0), **state.get("counts", {})})


def as_document(value: Any, where: str, text_column: str) -> Document | StreamError:
    """What a cell of a text column holds; "" for an empty one, a StreamError for what is no document."""
    match value:
        case None | []:
            return ""
        case str():
            return value
        case {"role": [*_], "content": [*_]}:  # messages by column, as some tables keep them
            pairs = zip(value["role"], value["content"], strict=False)
            value = [{"role": role, "content": content} for role, content in pairs]
    if isinstance(value, list):
        if all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            return value
        chat = [_message(message) for message in value]
        if None not in chat:
            return chat  # type: ignore[return-value]
    kind = type(value).__name__
    if isinstance(value, list) and value:
        kind = f"a list of {type(value[0]).__name__}"
    return StreamError(
        f"{where}: column {text_column!r} holds {kind}, expected text, a chat (messages with a role and "
        f"a content) or token ids; choose another with --text-column"
    )


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def _message(value: Any) -> dict[str, Any] | None:
    """A message as chat templates read it, also from ``from`` and ``value``, and from parts of text."""
    match value:
        case {"role": str(role), "content": str(content)}:
            return value
        case {"role": str(role), "content": [*parts]} if all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            return value | {"content": "".join(part["text"] for part in parts)}
        case {"from": str(role), "value": str(content)}:
            return {"role": _ROLES.get(role, role), "content": content}
        case {"role": str(), "content": None}:  # a call of a tool
            return value
    return None


_OTHERS = ("messages", "conversations", "conversation", "input_ids", "content")


def no_column(where: str, text_column: str, columns: Iterable[str]) -> StreamError:
    """The error of data that has other columns."""
    columns = list(columns)
    likely = next((name for name in _OTHERS if name in columns), None)
    example = f", perhaps --text-column {likely}" if likely else ""
    return StreamError(
        f"{where} has no column {text_column!r}; its columns are {', '.join(map(repr, columns))}: "
        f"choose one with --text-column{example}"
    )
