"""Held-out text as rows of token ids, each of one document, so that documents stay apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import StreamError
from .encoding import Document, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass: ``tokens [n, t]`` int64, padded at the end; ``text [n, t]``, which of
    them are text (neither padding nor special tokens); ``lengths [n]`` without padding;
    ``documents [n]``; ``first``, the number of the first row."""

    tokens: Tensor
    text: Tensor
    lengths: Tensor
    documents: Tensor
    first: int

    def documents_of(self, mask: Tensor) -> Tensor:
        """The document of every position in ``mask [n, t]``, on the CPU."""
        mask = mask.cpu()
        return self.documents[:, None].expand(mask.shape)[mask]


class HeldOutText:
    """Token ids of text to evaluate on. Ids alone are kept; activations are never all in memory.

    Args:
        rows: token ids, one tensor a row; no row is empty. Nothing is measured at those that are marked as
            :func:`~fastsae.lm.encoding.unread`.
        documents: the document each row belongs to, for statistics over documents.
        special_ids: tokens that are not text: nothing is measured at them.
        documents_are: what a document is, for messages and tables.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        documents: Sequence[int],
        special_ids: Iterable[int],
        name: str,
        documents_are: str = "documents",
    ) -> None:
        if not rows:
            raise StreamError(f"there is no text to evaluate on: {name} is empty")
        self.marked_rows = [row.to(torch.int32) for row in rows]
        self.rows = [torch.where(row < 0, ~row, row) for row in self.marked_rows]
        self.documents = list(documents)
        self.special_ids = torch.tensor(sorted(special_ids), dtype=torch.int64)
        self.name = name
        self.documents_are = documents_are
        self.tokens = sum(int(is_text(row, self.special_ids).sum()) for row in self.marked_rows)
        if not self.tokens:
            raise StreamError(f"there is no text to evaluate on: {name} holds special tokens alone")

    @classmethod
    def tokenize(
        cls,
        texts: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        tokens: int | None = None,
        name: str = "the text",
        prepend_bos: bool = True,
        skip_bad_lines: bool = False,
    ) -> HeldOutText:
        """Cut every document into rows of at most ``context_length``, each beginning with BOS, if the
        tokenizer has one and ``prepend_bos`` is set.

        Documents that cannot be encoded raise StreamError, or with ``skip_bad_lines`` are left out.
        Reading stops after ``tokens`` tokens of text, in the middle of a document if need be, or at
        the end of the text.
        """
        bos = tokenizer.bos_token_id
        prefix = [bos] if prepend_bos and bos is not None else []
        width = context_length - len(prefix)
        rows: list[Tensor] = []
        documents: list[int] = []
        left = sys.maxsize if tokens is None else tokens
        encode = Encoder(tokenizer, name, skip=skip_bad_lines)
        for number, text in enumerate(texts):
            (ids,) = encode([text])
            ids = ids[: min(left, len(ids))]
            for start in range(0, len(ids), width):
                rows.append(torch.tensor(prefix + ids[start : start + width]))
                documents.append(number)
            left -= len(ids)
            if left <= 0:
                break
        return cls(rows, documents, special_ids(tokenizer), name)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, tokens: float, fewest: int = 1) -> HeldOutText:
        """About ``tokens`` tokens of it, in whole rows, at least ``fewest``, evenly spread; all it has if
        those are no more."""
        count = max(fewest, math.ceil(tokens / self.tokens * len(self)))
        if count >= len(self):
            return self
        kept = [i * len(self) // count for i in range(count)]
        rows, documents = [self.marked_rows[i] for i in kept], [self.documents[i] for i in kept]
        return HeldOutText(
            rows, documents, self.special_ids.tolist(), self.name, self.documents_are
        )

    def batches(self, rows: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """The text in order, ``rows`` rows at a time, each batch as long as its longest row."""
        for first in range(0, len(self.rows), rows):
            part = self.marked_rows[first : first + rows]
            longest = max(map(len, part))
            tokens = torch.zeros(len(part), longest, dtype=torch.int64)
            for i, row in enumerate(part):
                tokens[i, : len(row)] = row
            lengths = torch.tensor([len(row) for row in part])
            inside = torch.arange(longest) < lengths[:, None]
            text = inside & is_text(tokens, self.special_ids)
            tokens = torch.where(tokens < 0, ~tokens, tokens)
            documents = torch.tensor(self.documents[first : first + rows])
            yield Batch(tokens.to(device), text.to(device), lengths, documents, first)


def is_text(tokens: Tensor, special_ids: Tensor) -> Tensor:
    """Which of ``tokens`` are neither special nor marked as unread."""
    return (tokens >= 0) & ~torch.isin(tokens, special_ids)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that are not text: BOS, EOS, padding and all that the tokenizer adds as special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.all_special_ids))
