"""Text: every document once, in an order that the seed gives, from any position on."""

from __future__ import annotations

import gzip
import http.client
import json
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsae.data import dataset as dataset_module
from fastsae.data import text as text_module
from fastsae.data.dataset import open_dataset
from fastsae.data.text import RETRY_SECONDS, TextSource
from fastsae.data.text_files import LONGEST_DOCUMENT, open_files
from fastsae.errors import CheckpointError, ConfigError, StreamError


def shards(*sizes: int) -> TextSource:
    content = [[f"shard {s} document {i}" for i in range(n)] for s, n in enumerate(sizes)]
    return TextSource(content, iter, name="test", seed=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 30))
def test_resumes_at_any_document(sizes: list[int], position: int):
    whole = list(shards(*sizes))
    everything = [f"shard {s} document {i}" for s, n in enumerate(sizes) for i in range(n)]
    assert sorted(whole) == sorted(everything)
    source = shards(*sizes)
    assert list(islice(source, position)) == whole[:position]
    resumed = shards(*sizes)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert list(resumed) == whole[position:]


def test_every_document_once_in_an_order_of_the_seed():
    content = [[f"{s}.{i}" for i in range(3)] for s in range(20)]
    orders = [list(TextSource(content, iter, name="test", seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(d for shard in content for d in shard)
    assert orders[0] != [d for shard in content for d in shard]


def test_blank_documents_are_skipped_and_counted_in_the_position():
    source = TextSource([["", "a", " \n", "b"]], iter, name="test", seed=0)
    assert next(source) == "a"
    assert source.state_dict()["document"] == 2
    assert list(source) == ["b"]


def test_other_text_is_refused_on_resume():
    with pytest.raises(CheckpointError, match="started on 3 shards"):
        shards(1, 2).load_state_dict(shards(1, 2, 3).state_dict())


# --- a network that fails for a while ---


class Flaky:
    """Reads shards, but the connection breaks before each of the given reads."""

    def __init__(self, content: list[list[str]], failures: dict[int, Exception]) -> None:
        self.content, self.failures, self.reads = content, failures, 0

    def __call__(self, shard: list[str]):
        for document in shard:
            self.reads += 1
            if self.reads in self.failures:
                raise self.failures.pop(self.reads)
            yield document


def lost_connections() -> list[Exception]:
    wrapped = RuntimeError("datasets says so")
    wrapped.__cause__ = httpx.ReadTimeout("timed out")
    busy = OSError("Server error '503'")
    busy.response = SimpleNamespace(status_code=503)
    return [
        ConnectionResetError("reset"), TimeoutError(), type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client"})("cut"),
        http.client.IncompleteRead(b""), requests.exceptions.ChunkedEncodingError("cut"),
        httpx.ConnectError("no route"), wrapped, busy,
    ]  # fmt: skip


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(text_module.time, "sleep", found.append)
    return found


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.dictionaries(st.integers(1, 60), st.sampled_from(lost_connections()), max_size=12),
)
def test_a_flaky_network_loses_and_repeats_nothing(waits, sizes: list[int], failures: dict):
    content = [[f"shard {s} document {i}" for i in range(n)] for s, n in enumerate(sizes)]
    expected = list(TextSource(content, iter, name="test", seed=3))
    source = TextSource(content, Flaky(content, dict(failures)), name="test", seed=3)
    assert list(source) == expected


def test_waits_grow_are_logged_and_begin_anew(waits: list[float], caplog):
    content = [[f"document {i}" for i in range(6)]]
    failures = {n: ConnectionResetError("reset by peer") for n in (3, 6, 9, 13)}
    source = TextSource(content, Flaky(content, failures), name="fineweb", seed=0)
    assert list(source) == content[0]
    # Each time the shard is opened it is read from its start: 3 fails on the third document, 6 again.
    assert waits == [1, 2, 4, 1]
    assert "reading fineweb failed (reset by peer); trying again in 1 s" in caplog.text


def test_a_network_that_stays_away_ends_the_run(waits: list[float]):
    class Gone:
        def __call__(self, shard):
            raise httpx.ConnectError("no route")

    with pytest.raises(
        StreamError, match=r"could not be read for 5 minutes: no route.*same command"
    ):
        next(TextSource([["a"]], Gone(), name="test", seed=0))
    assert tuple(waits) == RETRY_SECONDS


@pytest.mark.parametrize("error", [StreamError("no column"), ValueError("bad"), KeyError("x")])
def test_other_errors_are_not_tried_again(waits: list[float], error: Exception):
    content = [["a", "b"]]
    source = TextSource(content, Flaky(content, {2: error}), name="test", seed=0)
    assert next(source) == "a"
    with pytest.raises(type(error)):
        next(source)
    gone = OSError("404")
    gone.response = SimpleNamespace(status_code=404)
    with pytest.raises(OSError, match="404"):
        next(TextSource(content, Flaky(content, {1: gone}), name="test", seed=0))
    assert not waits


# --- local files ---

RECORDS = ["first", "", "zweiter Übergang\nmit Zeile", None, "last"]


def write(folder: Path, kind: str) -> str:
    path = folder / f"text{kind}"
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(RECORDS))
    if kind == ".parquet":
        pq.write_table(
            pa.table({"id": range(len(RECORDS)), "text": RECORDS}), path, row_group_size=2
        )
    elif kind == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines.encode()))
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_records(tmp_path: Path, kind: str):
    expected = [t for t in RECORDS if t]
    assert list(open_files([write(tmp_path, kind)])) == expected
    source = open_files([write(tmp_path, kind)])
    next(source), next(source)
    resumed = open_files([write(tmp_path, kind)])
    resumed.load_state_dict(source.state_dict())
    assert list(resumed) == expected[2:]


