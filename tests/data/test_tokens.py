"""Packing: every token of the text once and in order, and rows that go on after any interruption."""

from __future__ import annotations

import copy
import gc
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tokenizer
from torch import Tensor

from fastsae.data.text import TextSource
from fastsae.data.tokens import BATCHES_AHEAD, TokenPacker
from fastsae.errors import StreamError
from fastsae.lm.encoding import token_id
from fastsae.lm.held_out import HeldOutText

BOS, EOS = 2, 1
documents = st.lists(st.text("abc é", max_size=40), max_size=12)


def packer(texts: list[str], context_length: int, bos: bool = True, batch: int = 3) -> TokenPacker:
    source = TextSource([texts], iter, name="test", seed=0)
    return TokenPacker(source, tokenizer(bos), context_length, documents_per_batch=batch)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def joined(texts: list[str]) -> list[int]:
    return [i for text in texts if text.strip() for i in encode(text)]


@settings(deadline=None, max_examples=150)
@given(documents, st.integers(2, 30), st.booleans())
def test_every_token_once_and_in_order(texts: list[str], context_length: int, bos: bool):
    rows = list(packer(texts, context_length, bos))
    ids = [i for row in rows for i in row.tolist()]
    assert [i for i in ids if i not in (BOS, EOS)] == joined(texts)
    assert all(len(row) == context_length for row in rows[:-1])
    assert all(1 <= len(row) <= context_length and row.dtype == torch.int64 for row in rows)


@settings(deadline=None, max_examples=100)
@given(documents, st.integers(2, 30))
def test_rows_and_documents_begin_with_bos(texts: list[str], context_length: int):
    rows = list(packer(texts, context_length))
    assert all(row[0] == BOS for row in rows)
    # Undo the packing: a row's BOS is the document's own where a document begins there.
    documents_begun = sum(int((row == BOS).sum()) for row in rows)
    continued = 0
    left = [len(encode(t)) + 1 for t in texts if t.strip()]
    flat = []
    for length in left:
        flat += [True] + [False] * (length - 1)
    position = 0
    while position < len(flat):
        continues = not flat[position]
        continued += continues
        position += context_length - continues
    assert documents_begun == len(left) + continued
    assert not any((row[1:] == BOS)[:-1].logical_and((row[1:] == BOS)[1:]).any() for row in rows)


def test_by_hand():
    rows = [row.tolist() for row in packer(["ab", "cde", "f"], 4)]
    a, b, c, d, e, f = encode("abcdef")
    assert rows == [[BOS, a, b, BOS], [BOS, c, d, e], [BOS, f]]
    rows = [row.tolist() for row in packer(["ab", "cde", "f"], 4, bos=False)]
    assert rows == [[a, b, EOS, c], [d, e, EOS, f], [EOS]]


def test_without_bos_documents_end_with_eos():
    assert packer([], 4).separator == "bos"
    assert packer([], 4, bos=False).separator == "eos"


@settings(deadline=None, max_examples=100)
@given(documents, st.integers(2, 20), st.integers(0, 12), st.booleans(), st.integers(1, 5))
def test_the_next_row_is_the_next_row(
    texts: list[str], context_length: int, taken: int, bos: bool, batch: int
):
    whole = list(packer(texts, context_length, bos))
    interrupted = packer(texts, context_length, bos)
    for _ in range(min(taken, len(whole))):
        next(interrupted)
    state = interrupted.state_dict()
    resumed = packer(texts, context_length, bos, batch)  # another batching changes nothing
    resumed.load_state_dict(
        {"tensors": state["tensors"], "meta": json.loads(json.dumps(state["meta"]))}
    )
    assert_rows_equal(list(resumed), whole[taken:])
    assert_rows_equal(list(interrupted), whole[taken:])


def test_nothing_is_tokenised_twice(monkeypatch: pytest.MonkeyPatch):
    texts = [f"document {i} " * 20 for i in range(20)]
    first = packer(texts, 16)
    for _ in range(10):
        next(first)
    seen: list[str] = []
    resumed = packer(texts, 16)
    real = tokenizer()

    class Recording:
        bos_token_id, eos_token_id = real.bos_token_id, real.eos_token_id

        def __call__(self, batch, **options):
            seen.extend(batch)
            return real(batch, **options)

    resumed = TokenPacker(resumed.text, Recording(), 16, documents_per_batch=3)
    resumed.load_state_dict(first.state_dict())
    list(resumed)
    assert seen == texts[3:]  # the first batch of documents was tokenised before the interruption


def test_exhausted():
    assert packer(["", " "], 4).exhausted
    one = packer(["abc"], 4)
    assert not one.exhausted
    next(one)
    assert one.exhausted


