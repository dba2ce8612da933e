"""Tokens: documents packed into rows of one length, with nothing thrown away.

Reading and tokenising happen in a background thread, a few batches of documents ahead. The state
speaks of what was taken out of it, never of what was read ahead.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..lm.encoding import Encoder
from .text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES_AHEAD = 8
"""Batches of documents that may be tokenised before they are asked for."""


class _Tokenised(NamedTuple):
    ids: np.ndarray  # int32
    text: dict[str, Any]  # the position in the text after them
    counts: Counter[str]  # what the encoder met until then


class TokenPacker:
    """An iterator of rows of token ids: int64 tensors of ``context_length``, maybe a shorter last one.

    With a BOS token, every row and every document begins with it; where the two fall together it is
    one token. Without, every document ends with EOS, if there is one. All other tokens of the text
    come out exactly once, in order.

    ``separator`` is ``bos``, ``eos`` or None; ``seconds`` were spent so far on waiting for text to be
    read and tokenised; ``counts`` are those of the text and of its :class:`Encoder`, as far as tokens
    were taken. ``embeddings``, if given, is how many token ids the language model knows; of chats, with
    ``role``, what other roles say is marked as unread. ``text`` belongs to the packer once the first row was
    asked for.
    """

    def __init__(
        self,
        text: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        *,
        documents_per_batch: int = 64,
        role: str | None = None,
        embeddings: int | None = None,
    ) -> None:
        self.text = text
        self.role = role
        self.context_length = context_length
        self.seconds = 0.0
        self._tokenizer = tokenizer
        self._at_once = documents_per_batch
        self._embeddings = embeddings
        self._bos = tokenizer.bos_token_id
        has_only_eos = self._bos is None and tokenizer.eos_token_id is not None
        self._prefix = [] if self._bos is None else [self._bos]
        self._suffix = [tokenizer.eos_token_id] if has_only_eos else []
        self.separator = "bos" if self._prefix else "eos" if self._suffix else None
        self._ids = np.empty(0, np.int32)  # tokenised; those before _taken are given out already
        self._taken = 0
        self._text_state = text.state_dict()  # after what is in _ids
        self._counts: Counter[str] = Counter()  # the encoder's, likewise
        self._ahead: _ReadAhead | None = None

    def __iter__(self) -> TokenPacker:
        return self

    def __next__(self) -> Tensor:
        while len(self._ids) - self._taken < self.context_length and self._tokenise():
            pass
        if self.exhausted:
            raise StopIteration
        begins = self._bos is None or self._ids[self._taken] == self._bos
        prefix = [] if begins else self._prefix
        end = self._taken + self.context_length - len(prefix)
        row = [*prefix, *self._ids[self._taken : end].tolist()]
        self._taken = min(end, len(self._ids))
        return torch.tensor(row)

    @property
    def exhausted(self) -> bool:
        """Whether the text has ended and every token was given out."""
        while self._taken == len(self._ids) and self._tokenise():
            pass
        return self._taken == len(self._ids)

    def _tokenise(self) -> bool:
        """Append the next documents' tokens; False at the end of the text."""
        if self._ahead is None:
            text = self.text
            encoder = Encoder(
                self._tokenizer, text.name, skip=text.skip_bad_lines, role=self.role,
                embeddings=self._embeddings,
            )  # fmt: skip
            encoder.counts.update(self._counts)
            batches = _tokenised(text, encoder, self._prefix, self._suffix, self._at_once)
            self._ahead = _ReadAhead(batches)
        start = time.perf_counter()
        new = next(self._ahead, None)
        self.seconds += time.perf_counter() - start
        if new is None:
            return False
        self._ids, self._taken = np.concatenate([self._ids[self._taken :], new.ids]), 0
        self._text_state, self._counts = new.text, new.counts
        return True

    def lane(self, lane: int, lanes: int) -> TokenPacker:
        """A packer of one of ``lanes`` lanes of the text that is not tokenised yet; the first one has the
        tokens that were not given out, too. Nothing is to be taken out of this packer any more."""
        self._stop_reading()
        mine = copy(self)
        mine.text = self.text.lane(lane, lanes, self._text_state)
        mine._text_state, mine.seconds = mine.text.state_dict(), 0.0
        if lane:
            mine._ids, mine._taken, mine._counts = np.empty(0, np.int32), 0, Counter()
        return mine

    @property
    def counts(self) -> dict[str, int]:
        both = Counter(self._text_state["counts"])
        both.update(self._counts)
        return dict(both)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """``tensors``: the int32 ids not given out yet; ``meta``: the position in the text after them."""
        leftover = torch.from_numpy(self._ids[self._taken :])  # what it is of never changes
        meta = {"text": self._text_state, "counts": dict(self._counts)}
        return {"tensors": {"leftover": leftover}, "meta": meta}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on with the row that came next at ``state``; nothing is tokenised again."""
        self._stop_reading()
        self.text.load_state_dict(state["meta"]["text"])
        self._text_state = self.text.state_dict()
        self._counts = Counter(state["meta"].get("counts", {}))
        self._ids, self._taken = state["tensors"]["leftover"].numpy().astype(np.int32), 0

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _tokenised(
    text: TextSource, encoder: Encoder, prefix: list[Any], suffix: list[Any], n: int
) -> Iterator[_Tokenised]:
    """The tokens of the text, ``n`` documents at a time, and where each batch of them ends."""
    while documents := list(islice(text, n)):
        ids = [np.asarray(prefix + ids + suffix, np.int32) for ids in encoder(documents) if ids]
        tokens = np.concatenate([np.empty(0, np.int32), *ids])
        yield _Tokenised(tokens, text.state_dict(), encoder.counts.copy())


class _ReadAhead:
    """The items of ``items``, made in a background thread, at most ``BATCHES_AHEAD`` in advance.

    What ``items`` raises is raised here in its turn. Nothing else may use ``items``, or what it reads,
    until ``close()`` has returned.
    """

    def __init__(self, items: Iterator[_Tokenised]) -> None:
        self._queue = queue.Queue[tuple[_Tokenised | None, BaseException | None]](BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(items, self._queue, self._stop), name="fastsae-text", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __next__(self) -> _Tokenised:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # as any iterator: once ended, it stays so
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """Give up what was read ahead, and wait for the thread to let go of ``items``."""
        self._stop.set()
        self._thread.join()


def _fill(items: Iterator[_Tokenised], results: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            result = (next(items), None)
        except BaseException as error:  # handed over to whoever waits for the item
            result = (None, error)
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                break
            except queue.Full:
                continue
        if result[1] is not None:
            return
