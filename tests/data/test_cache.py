"""The cache: what the model gives, written once; read with the same bits, and refused when it is not that."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from fastsae.config import TrainConfig
from fastsae.data import cache
from fastsae.data import stream as streams
from fastsae.errors import CheckpointError, StreamError

PROSE = "It was a bright cold day in April, and the clocks were striking {}.\n\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(PROSE.format(i) * 3 for i in range(150)), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_BYTES", 128 << 10)


def config(text: str, folder: Path | None, **changes) -> TrainConfig:
    settings = {
        "model": models.llama(), "layer": 2, "quantization": "none", "context_length": 32,
        "harvest_batch": 4, "batch_size": 64, "tokens": 3200, "pool_tokens": 1024, "k": 4,
        "d_sae": 128, "eval_tokens": 200, "device": "cpu", "text_files": (text,), "stream_seed": 3,
        "cache_dir": None if folder is None else str(folder),
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def open_stream(config: TrainConfig, layers: tuple[int, ...] = (2, 1)) -> streams.Stream:
    return streams.open_stream(config, layers)


def batches(stream, count: int) -> list[tuple[Tensor, ...]]:
    return [stream.next_batch() for _ in range(count)]


def assert_equal(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments):
        raise AssertionError("the language model was opened")

    for module in (streams, cache):
        monkeypatch.setattr(module, "open_text_chunks", refuse)


def test_the_same_bits_as_the_model_gives(text: str, tmp_path: Path, monkeypatch):
    live = open_stream(config(text, None))
    expected, held_out = batches(live, 50), live.held_out()
    assert_equal(batches(open_stream(config(text, tmp_path / "c")), 50), expected)
    assert len(list((tmp_path / "c").glob("activations_*.safetensors"))) > 3
    forbid_the_model(monkeypatch)
    again = open_stream(config(text, tmp_path / "c"))
    assert_equal([again.held_out()], [held_out])
    assert_equal(batches(again, 50), expected)
    assert again.metadata == live.metadata
    # Fewer layers, in another order, and fewer tokens are in it too.
    part = open_stream(config(text, tmp_path / "c", tokens=640), layers=(1,))
    assert_equal(batches(part, 50), [(second,) for _, second in expected])
    assert part.metadata == live.metadata[1:]


def test_another_seed_draws_another_order_of_all_chunks(text: str, tmp_path: Path, monkeypatch):
    stream = open_stream(config(text, tmp_path / "c"))
    forbid_the_model(monkeypatch)
    other = open_stream(config(text, tmp_path / "c", stream_seed=4))
    assert sorted(other.source._order) == list(range(len(other.source._order)))
    assert list(other.source._order) != sorted(other.source._order)

    def bag(stream) -> list:
        rows = torch.cat([batch[0] for batch in iter(stream.next_batch, None)])
        return sorted(map(tuple, rows[:, :4].tolist()))

    assert bag(stream) == bag(other)


@pytest.mark.parametrize("seed", [3, 4])
def test_resume_reads_on_and_more_tokens_are_appended(text: str, tmp_path: Path, seed: int):
    open_stream(config(text, tmp_path / "c"))
    small = config(text, tmp_path / "c", stream_seed=seed)
    more = dataclasses.replace(small, tokens=5000)
    first = open_stream(small)
    batches(first, 20)
    state = first.state_dict()
    state["meta"] = json.loads(json.dumps(state["meta"]))
    rest = batches(first, 30)
    resumed = open_stream(small)
    resumed.load_state_dict(state)
    assert_equal(batches(resumed, 30), rest)
    written = {p.name: p.read_bytes() for p in (tmp_path / "c").glob("activations_*")}
    longer = open_stream(more)  # the run goes on with more tokens: written so far stays as it is
    now = {p.name: p.read_bytes() for p in (tmp_path / "c").glob("activations_*")}
    assert len(now) > len(written) and written.items() <= now.items()
    longer.load_state_dict(state)
    assert_equal(batches(longer, 30), rest)
    if seed == 3:
        whole = open_stream(config(text, None, tokens=5000))
        assert_equal(batches(longer, 20), batches(whole, 70)[50:])
    shutil.rmtree(tmp_path / "c")
    shorter = open_stream(dataclasses.replace(small, tokens=64, pool_tokens=1024))
    with pytest.raises(CheckpointError, match="give it the cache it was started with"):
        shorter.load_state_dict(
            {**state, "meta": state["meta"] | {"source": {"position": 99, "shuffled": 99}}}
        )


def test_writing_that_was_killed_goes_on(text: str, tmp_path: Path, monkeypatch):
    expected = batches(open_stream(config(text, None)), 50)
    real, shards = cache._save, []

    def killed(tensors, path):
        shards.extend([path.name] * (path.suffix == ".safetensors"))
        if len(shards) == 4:
            (path.parent / ".half-written.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(tensors, path)

    monkeypatch.setattr(cache, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        open_stream(config(text, tmp_path / "c"))
    monkeypatch.setattr(cache, "_save", real)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "c").glob("activations_*")}
    assert len(kept) == 2
    assert_equal(batches(open_stream(config(text, tmp_path / "c")), 50), expected)
    assert (
        kept.items()
        <= {p.name: p.read_bytes() for p in (tmp_path / "c").glob("activations_*")}.items()
    )


@pytest.mark.slow
def test_text_that_ends_is_not_harvested_again(text: str, tmp_path: Path, monkeypatch):
    live = list(iter(open_stream(config(text, None)).next_batch, None))
    endless = config(text, tmp_path / "c", tokens=10**6)
    assert_equal(list(iter(open_stream(endless).next_batch, None)), live)
    forbid_the_model(monkeypatch)
    assert_equal(list(iter(open_stream(endless).next_batch, None)), live)


class TestRefused:
    @pytest.fixture
    def folder(self, text: str, tmp_path: Path) -> Path:
        open_stream(config(text, tmp_path / "c"))
        return tmp_path / "c"

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model": models.gemma4_text}, r"model: 'llama' in the cache, 'gemma4-text' now"),
            ({"layers": (2, 0)}, r"layer: 2, 1 in the cache, 0 wanted"),
            ({"context_length": 16}, "context_length: 32 in the cache, 16 now"),
            ({"harvest_batch": 2}, "harvest_batch: 4 in the cache, 2 now"),
            ({"quantization": "nf4"}, "quantization: 'none' in the cache, 'nf4' now"),
            ({"outlier_norm": 5.0}, "outlier_norm: 10.0 in the cache, 5.0 now"),
            ({"separate_documents": True}, "separate_documents: False in the cache, True now"),
            ({"activation_dtype": "fp32"}, "activation_dtype: 'bf16' in the cache, 'fp32' now"),
            ({"eval_tokens": 100}, "eval_tokens: 200 in the cache, 100 now"),
        ],
    )
    def test_foreign(self, text: str, folder: Path, changes: dict, said: str) -> None:
        changes = {name: value() if callable(value) else value for name, value in changes.items()}
        with pytest.raises(StreamError, match=rf"(?s)holds other activations.*{said}.*--cache-dir"):
            layers = changes.pop("layers", (2, 1))
            open_stream(config(text, folder, **changes), layers)

    def test_other_text(self, text: str, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "prose.txt"
        other.write_text("Other words. " * 1000)
        with pytest.raises(
            StreamError,
            match=r"text_files: .*'prose.txt': '[\d,]+ bytes, sha256 \w+'.* in the cache",
        ):
            open_stream(config(str(other), folder))

    def test_a_shard_that_is_cut_off_is_found_at_once(self, text: str, folder: Path) -> None:
        path = folder / "activations_00002.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(StreamError, match=r"damaged.*activations_00002.*Delete the folder"):
            open_stream(config(text, folder))

    def test_a_shard_that_is_missing(self, text: str, folder: Path) -> None:
        (folder / "activations_00001.safetensors").unlink()
        with pytest.raises(StreamError, match=r"damaged.*activations_00001"):
            open_stream(config(text, folder))

    def test_a_flipped_bit_is_found_before_it_is_trained_on(self, text: str, folder: Path) -> None:
        path = folder / "activations_00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
        stream = open_stream(config(text, folder))
        with pytest.raises(StreamError, match=r"damaged.*activations_00001.*content"):
            batches(stream, 50)

    def test_held_out_rows_too(self, text: str, folder: Path) -> None:
        path = folder / "held_out.safetensors"
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
        with pytest.raises(StreamError, match=r"damaged.*held_out"):
            open_stream(config(text, folder)).held_out()

    def test_a_manifest_that_is_not_one(self, text: str, folder: Path) -> None:
        (folder / "manifest.json").write_text('{"format": 99}')
        with pytest.raises(StreamError, match=r"damaged.*format 99, this version reads 2"):
            open_stream(config(text, folder))

    def test_a_folder_of_something_else(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(StreamError, match="not empty and holds no cache"):
            open_stream(config(text, tmp_path))

    def test_a_disk_that_is_too_small(self, text: str, tmp_path: Path, monkeypatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(StreamError, match=r"needs 0\.0 GB more.*lower --tokens"):
            open_stream(config(text, tmp_path / "c"))
        assert not (tmp_path / "c").exists()

    def test_two_writers(self, text: str, tmp_path: Path) -> None:
        with cache._writing(tmp_path / "c"), pytest.raises(StreamError, match="another process"):
            open_stream(config(text, tmp_path / "c"))


def test_text_and_weights_of_the_same_size_are_told_apart(text: str, tmp_path: Path):
    copied, model = tmp_path / "prose.txt", tmp_path / "model"
    shutil.copy(text, copied)
    shutil.copytree(models.llama(), model)
    settings = config(str(copied), tmp_path / "c", model=str(model))
    open_stream(settings)
    open_stream(settings)
    content = copied.read_bytes()
    copied.write_bytes(content.replace(b"e", b"i", 1))
    with pytest.raises(StreamError, match=r"text_files: .*prose.txt.* in the cache, .* now"):
        open_stream(settings)
    copied.write_bytes(content)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1000:] = bytes(1000)
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(StreamError, match=r"model_files: .*model.safetensors"):
        open_stream(settings)


def test_what_was_dropped_is_counted_in_the_cache_too(text: str, tmp_path: Path):
    def of(folder: Path | None) -> dict[str, int]:
        stream = open_stream(config(text, folder, outlier_norm=1.2))
        batches(stream, 20)
        return stream.counts

    live, cached = of(None), of(tmp_path / "c")
    assert live["outliers"] > 0 and cached["cache_outliers"] >= live["outliers"]
    assert cached["cache_special"] >= live["special"] > 0 and cached["cache_nonfinite"] == 0
    assert cached["cache_documents"] > 0 and "documents" not in cached
    assert of(tmp_path / "c") == cached


def test_what_came_before_a_bad_line_is_kept(tmp_path: Path) -> None:
    """With --skip-bad-lines writing goes on behind it: the cache is the one that skipped from the start."""
    lines = [json.dumps({"text": f"Line {i} of a text."}) for i in range(300)]
    read = sum(len(json.loads(line)["text"]) for line in lines[:128])  # tokens of two batches
    lines[150] = "not JSON"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines), encoding="utf-8")
    failed = config(str(bad), tmp_path / "c")
    with pytest.raises(StreamError, match="line 151: not JSON"):
        open_stream(failed)
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    rows = sum(chunk["rows"] for shard in manifest["shards"] for chunk in shard["chunks"])
    assert (
        read - 200 - 32 - 2 * 4 * 32 < rows <= read - 200
    )  # less what is held out, and two chunks
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").glob("activations_*")}
    skipping = dataclasses.replace(failed, skip_bad_lines=True)
    found = open_stream(skipping)
    assert all((tmp_path / "c" / name).read_bytes() == content for name, content in before.items())
    assert found.counts["cache_skipped_records"] == 1
    assert_equal(
        batches(found, 50), batches(open_stream(dataclasses.replace(skipping, cache_dir=None)), 50)
    )
