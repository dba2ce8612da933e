"""Documents as token ids: text, chats through the tokenizer's template, and ids as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Document = str | list[int] | list[dict[str, Any]]
"""Text; token ids, taken as they are; or a chat: messages with ``role`` and ``content``."""

SKIP = "leave such records out, counted, with --skip-bad-lines"


class Encoder:
    """Turns documents into token ids, less the BOS and EOS of their own that they are given anyway.

    ``counts`` says what was not taken as it came: ``replaced_characters`` (halves of surrogate pairs,
    which no tokenizer takes, as U+FFFD), ``own_bos`` and ``own_eos`` (documents that brought the token
    that sets documents apart) and ``skipped_records``. Each is told once, when it first happens.

    Args:
        name: of the text, for messages.
        skip: leave out a document that cannot be encoded, instead of raising StreamError.
        embeddings: how many token ids the language model knows, if fewer than the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "the text",
        *,
        skip: bool = False,
        embeddings: int | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._tokenizer, self._name, self._skip = tokenizer, name, skip
        self._embeddings = embeddings
        self._documents = 0
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos = bos
        # Where BOS begins a document, an EOS at its end is text like any other token, unless it is BOS.
        self._eos = eos if bos is None or bos == eos else None

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        """The ids of each document; none for one that is left out."""
        found: list[list[int]] = [[] for _ in documents]
        texts: dict[int, str] = {}
        for i, document in enumerate(documents):
            self._documents += 1
            try:
                if isinstance(document, str):
                    texts[i] = self._clean(document)
                elif document and isinstance(document[0], dict):
                    texts[i] = self._clean(self._render(document))
                else:
                    found[i] = self._checked(document)
            except StreamError as error:
                if not self._skip:
                    raise StreamError(f"{error}; or {SKIP}") from error.__cause__
                self._count("skipped_records", 1, f"a record was left out ({error})")
        if texts:
            plain = dict.fromkeys(("add_special_tokens", "return_attention_mask", "verbose"), False)
            encoded = self._tokenizer(list(texts.values()), **plain)["input_ids"]
            for i, ids in zip(texts, encoded, strict=True):
                found[i] = ids
                if self._embeddings is not None and ids and max(ids) >= self._embeddings:
                    raise StreamError(
                        f"the tokenizer gives token {max(ids)}, and the language model has embeddings for "
                        f"{self._embeddings}: it belongs to another model, or was given tokens that the "
                        f"model does not know"
                    )
        return [self._bare(ids) for ids in found]

    def _bare(self, ids: list[int]) -> list[int]:
        start, end = 0, len(ids)
        while start < end and ids[start] == self._bos:
            start += 1
        while end > start and ids[end - 1] == self._eos:
            end -= 1
        for token, there in (("bos", start), ("eos", len(ids) - end)):
            if there:
                said = f"a document has its own {token.upper()}; it gets no second one"
                self._count(f"own_{token}", 1, said)
        return ids[start:end]

    def _clean(self, text: str) -> str:
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            # Both halves of a pair make a character; one alone is none.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            replaced = whole.count("\ufffd") - text.count("\ufffd")
            if replaced:
                said = (
                    f"{replaced} of {len(text)} characters of a document are half of a surrogate pair, "
                    f"as in an emoji cut in two; they are read as U+FFFD"
                )
                self._count("replaced_characters", replaced, said)
            return whole

    def _render(self, chat: list[Any]) -> str:
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise StreamError(
                f"{self._name} holds chats, and the tokenizer has no chat template to write them with; "
                f"use the model's chat version, or a column of plain text with --text-column"
            )
        try:
            rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(str(message.get("role")) for message in chat[:4])
            raise StreamError(
                f"{self._name}: the tokenizer's chat template refuses a chat ({roles}, ...): {error}"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _checked(self, ids: list[Any]) -> list[int]:
        size = len(self._tokenizer)
        for i in ids:
            if not 0 <= i < size:
                raise StreamError(
                    f"{self._name} holds the token id {i}, and the tokenizer has {size}: the ids are "
                    f"another tokenizer's; give the text instead, or the model they were made for"
                )
        return ids

    def _count(self, what: str, number: int, said: str) -> None:
        if not self.counts[what]:
            log.warning(
                "%s: %s (document %d that is read). Such are counted as %s in the metrics",
                self._name, said, self._documents, what,
            )  # fmt: skip
        self.counts[what] += number