@pytest.mark.parametrize("compressed", [False, True])
def test_txt_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, compressed: bool):
    paragraphs = [f"Paragraph {i}: " + "naïve words " * (i % 40) + "\n\n" for i in range(400)]
    content = "".join(paragraphs).replace("Paragraph 7", "\r\n\x85\u2028Paragraph 7")
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    documents = list(open_files([str(path)]))
    assert "".join(documents) == content
    assert len(documents) > 5
    assert all(d.endswith("\n\n") and len(d) < 10_000 for d in documents)


def test_txt_without_any_line_end(tmp_path: Path):
    path = tmp_path / "a.txt"
    content = "ü" * (3 * LONGEST_DOCUMENT + 5)
    path.write_text(content, encoding="utf-8")
    documents = list(open_files([str(path)]))
    assert "".join(documents) == content
    assert max(map(len, documents)) <= LONGEST_DOCUMENT


def test_directories_are_searched(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert sorted(open_files([str(tmp_path)])) == ["one", "two"]


@pytest.mark.parametrize("before", [0, 5, (1 << 20) - 1, (1 << 20) + 1])
@pytest.mark.parametrize("bad", [b"\xff rest", b"\xc3("])
def test_not_utf8_names_the_byte(tmp_path: Path, before: int, bad: bytes):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * before + bad)
    with pytest.raises(
        StreamError, match=rf"not UTF-8: byte {bad[0]:#04x} at position {before};.*iconv"
    ):
        open_files([str(path)])