def test_seconds_grow():
    one = packer(["abc" * 100], 8)
    assert one.seconds == 0.0
    next(one)
    assert one.seconds > 0.0


@settings(deadline=None, max_examples=30)
@given(documents, st.integers(2, 20), st.integers(0, 12), st.floats(0, 0.02))
def test_what_was_read_ahead_is_not_in_the_state(
    texts: list[str], context_length: int, taken: int, pause: float
):
    """However far the thread has got, the state is that of the rows given out."""
    whole = list(packer(texts, context_length))
    one = packer(texts, context_length, batch=1)
    for _ in range(min(taken, len(whole))):
        next(one)
    time.sleep(pause)
    resumed = packer(texts, context_length)
    resumed.load_state_dict(one.state_dict())
    assert_rows_equal(list(resumed), whole[taken:])
    # A packer that has run ahead goes back to where the state was taken.
    state = one.state_dict()
    rows = list(one)
    one.load_state_dict(state)
    assert_rows_equal(list(one), rows)


def test_an_error_in_the_background_comes_in_its_turn():
    def read(shard: list[str]):
        yield from shard
        raise StreamError("line 3 has no column")

    texts = ["abcd" * 5, "efgh" * 5]
    source = TextSource([texts], read, name="test", seed=0)
    one = TokenPacker(source, tokenizer(), 21, documents_per_batch=1)
    assert [len(next(one)), len(next(one))] == [21, 21]
    for _ in range(2):
        with pytest.raises(StreamError, match="line 3 has no column"):
            next(one)


def test_the_thread_reads_ahead_a_little_and_ends_with_its_packer():
    seen = 0

    def read(shard: list[str]):
        nonlocal seen
        for text in shard:
            seen += 1
            yield text

    one = TokenPacker(
        TextSource([["word " * 10] * 1000], read, name="test", seed=0), tokenizer(), 8,
        documents_per_batch=1,
    )  # fmt: skip
    assert seen == 0
    next(one)
    thread = one._ahead._thread
    deadline = time.monotonic() + 10
    while seen < 1 + BATCHES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 1 + BATCHES_AHEAD <= seen <= 2 + BATCHES_AHEAD
    del one
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def assert_rows_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


# --- documents that are not plain text ---


def with_template(bos: bool = True):
    found = copy.deepcopy(tokenizer(bos))
    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system messages') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    return found


CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def test_half_a_surrogate_pair_is_replaced_and_counted(caplog):
    texts = ["ab \ud83d", "plain", "\ud83d\ude00 \udc00\udc00"]
    one = packer(texts, 64, batch=1)
    ids = [i for row in one for i in row.tolist()]
    expected = ["ab \ufffd", "plain", "\U0001f600 \ufffd\ufffd"]
    assert ids == [i for text in expected for i in [BOS, *encode(text)]]
    assert one.counts["replaced_characters"] == 3
    told = [r.getMessage() for r in caplog.records if "surrogate" in r.getMessage()]
    assert len(told) == 1 and "1 of 4 characters" in told[0]
    text = HeldOutText.tokenize(texts, tokenizer(), 64)
    assert [row.tolist()[1:] for row in text.rows] == [encode(t) for t in expected]


@pytest.mark.parametrize("bos", [True, False])
def test_text_with_its_own_bos_or_eos_gets_no_second_one(bos: bool):
    own = "<bos>" if bos else "<eos>"
    texts = [f"{own}ab" if bos else f"ab{own}", "cd", f"{own}{own}ef" if bos else f"ef{own}{own}"]
    one = packer(texts, 64, bos=bos)
    plain = packer(["ab", "cd", "ef"], 64, bos=bos)
    assert_rows_equal(list(one), list(plain))
    assert one.counts["own_bos" if bos else "own_eos"] == 2
    rows, expected = (
        HeldOutText.tokenize(t, tokenizer(bos), 64).rows for t in (texts, ["ab", "cd", "ef"])
    )
    assert_rows_equal(rows, expected)


def test_ids_with_their_own_bos_get_no_second_one():
    documents = [[BOS, *encode("ab")], encode("cd")]
    assert_rows_equal(list(packer(documents, 64)), list(packer(["ab", "cd"], 64)))


def test_token_ids_are_taken_as_they_are():
    documents = [[5, 6, EOS, 7], [8]]
    assert [row.tolist() for row in packer(documents, 64)] == [[BOS, 5, 6, EOS, 7, BOS, 8]]
    with pytest.raises(StreamError, match=r"token id 260, and the tokenizer has 260: .*--skip-bad"):
        next(packer([[5, 260]], 64))


