"""Lanes: every document in one of them, and the same bits whatever processes host them."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsae.config import Site, TrainConfig
from fastsae.data import text as text_module
from fastsae.data.lanes import IterableLanes, Lanes
from fastsae.data.opening import open_text_chunks
from fastsae.data.source import IterableSource
from fastsae.data.stream import Stream, open_stream
from fastsae.data.text import TextSource
from fastsae.errors import CheckpointError, ConfigError, PeerLostError, StreamError
from fastsae.team import ALONE, Team
from tests.processes import run_together

LANES, BATCH = 4, 66  # of which the lanes give 17, 17, 16, 16
SHARES = [17, 17, 16, 16]
PLACES = (2, 1)
CPU = torch.device("cpu")

# --- dealing text ---


def shards(sizes: list[int], whole_shards: bool, read: Any = iter) -> TextSource:
    content = [[f"shard {s} document {i}" for i in range(n)] for s, n in enumerate(sizes)]
    return TextSource(content, read, name="test", seed=3, whole_shards=whole_shards)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 6), max_size=9), st.integers(0, 12), st.integers(1, 6), st.booleans(),
    st.integers(0, 8),
)  # fmt: skip
def test_every_document_is_in_one_lane(
    sizes: list[int], before: int, lanes: int, whole_shards: bool, taken: int
) -> None:
    """Behind any position, in both ways, and wherever a lane is interrupted."""
    source = shards(sizes, whole_shards)
    held_out = list(islice(source, before))
    start = source.state_dict()
    found, counts = list(held_out), Counter()
    for lane in range(lanes):
        text = source.lane(lane, lanes, start)
        mine = list(islice(text, taken))
        resumed = shards(sizes, whole_shards).lane(lane, lanes, start)
        resumed.load_state_dict(json.loads(json.dumps(text.state_dict())))
        rest = list(text)
        assert list(resumed) == rest and resumed.counts == text.counts
        found += mine + rest
        counts.update(text.counts)
    assert sorted(found) == sorted(shards(sizes, False))
    assert counts["documents"] == sum(sizes)


def test_whole_shards_are_dealt_where_there_are_enough() -> None:
    def read_by(lane: int, lanes: int, start: dict[str, Any], whole_shards: bool) -> set[str]:
        text = shards([5] * 6, whole_shards).lane(lane, lanes, start)
        return {document.split(" document")[0] for document in text}

    source = shards([5] * 6, True)
    start = source.state_dict()
    dealt = [read_by(lane, 3, start, True) for lane in range(3)]
    assert [len(each) for each in dealt] == [2, 2, 2] and len(set.union(*dealt)) == 6
    assert len(read_by(0, 3, start, False)) == 6
    list(islice(source, 21))  # two shards are left, too few for three lanes
    assert len(read_by(1, 3, source.state_dict(), True)) == 2


def test_who_begins_a_shard_rotates() -> None:
    texts = [shards([1] * 6, False) for _ in range(3)]
    read = [list(text.lane(lane, 3, text.state_dict())) for lane, text in enumerate(texts)]
    assert list(map(len, read)) == [2, 2, 2]


def test_a_lane_reads_on_where_the_network_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module.time, "sleep", lambda _seconds: None)
    failures = iter([False] * 7 + [True, True] + [False] * 9 + [True] + [False] * 1000)

    def read(shard: list[str]):
        for document in shard:
            if next(failures):
                raise ConnectionError("gone")
            yield document

    source = shards([10, 10], False, read)
    found = list(source.lane(1, 3, source.state_dict()))
    whole = shards([10, 10], False)
    assert found == list(whole.lane(1, 3, whole.state_dict())) and len(found) in (6, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files of many documents, each with its number in it."""
    folder = tmp_path_factory.mktemp("text")
    letters = random.Random(0)
    for file, numbers in (("one", range(130)), ("two", range(130, 200))):
        words = [(i, "".join(letters.choices("abcdefgh ", k=20 + i % 50))) for i in numbers]
        lines = [json.dumps({"text": f"<{i} {word}>"}) for i, word in words]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def config(folder: Path, **changes: Any) -> TrainConfig:
    options = {
        "model": models.llama(), "layer": 2, "quantization": "none", "context_length": 32,
        "harvest_batch": 2, "batch_size": BATCH, "tokens": 6000, "pool_tokens": 1024, "k": 4,
        "d_sae": 128, "eval_tokens": 200, "device": "cpu", "text_files": (str(folder),),
        "stream_seed": 3, "lanes": LANES,
    }  # fmt: skip
    return TrainConfig(**options | changes)


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_every_token_once_held_out_rows_and_lanes_together(folder: Path, lanes: int) -> None:
    whole = open_text_chunks(config(folder), [Site(2)], CPU)

    def text_of(rows: list[Tensor]) -> str:
        letters = [i for row in rows for i in row.tolist() if i != 2]  # without BOS
        return models.tokenizer().decode(letters)

    texts = [text_of(whole.held_out_text().rows)]
    for lane in range(lanes):
        source = whole.lane(lane, lanes)
        chunks = list(iter(source.draw, None))
        texts.append(
            text_of([row[:n] for c in chunks for row, n in zip(c.tokens, c.lengths, strict=True)])
        )
    texts = ["".join(texts[:2]), *texts[2:]]  # the first lane begins where the held-out rows end
    numbers = [int(i) for text in texts for i in re.findall(r"<(\d+) [a-h ]*>", text)]
    assert sorted(numbers) == list(range(200))
    assert not any(re.sub(r"<\d+ [a-h ]*>", "", text) for text in texts)


