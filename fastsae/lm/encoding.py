"""Documents as token ids: text, chats through the tokenizer's template, and ids as they are."""

from __future__ import annotations

import logging
import re
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


def unread(token: int) -> int:
    """A token that the model reads and nothing is measured at, as it stands among others: negative."""
    return ~token


def token_id(token: int) -> int:
    """The id of a token, whether it is marked as :func:`unread` or not."""
    return token if token >= 0 else ~token


class Encoder:
    """Turns documents into token ids, less the BOS and EOS of their own that they are given anyway.

    ``counts`` says what was not taken as it came: ``replaced_characters`` (halves of surrogate pairs,
    which no tokenizer takes, as U+FFFD), ``own_bos`` and ``own_eos`` (documents that brought the token
    that sets documents apart), ``other_roles`` (tokens marked as unread) and ``skipped_records``. Each is
    told once, when it first happens.

    Args:
        name: of the text, for messages.
        skip: leave out a document that cannot be encoded, instead of raising StreamError.
        role: take chats alone, and mark with :func:`unread` all tokens but what this role says in them.
        embeddings: how many token ids the language model knows, if fewer than the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "the text",
        *,
        skip: bool = False,
        role: str | None = None,
        embeddings: int | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._tokenizer, self._name, self._skip = tokenizer, name, skip
        self._embeddings = embeddings
        self._role = role
        self._documents = 0
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos = bos
        # Where BOS begins a document, an EOS at its end is text like any other token, unless it is BOS.
        self._eos = eos if bos is None or bos == eos else None

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        """The ids of each document; none for one that is left out."""
        found: list[list[int]] = [[] for _ in documents]
        texts: dict[int, str] = {}
        read: dict[int, list[tuple[int, int]]] = {}  # where in the text the role speaks
        for i, document in enumerate(documents):
            self._documents += 1
            try:
                is_chat = bool(document) and isinstance(document[0], dict)
                if self._role is not None and not is_chat:
                    raise StreamError(
                        f"{self._name} holds a document that is no chat, and --train-on {self._role} takes "
                        f"what that role says in chats; choose their column with --text-column"
                    )
                if isinstance(document, str):
                    texts[i] = self._clean(document)
                elif is_chat:
                    texts[i], read[i] = self._render(document)
                else:
                    found[i] = self._checked(document)
            except StreamError as error:
                if not self._skip:
                    raise StreamError(f"{error}; or {SKIP}") from error.__cause__
                self._count("skipped_records", 1, f"a record was left out ({error})")
        if texts:
            plain = dict.fromkeys(("add_special_tokens", "return_attention_mask", "verbose"), False)
            encoded = self._tokenizer(
                list(texts.values()), return_offsets_mapping=self._role is not None, **plain
            )
            for i, ids in zip(texts, encoded["input_ids"], strict=True):
                found[i] = ids
                if self._embeddings is not None and ids and max(ids) >= self._embeddings:
                    raise StreamError(
                        f"the tokenizer gives token {max(ids)}, and the language model has embeddings for "
                        f"{self._embeddings}: it belongs to another model, or was given tokens that the "
                        f"model does not know"
                    )
            if self._role is not None:
                for i, places in zip(texts, encoded["offset_mapping"], strict=True):
                    found[i] = self._marked(found[i], places, read[i])
        found = [self._bare(ids) for ids in found]
        if self._role is not None:
            marked = sum(token < 0 for ids in found for token in ids)
            said = f"what the {self._role} does not say is read by the model, and not trained on"
            self._count("other_roles", marked, said)
        return found

    def _bare(self, ids: list[int]) -> list[int]:
        start, end = 0, len(ids)
        while start < end and token_id(ids[start]) == self._bos:
            start += 1
        while end > start and token_id(ids[end - 1]) == self._eos:
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

    def _render(self, chat: list[Any]) -> tuple[str, list[tuple[int, int]]]:
        """A chat as the template writes it, and where in it what the role says begins and ends.

        That is found by writing it again with other words in the place of what is said: what is around them
        is the template's, and what is between has to be what the messages hold.
        """
        chat = [m | {"content": self._clean(m["content"])} if m.get("content") else m for m in chat]
        text = self._apply_template(chat)
        if self._role is None:
            return text, []
        said = {f"fastsae{i}said": m for i, m in enumerate(chat) if m.get("content")}
        others = iter(said)
        blank = [m | {"content": next(others)} if m.get("content") else m for m in chat]
        around = re.split("|".join(said) or "$", self._apply_template(blank))
        position, spans = len(around[0]), []
        as_it_stands = len(around) == len(said) + 1
        for message, after in zip(said.values(), around[1:], strict=False):
            content = message["content"]
            if not text.startswith(content + after, position):
                content = content.strip()  # as many templates do
            as_it_stands &= text.startswith(content + after, position)
            if message.get("role") == self._role:
                spans.append((position, position + len(content)))
            position += len(content) + len(after)
        if not as_it_stands:
            raise StreamError(
                f"{self._name}: the tokenizer's chat template does not write what is said as it stands, so "
                f"that the tokens of the {self._role} cannot be told from others; leave --train-on out"
            )
        return text, spans

    def _apply_template(self, chat: list[Any]) -> str:
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
        return self._clean(str(rendered))

    def _marked(
        self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
    ) -> list[int]:
        keep = [any(a < stop and begin < b for begin, stop in spans) for a, b in offsets]
        return [i if kept else unread(i) for i, kept in zip(ids, keep, strict=True)]

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
        if number and not self.counts[what]:
            log.warning(
                "%s: %s (document %d that is read). Such are counted as %s in the metrics",
                self._name, said, self._documents, what,
            )  # fmt: skip
        self.counts[what] += number