def test_utf8_across_the_blocks_it_is_checked_in(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "ü".encode())
    assert "".join(open_files([str(path)])).endswith("ü")
    path.write_bytes(b"a\n\xc3")
    with pytest.raises(StreamError, match="0xc3 at position 2;"):
        open_files([str(path)])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.txt", None, StreamError, "'.*absent.txt' does not exist; check the path"),
        ("a.docx", b"x", ConfigError, r"unknown kind; expected an ending among \.txt"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', StreamError, "line 1 has no column 'text'; its columns are 'body', 'id': choose"),
        ("a.jsonl", b'{"text": "x"\n', StreamError, "line 1: not JSON"),
        ("a.jsonl", b'"x"\n', StreamError, "line 1: expected a JSON object, found str"),
        ("a.jsonl", b'{"text": 5}\n', StreamError, "'text' holds int, expected text"),
        ("a.parquet", b"not parquet", StreamError, "a.parquet' cannot be read"),
        ("a.txt.gz", b"not gzip", StreamError, "a.txt.gz' cannot be read"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, error: type, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        open_files([str(tmp_path / name)])


def test_a_bad_line_further_on_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y"}\n{"title": "z"}\n')
    source = open_files([str(path)])
    assert [next(source), next(source)] == ["x", "y"]
    with pytest.raises(StreamError, match="line 3 has no column 'text'; its columns are 'title'"):
        next(source)


def test_parquet_without_the_column(tmp_path: Path):
    with pytest.raises(StreamError, match="no column 'body'; its columns are 'id', 'text': choose"):
        open_files([write(tmp_path, ".parquet")], text_column="body")


def test_empty_directory(tmp_path: Path):
    with pytest.raises(StreamError, match="holds no text"):
        open_files([str(tmp_path)])


# --- data sets ---


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A data set directory of 5 shards of 7 documents."""
    for shard in range(5):
        rows = [f"shard {shard} row {i}" for i in range(7)]
        pq.write_table(
            pa.table({"text": rows, "id": range(7)}),
            tmp_path / f"train-{shard:05}-of-00005.parquet",
            row_group_size=3,
        )
    return str(tmp_path)


def test_dataset_is_streamed_by_shards_and_resumed(dataset: str):
    whole = list(open_dataset(dataset, seed=1))
    assert sorted(whole) == sorted(rows_of_the_dataset())
    assert whole != sorted(whole)
    assert whole != list(open_dataset(dataset, seed=2))
    for position in (0, 3, 7, 13, 35):
        source = open_dataset(dataset, seed=1)
        list(islice(source, position))
        resumed = open_dataset(dataset, seed=1)
        resumed.load_state_dict(source.state_dict())
        assert list(resumed) == whole[position:]


def test_lanes_are_dealt_shards_of_the_hub_and_documents_of_a_folder(dataset: str, monkeypatch):
    def of(source: TextSource) -> list[TextSource]:
        return [source.lane(lane, 2, source.state_dict()) for lane in range(2)]

    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(12)]})
    hub = rows.to_iterable_dataset(num_shards=4)
    monkeypatch.setattr(dataset_module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(dataset_module, "commit_of", lambda _name, _revision: None)
    local = of(open_dataset(dataset, seed=1))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    shards = of(open_dataset("a/b"))
    assert [text.state_dict()["lane"] for text in shards] == [[0, 2, 1], [1, 2, 1]]
    assert [text.state_dict()["lane"] for text in local] == [[0, 1, 2], [1, 1, 2]]
    for texts, every in ((shards, rows["text"]), (local, rows_of_the_dataset())):
        found = list(map(list, texts))
        assert abs(len(found[0]) - len(found[1])) <= 1
        assert sorted([*found[0], *found[1]]) == sorted(every)


def rows_of_the_dataset() -> list[str]:
    """What the data set on disk holds."""
    return [f"shard {s} row {i}" for s in range(5) for i in range(7)]


def test_dataset_without_the_column_or_split(dataset: str):
    with pytest.raises(StreamError, match="no column 'body'; its columns are 'text', 'id': choose"):
        open_dataset(dataset, text_column="body")
    with pytest.raises(StreamError, match=r"cannot be opened.*'train'"):
        open_dataset(dataset, split="validation")


@pytest.mark.parametrize("split", [None, "train"])
def test_what_save_to_disk_wrote(tmp_path: Path, split: str | None):
    rows = [f"row {i}" for i in range(4500)]
    data = datasets.Dataset.from_dict({"id": range(4500), "text": rows})
    saved = data if split is None else datasets.DatasetDict({split: data})
    saved.save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    whole = list(open_dataset(name, "sample-10BT", seed=4))
    assert sorted(whole) == sorted(rows) and whole != rows
    source = open_dataset(name, seed=4)
    assert source.state_dict()["shards"] == 4
    list(islice(source, 2000))
    resumed = open_dataset(name, seed=4)
    resumed.load_state_dict(source.state_dict())
    assert list(resumed) == whole[2000:]
    with pytest.raises(StreamError, match="no column 'body'; its columns are 'id', 'text': choose"):
        open_dataset(name, text_column="body")
    if split is not None:
        with pytest.raises(StreamError, match="no split 'test'; it has 'train': choose"):
            open_dataset(name, split="test")


def test_no_network_says_how_to_run_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset_module, "hub_is_reachable", lambda: False)
    with pytest.raises(StreamError, match=r"cannot be reached.*--text-files.*--demo"):
        open_dataset("HuggingFaceFW/fineweb-edu", "sample-10BT")


@pytest.mark.parametrize(
    ("raised", "token", "message"),
    [
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", None, "no data set 'a/b'.*spelling"),
        ("Dataset 'a/b' is a gated dataset on the Hub.", None, "gated.*no access token.*hf auth login.*datasets/a/b"),
        ("Dataset 'a/b' is a gated dataset on the Hub.", "hf_x", "gated.*was not granted.*licence"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, raised: str, token: str | None, message: str
):
    def refuse(*_args, **_options):
        raise datasets.exceptions.DatasetNotFoundError(raised)

    monkeypatch.setattr(dataset_module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(StreamError, match=message):
        open_dataset("a/b")


# --- text that is not tidy ---


@pytest.mark.parametrize(
    ("encoding", "advice"),
    [
        ("utf-16", "looks like UTF-16: .*iconv -f utf-16 -t utf-8 a.txt"),  # with a mark
        ("utf-16-le", "NUL bytes; it looks like UTF-16LE: .*iconv -f utf-16le -t"),
        ("utf-16-be", "NUL bytes; it looks like UTF-16BE: .*iconv -f utf-16be -t"),
        ("utf-32", "looks like UTF-32: .*iconv -f utf-32 -t"),
        ("utf-32-le", "NUL bytes; it looks like UTF-32LE: .*iconv -f utf-32le -t"),
        ("latin-1", "if it is Latin-1, with `iconv -f latin1 -t utf-8 a.txt"),
    ],
)
def test_other_encodings_are_recognised(tmp_path: Path, encoding: str, advice: str):
    plain = "What is written here is plain English.\n" * 50
    text = plain if encoding != "latin-1" else plain + "Übung\n"
    for name in ("a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        with pytest.raises(StreamError, match=advice.replace("a.txt", name)):
            open_files([str(path)])
    command = re.search(r"iconv -f (\S+)", advice)
    assert command is not None
    # What the advice makes of the file is the text.
    assert (tmp_path / "a.txt").read_bytes().decode(command[1]).lstrip("\ufeff") == text


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"\x1f\x8b\x08\x00", r"gzip.*name it \.gz"),
        (b"PK\x03\x04\xff", "zip, as office documents are"),
        (b"%PDF-1.7\n\xff", "PDF"),
        (b"PAR1\xff", r"Parquet.*name it \.parquet"),
        (b"\xfd7zXZ\x00", "xz.*unpack it"),
        (b"\xff\x00\x00\x00\x00\x00\x01\x00" * 9, "it is not text"),
    ],
)
def test_files_of_another_kind_are_not_to_be_converted(tmp_path: Path, start: bytes, advice: str):
    (tmp_path / "a.txt").write_bytes(start)
    with pytest.raises(StreamError, match=advice) as error:
        open_files([str(tmp_path / "a.txt")])
    assert "iconv" not in str(error.value)


def test_a_mark_in_front_of_utf8_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "words"}\n')
    assert list(open_files([str(tmp_path)])) == ["words", "words"]


def test_some_nuls_do_not_make_another_encoding(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a word\x00 and more of them " * 20 + b"." * 500)
    assert "".join(open_files([str(tmp_path / "a.txt")])).count("\x00") == 20


BAD_LINES = {
    '{"text": "cut': "line 3: not JSON",
    "[1, 2]": "line 3: expected a JSON object, found list",
    '{"title": "x"}': "line 3 has no column 'text'",
    '{"text": 5}': "line 3: column 'text' holds int",
    '{"text": ["a", "b"]}': "line 3: column 'text' holds a list of str",
    '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}": "line 3: JSON that is nested too deeply",
    '{"text": "x", "id": 1' + "0" * 5000 + "}": "line 3: not JSON",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_left_out_and_counted(tmp_path: Path, bad: str, caplog):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}', "", bad, '{"text": "two"}', bad, '{"text": "three"}']
    path.write_text("\n".join(lines) + "\n")
    source = open_files([str(path)])
    assert next(source) == "one"
    with pytest.raises(StreamError, match=rf"a\.jsonl, {BAD_LINES[bad]}.*--skip-bad-lines"):
        next(source)
    # A run that was stopped by it goes on behind it.
    skipping = open_files([str(path)], skip_bad_lines=True)
    one = open_files([str(path)])
    next(one)
    skipping.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert next(skipping) == "two"
    state = json.loads(json.dumps(skipping.state_dict()))
    again = open_files([str(path)], skip_bad_lines=True)
    again.load_state_dict(state)
    for source in (skipping, again):  # what was left out before a stop is not counted twice
        assert list(source) == ["three"]
        assert source.counts == {"documents": 3, "blank_documents": 1, "skipped_records": 2}
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 1 and BAD_LINES[bad] in told[0]


def test_a_bad_first_line_may_be_left_out_but_not_every_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text"\n{"text": "one"}\n')
    with pytest.raises(StreamError, match="line 1: not JSON"):
        open_files([str(path)])
    assert list(open_files([str(path)], skip_bad_lines=True)) == ["one"]
    with pytest.raises(StreamError, match="every one of 2 records was left out"):
        list(open_files([str(path)], skip_bad_lines=True, text_column="body"))


def test_a_file_that_breaks_while_it_is_read_is_named(tmp_path: Path):
    table = pa.table({"text": [f"{i} " * 400 for i in range(4000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="gzip")
    lines = "".join(json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(4000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_bytes(b"words and more of them\n\n" * 40_000)
    for name in ("a.parquet", "a.jsonl.gz", "a.txt"):
        path = tmp_path / name
        source = open_files([str(path)])
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4000] = b"\xff" * 4000
        path.write_bytes(content)
        with pytest.raises(StreamError, match=rf"the text file '.*{name}' cannot be read"):
            list(source)


def test_a_broken_data_set_says_where(dataset: str):
    source = open_dataset(dataset)
    for path in Path(dataset).glob("*.parquet"):
        content = bytearray(path.read_bytes())
        content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
        path.write_bytes(content)
    with pytest.raises(StreamError, match="cannot be read behind record 0 of shard"):
        list(source)


CHATS = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ],
    "by_column": {"role": ["user", "assistant"], "content": ["a", "b"]},
}


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", "data set"])
def test_chats_and_token_ids_are_documents(tmp_path: Path, kind: str):
    row = {**CHATS, "input_ids": [2, 5, 6]}
    if kind == ".jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for column in row:
        if kind == "data set":
            source = open_dataset(str(tmp_path), text_column=column)
        else:
            source = open_files([str(tmp_path)], text_column=column)
        expected = [2, 5, 6] if column == "input_ids" else CHATS["messages"]
        assert list(source) == [expected], column
    with pytest.raises(StreamError, match="no column 'text'.*perhaps --text-column messages"):
        open_files([str(tmp_path)])


# --- other text than the run was started on ---


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".txt.gz", ".parquet"])
def test_files_that_were_replaced_are_refused_on_resume(tmp_path: Path, kind: str):
    def write(words: str) -> str:
        path = tmp_path / f"a{kind}"
        line = json.dumps({"text": words}) if "json" in kind else words
        if kind == ".parquet":
            pq.write_table(pa.table({"text": [words]}), path)
        else:
            path.write_bytes(gzip.compress(line.encode()) if "gz" in kind else line.encode())
        return str(path)

    (tmp_path / "b.txt").write_text("the same")
    files = [write("some words"), str(tmp_path / "b.txt")]
    state = json.loads(json.dumps(open_files(files).state_dict()))
    open_files(files).load_state_dict(state)
    write("same sizes"[:10])
    with pytest.raises(CheckpointError, match=rf"a{kind}: \d+ bytes, sha256 \w+ in the run, ") as e:
        open_files(files).load_state_dict(state)
    assert "b.txt" not in str(e.value)
    with pytest.raises(CheckpointError, match=rf"a{kind}: .* in the run, not there now"):
        open_files(files[1:]).load_state_dict(state)


def test_a_data_set_that_was_replaced_is_refused_on_resume(dataset: str, tmp_path: Path):
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)]})
    rows.save_to_disk(tmp_path / "saved")
    for name, file in (
        (dataset, "train-00003-of-00005.parquet"),
        (str(tmp_path / "saved"), "data-00000-of-00001.arrow"),
    ):
        state = open_dataset(name).state_dict()
        path = Path(name) / file
        path.write_bytes(path.read_bytes().replace(b"row 3", b"row X"))
        with pytest.raises(CheckpointError, match=rf"{file}: .* in the run"):
            open_dataset(name).load_state_dict(state)


def test_a_data_set_of_the_hub_is_read_at_one_commit(monkeypatch: pytest.MonkeyPatch):
    asked = []
    rows = datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    def load(name, config, *, split, streaming, revision):
        asked.append(revision)
        return rows

    commits = {None: "1234abcd", "v2": "5678abcd"}
    monkeypatch.setattr(dataset_module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(dataset_module, "commit_of", lambda _name, r: commits[r])
    monkeypatch.setattr(datasets, "load_dataset", load)
    state = open_dataset("a/b").state_dict()
    assert open_dataset("a/b", revision="v2").state_dict()["content"] == {"revision": "5678abcd"}
    assert asked == ["1234abcd", "5678abcd"]
    open_dataset("a/b").load_state_dict(state)
    commits[None] = "9999"
    with pytest.raises(CheckpointError, match=r"revision: 1234abcd in the run, 9999 now"):
        open_dataset("a/b").load_state_dict(state)


def test_a_folder_has_no_revision(dataset: str):
    with pytest.raises(ConfigError, match="dataset_revision = 'main', but .* is a local directory"):
        open_dataset(dataset, revision="main")