def test_held_out_rows_are_the_same_for_any_number_of_lanes(folder: Path) -> None:
    streams = [open_stream(config(folder, lanes=lanes), PLACES) for lanes in (None, 1, 3, LANES)]
    first = streams[0]
    assert [type(stream) for stream in streams] == [Stream, Stream, Lanes, Lanes]
    for other in streams[1:]:
        assert_equal([other.held_out()], [first.held_out()])
        assert other.held_out_text().tokens == first.held_out_text().tokens
        assert other.metadata == first.metadata


def test_one_lane_has_the_bits_of_the_stream(folder: Path) -> None:
    settings = config(folder, lanes=1)
    lane = Lanes(open_text_chunks(settings, [Site(2), Site(1)], CPU), settings, ALONE)
    stream = open_stream(settings, PLACES)
    assert_equal(list(iter(lane.next_batch, None)), list(iter(stream.next_batch, None)))
    assert lane.counts == stream.counts


def test_a_lane_that_fails_leaves_the_state_before_the_batch(folder: Path) -> None:
    expected = list(iter(open_stream(config(folder)).next_batch, None))
    stream = open_stream(config(folder))
    served = list(islice(iter(stream.next_batch, None), 20))
    source = stream._sources[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "harvest", lambda _chunk: next(iter(())))
        with pytest.raises(StopIteration):
            for _ in range(100):
                served.append(stream.next_batch())
    resumed = open_stream(config(folder))
    resumed.load_state_dict(through_disk(stream.state_dict()))
    assert len(served) > 20
    assert_equal(served + list(iter(resumed.next_batch, None)), expected)


def test_where_another_process_is_lost_nothing_more_is_asked_of_it(folder: Path) -> None:
    """What it would be asked next is not what it was asked last: the answers would be mixed up."""
    asked = []

    class Lost(Team):
        def gather(self, mine: Tensor, counts: Any, purpose: str) -> Tensor:
            asked.append(purpose)
            raise PeerLostError("gone")

    own = IterableSource(given_to(0, 5), layers=2)
    for source in (
        open_stream(config(folder), team=Lost(0, 2)),
        IterableLanes(own, Lost(0, 2), CPU),
    ):
        with pytest.raises(PeerLostError):
            source.next_batch()
        with pytest.raises(CheckpointError, match="the last checkpoint is whole"):
            source.state_dict()
        with pytest.raises(CheckpointError, match="in the middle of a step"):
            _ = source.counts
    assert asked == ["agreement"] * 2


# --- on several processes, or on threads that stand in for them ---


class Threads(Team):
    """A team of threads of this process."""

    loading = threading.Lock()

    def __init__(self, rank: int, shared: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(shared))
        self._shared, self._barrier = shared, barrier

    def gather(self, mine: Tensor, counts: Any, purpose: str) -> Tensor:
        self._shared[self.rank] = mine
        self._barrier.wait()
        found = list(self._shared)
        self._barrier.wait()
        assert list(map(len, found)) == list(counts)
        return torch.cat(found)