def test_chats_are_written_with_the_template():
    source = TextSource([[CHAT, "plain"]], iter, name="test", seed=0)
    (row,) = TokenPacker(source, with_template(), 64)
    assert row.tolist() == [BOS, *encode("<user>ab<assistant>cd"), BOS, *encode("plain")]
    with pytest.raises(StreamError, match="no chat template.*--text-column"):
        next(packer([CHAT], 64))


def roles(row: Tensor) -> tuple[str, str]:
    """A row as text, and of it what is trained on."""
    ids = [token_id(i) for i in row.tolist()]
    read = [i for i in row.tolist() if i >= 0 and i != BOS]
    return tokenizer().decode(ids), tokenizer().decode(read)


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_what_one_role_says_is_told_from_the_rest(role: str, caplog):
    chat = [
        {"role": "user", "content": "a user"},  # the template writes the same word
        {"role": "assistant", "content": " é assistant "},
        {"role": "user", "content": "a user"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "cd"},
    ]
    source = TextSource([[chat]], iter, name="test", seed=0)
    one = TokenPacker(source, with_template(), 256, role=role)
    (row,) = one
    text, read = roles(row)
    assert read == {"assistant": " é assistant cd", "user": "a usera user"}[role]
    plain = TextSource([[chat]], iter, name="test", seed=0)
    (whole,) = TokenPacker(plain, with_template(), 256)
    assert [token_id(i) for i in row.tolist()] == whole.tolist() and text.startswith("<bos><user>")
    assert one.counts["other_roles"] == int((row < 0).sum()) > 0
    assert sum("other_roles" in record.getMessage() for record in caplog.records) == 1


def test_a_template_that_trims_is_followed_and_one_that_changes_more_is_refused():
    chat = [{"role": "user", "content": "ab "}, {"role": "assistant", "content": " cd\n"}]
    found = with_template()
    found.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    )
    source = TextSource([[chat]], iter, name="test", seed=0)
    (row,) = TokenPacker(source, found, 64, role="assistant")
    assert roles(row)[1] == "cd"
    for content in ("m.content | upper", "m.content ~ m.content", "''"):
        found.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ " + content + " }}{% endfor %}"
        )
        with pytest.raises(StreamError, match=r"does not write what is said as it stands"):
            next(TokenPacker(TextSource([[chat]], iter, name="t", seed=0), found, 64, role="user"))


def test_a_role_is_told_in_chats_alone():
    for document in ("plain text", [5, 6]):
        source = TextSource([[document]], iter, name="test", seed=0)
        with pytest.raises(StreamError, match=r"no chat, and --train-on assistant takes what"):
            next(TokenPacker(source, with_template(), 64, role="assistant"))
    source = TextSource([["plain", CHAT]], iter, name="test", seed=0, skip_bad_lines=True)
    one = TokenPacker(source, with_template(), 64, role="assistant")
    assert roles(next(one))[1] == "cd" and one.counts["skipped_records"] == 1


def test_a_chat_that_the_template_refuses_is_named_or_left_out(caplog):
    documents = [CHAT, [{"role": "system", "content": "x"}], CHAT]
    for skip in (False, True):
        source = TextSource([documents], iter, name="chats.jsonl", seed=0, skip_bad_lines=skip)
        one = TokenPacker(source, with_template(), 64)
        if not skip:
            with pytest.raises(
                StreamError, match=r"chats\.jsonl: .*refuses a chat \(system, .*no system"
            ):
                next(one)
            continue
        assert int((next(one) == BOS).sum()) == 2
        assert one.counts["skipped_records"] == 1
    assert sum("no system messages" in record.getMessage() for record in caplog.records) == 1


def test_counts_are_those_of_what_was_taken_and_go_on_after_a_stop():
    texts = ["a\ud83d" * 4, " ", "b\ud83d" * 6, "c\ud83d" * 8]
    whole = packer(texts, 4, batch=1)
    rows = list(whole)
    assert whole.counts == {
        "documents": 3, "blank_documents": 1, "skipped_records": 0, "replaced_characters": 18
    }  # fmt: skip
    one = packer(texts, 4, batch=1)
    next(one)
    time.sleep(0.2)  # the thread is through with the text by now
    assert one.counts["documents"] == 1 and one.counts["replaced_characters"] == 4
    resumed = packer(texts, 4, batch=1)
    state = one.state_dict()
    resumed.load_state_dict(
        {"tensors": state["tensors"], "meta": json.loads(json.dumps(state["meta"]))}
    )
    assert_rows_equal(list(resumed), rows[1:])
    assert resumed.counts == whole.counts
