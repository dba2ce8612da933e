"""Tokens: documents packed into rows of one length, with nothing thrown away."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenPacker:
    """An iterator of rows of token ids: int64 tensors of ``context_length``, maybe a shorter last one.

    With a BOS token, every row and every document begins with it; where the two fall together it is
    one token. Without, every document ends with EOS, if there is one. All other tokens of the text
    come out exactly once, in order.

    ``separator`` is ``bos``, ``eos`` or None; ``seconds`` were spent on reading and tokenising so far.
    """

    def __init__(
        self,
        text: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        *,
        documents_per_batch: int = 64,
    ) -> None:
        self.text = text
        self.context_length = context_length
        self.seconds = 0.0
        self._tokenizer = tokenizer
        self._documents_per_batch = documents_per_batch
        self._bos = tokenizer.bos_token_id
        has_only_eos = self._bos is None and tokenizer.eos_token_id is not None
        self._prefix = [] if self._bos is None else [self._bos]
        self._suffix = [tokenizer.eos_token_id] if has_only_eos else []
        self.separator = "bos" if self._prefix else "eos" if self._suffix else None
        self._ids = np.empty(0, np.int32)  # tokenised; those before _taken are given out already
        self._taken = 0

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
        start = time.perf_counter()
        documents = list(islice(self.text, self._documents_per_batch))
        if documents:
            encoded = self._tokenizer(
                documents, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
            new = [self._prefix + ids + self._suffix for ids in encoded if ids]
            rest = self._ids[self._taken :]
            self._ids = np.concatenate([rest, *(np.asarray(ids, np.int32) for ids in new)])
            self._taken = 0
        self.seconds += time.perf_counter() - start
        return bool(documents)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """``tensors``: the int32 ids not given out yet; ``meta``: the position in the text after them."""
        leftover = torch.from_numpy(self._ids[self._taken :].copy())
        return {"tensors": {"leftover": leftover}, "meta": {"text": self.text.state_dict()}}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on with the row that came next at ``state``; nothing is tokenised again."""
        self.text.load_state_dict(state["meta"]["text"])
        self._ids, self._taken = state["tensors"]["leftover"].numpy().astype(np.int32), 0