def run_in_threads(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As ``run_together``, in a moment."""
    if size == 1:
        return [work(ALONE, *arguments)]
    shared, barrier = [torch.empty(0)] * size, threading.Barrier(size, timeout=120)

    def one(rank: int) -> Any:
        torch.set_num_threads(1)
        try:
            return work(Threads(rank, shared, barrier), *arguments)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def opened(settings: TrainConfig, team: Team) -> Any:
    with Threads.loading:
        return open_stream(settings, PLACES, team)


def assert_equal(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    tensors = safetensors.torch.load(safetensors.torch.save(state["tensors"]))
    return {"tensors": tensors, "meta": json.loads(json.dumps(state["meta"]))}


def work(
    team: Team, settings: TrainConfig, cache: str, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """The whole stream, a state in the middle of it, and what comes of another team's states."""
    stream = opened(settings, team)
    batches = list(islice(iter(stream.next_batch, None), 40))
    state, counts = through_disk(stream.state_dict()), stream.counts
    received = dict(team.received)
    rest = list(iter(stream.next_batch, None))
    assert stream.next_batch() is None
    found = {
        "batches": batches, "rest": rest, "state": state, "counts": [counts, stream.counts],
        "ended": stream.ended, "end": through_disk(stream.state_dict()), "received": received,
        "stages": sorted(stream.seconds),
    }  # fmt: skip
    if saved is not None:
        resumed = opened(settings, team)
        resumed.load_state_dict(saved["end"])
        found["behind the end"] = resumed.next_batch()
        resumed.load_state_dict(saved["state"])
        found["resumed counts"] = resumed.counts
        found["resumed"] = list(iter(resumed.next_batch, None))
    cached = dataclasses.replace(settings, cache_dir=cache)
    stream = opened(cached, team)
    found["cached"] = list(islice(iter(stream.next_batch, None), 60))
    found["cached counts"] = stream.counts
    middle = through_disk(stream.state_dict())
    next_one = stream.next_batch()
    stream.load_state_dict(middle)
    assert next_one is not None
    assert_equal([stream.next_batch() or ()], [next_one])
    if team.size > 1:
        with pytest.raises(ConfigError) as error:
            opened(dataclasses.replace(cached, cache_dir=f"{cache}-missing"), team)
        found["refused"] = str(error.value)
    return found


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache that one process wrote."""
    path = str(tmp_path_factory.mktemp("cache") / "cache")
    open_stream(config(folder, cache_dir=path), PLACES)
    return path


@pytest.fixture(scope="module")
def found(folder: Path, cache: str) -> dict[int, list[Any]]:
    """What every process found: of 1; of 4, that go on from what 1 saved too; of 2 from 4; of 3 from 2; and
    0: of 1 from 3."""
    found: dict[int, list[Any]] = {}
    saved = None
    for name, size in ((1, 1), (4, 4), (2, 2), (3, 3), (0, 1)):
        found[name] = run_in_threads(size, work, config(folder), cache, saved)
        saved = {part: found[name][0][part] for part in ("state", "end")}
    return found


def test_the_same_batches_on_any_number_of_processes(found: dict[int, list[Any]]) -> None:
    alone = found[1][0]
    assert len(alone["batches"]) == 40 and len(alone["rest"]) > 20
    assert all(len(x) == len(y) == BATCH for x, y in alone["batches"])
    for each in (*found[2], *found[3], *found[4]):
        assert_the_same_stream(each, alone)
    counts = alone["counts"]
    assert counts[0]["documents"] <= counts[1]["documents"] <= 200
    assert alone["stages"] == ["harvest", "tokenise"]


@pytest.mark.slow
def test_the_same_batches_of_real_processes(
    folder: Path, cache: str, found: dict[int, list[Any]], tmp_path: Path
) -> None:
    size = 3
    alone = found[1][0]
    assert not alone["received"]
    most = max(sum(SHARES[lane] for lane in Team(r, size).hosted(LANES)) for r in range(size))
    for each in run_together(size, work, config(folder), cache, alone, folder=tmp_path):
        assert_the_same_stream(each, alone)
        assert_equal(each["resumed"], alone["rest"])
        assert_equal(each["cached"], alone["cached"])
        sent = 40 * 2 * 64 * len(PLACES) * most * (size - 1)  # bf16, as the pool holds them
        assert each["received"]["activations"] == sent
        assert each["received"]["agreement"] >= 40 * (size - 1) * 8 * 2


def assert_the_same_stream(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Batches, counts (and their order, as metrics write them), and the state."""
    assert_equal(found["batches"] + found["rest"], expected["batches"] + expected["rest"])
    assert [list(c.items()) for c in found["counts"]] == [
        list(c.items()) for c in expected["counts"]
    ]
    for part in ("state", "end"):
        assert found[part]["meta"] == expected[part]["meta"]
        assert found[part]["tensors"].keys() == expected[part]["tensors"].keys()
        for name, tensor in expected[part]["tensors"].items():
            assert tensor.equal(found[part]["tensors"][name]), name


def test_each_activation_of_a_lane_once(found: dict[int, list[Any]], folder: Path) -> None:
    """All that are served are the lanes' own; nothing is missing but what the longer lanes had left."""
    whole = open_text_chunks(config(folder), list(map(Site, PLACES)), CPU)
    there: list[Counter[tuple[float, ...]]] = []
    for lane in range(LANES):
        source = whole.lane(lane, LANES)
        rows = [source.harvest(chunk).kept()[0] for chunk in iter(source.draw, None)]
        there.append(Counter(map(tuple, torch.cat(rows).bfloat16().tolist())))
    served = [Counter() for _ in range(LANES)]
    last = found[1][0]["end"]["meta"]["last"]
    batches = found[1][0]["batches"] + found[1][0]["rest"]
    for i, (x, _) in enumerate(batches, start=1):
        for lane, part in enumerate(x.split(SHARES if i < len(batches) else last)):
            served[lane].update(map(tuple, part.tolist()))
    for lane in range(LANES):
        assert served[lane] <= there[lane]
        assert (served[lane] == there[lane]) == (last[lane] < SHARES[lane])


def test_a_lane_that_ends_first_ends_all_in_the_same_step(found: dict[int, list[Any]]) -> None:
    alone = found[1][0]
    last = alone["rest"][-1]
    rows = alone["end"]["meta"]["last"]
    assert sum(rows) == len(last[0]) < BATCH
    assert any(map(int.__lt__, rows, SHARES)) and any(map(int.__eq__, rows, SHARES))
    short = [lane for lane in range(LANES) if rows[lane] < SHARES[lane]]
    for lane in range(LANES):
        line = f"lane {lane} gave {rows[lane]} of its {SHARES[lane]}"
        assert (line in alone["ended"]) == (lane in short)
    for each in (*found[2], *found[3], *found[4]):
        assert each["ended"] == alone["ended"]
        assert each["behind the end"] is None


def test_the_state_is_of_all_lanes_and_any_team_goes_on(found: dict[int, list[Any]]) -> None:
    alone = found[1][0]
    names = alone["state"]["tensors"].keys()
    assert {f"lane.{lane:02}.tokens" for lane in range(LANES)} <= names
    assert "whole.held_out.tokens" in names
    for each in (*found[4], *found[2], *found[3], *found[0]):
        assert_equal(each["resumed"], alone["rest"])
        assert each["resumed counts"] == alone["counts"][0]


def test_a_cache_is_read_by_several_and_written_by_one(found: dict[int, list[Any]]) -> None:
    alone = found[1][0]
    assert len(alone["cached"]) == 60
    assert all(len(x) == BATCH for x, _ in alone["cached"])
    for each in (*found[2], *found[3], *found[4]):
        assert_equal(each["cached"], alone["cached"])
        assert each["cached counts"] == alone["cached counts"]
        assert "without torchrun and with --lanes 4" in each["refused"]
        assert "holds 0 of" in each["refused"]


# --- iterables ---


def given_to(rank: int, batches: int, width: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of 2 + rank rows, the first row of which is not finite."""
    rows = [torch.full((2 + rank, width), 100.0 * rank + i) for i in range(batches)]
    rows[0][0] = float("nan")
    return [(x, -x) for x in rows]


def of_iterables(team: Team) -> dict[str, Any]:
    def source(batches: int, width: int = 3) -> IterableLanes:
        own = IterableSource(given_to(team.rank, batches, width), layers=2)
        return IterableLanes(own, team, CPU)

    batches = 5 + team.rank  # the first process ends first
    first = source(batches)
    found: dict[str, Any] = {"batches": [first.next_batch() for _ in range(2)]}
    state = through_disk(first.state_dict())
    found["rest"] = list(iter(first.next_batch, None))
    assert first.next_batch() is None
    found["counts"], found["end"] = first.counts, first.state_dict()["meta"]
    resumed = source(batches)
    resumed.load_state_dict(state)
    found["resumed"] = list(iter(resumed.next_batch, None))
    fewer = {"tensors": {}, "meta": {"processes": state["meta"]["processes"][1:]}}
    with pytest.raises(CheckpointError, match=f"begun by {team.size - 1} processes"):
        source(batches).load_state_dict(fewer)
    with pytest.raises(StreamError, match="process 1 have width 4, 4, those of process 0 3, 3"):
        source(batches, width=3 + team.rank).next_batch()
    return found


def test_iterables_of_several_processes_are_one() -> None:
    one, two = run_in_threads(2, of_iterables)
    expected = []
    for i in range(5):
        mine, theirs = given_to(0, 5)[i], given_to(1, 5)[i]
        x = torch.cat([mine[0], theirs[0]])
        x = x[x.isfinite().all(dim=1)]
        expected.append((x, -x))
    for each in (one, two):
        assert_equal(each["batches"] + each["rest"], expected)
        assert_equal(each["resumed"], each["rest"])
        assert each["counts"] == {"nonfinite": 2, "outliers": 0, "unmatched": 3}
        # The batch that was not trained on is not taken for drawn.
        assert [meta["drawn"] for meta in each["end"]["processes"]] == [5, 5]
