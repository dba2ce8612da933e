"""The buffer: each activation once, mixed, never old, and the same after any interruption."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.config import Site
from fastsae.data.buffer import ActivationBuffer
from fastsae.data.harvest import Chunk, TextChunks, harvest
from fastsae.data.text import TextSource
from fastsae.data.tokens import TokenPacker
from fastsae.errors import CheckpointError, StreamError
from fastsae.lm.hooked import CutModel
from fastsae.lm.norms import FirstNorms

CONTEXT = 8
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class FakeModel:
    """Activation = (token, position in the row, a number that tells the row); NaN at ``poisoned``.

    With several layers, each is the one before plus a million, and only ``poisoned_layer`` has NaN.
    """

    name, quantization = "fake", "none"
    weights: dict[str, str] = {}  # noqa: RUF012
    dtype, device = torch.float32, torch.device("cpu")
    special_ids = torch.tensor([1, 2, 3])  # 0 pads short rows, and is a word in some vocabularies

    def __init__(self, poisoned: str = "", layers=(3,), poisoned_layer: int = 0) -> None:
        self.sites, self.poisoned_layer = tuple(map(Site, layers)), poisoned_layer
        self.widths = (3,) * len(layers)
        self.poisoned = torch.tensor([ids(c)[0] for c in poisoned] or [-1])

    def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
        n, length = tokens.shape
        position = torch.arange(length)
        row = (tokens * (7919 * (position + 1) ** 5 % 8191)).sum(1, keepdim=True)
        columns = [tokens, position.expand(n, length), row.expand(n, length)]
        out = torch.stack(columns, dim=2).float()
        layers = [out + 1e6 * i for i in range(len(self.sites))]
        layers[self.poisoned_layer][torch.isin(tokens, self.poisoned)] = float("nan")
        return tuple(layers)


def ids(text: str) -> list[int]:
    return models.tokenizer()(text, add_special_tokens=False)["input_ids"]


def text_of(documents: int) -> list[str]:
    """Documents of random letters, so that a row of tokens is unlike every other."""
    letters = random.Random(0)
    return ["".join(letters.choices(ALPHABET, k=5 + i % 11)) for i in range(documents)]


def packer(documents: list[str]) -> TokenPacker:
    source = TextSource([documents], iter, name="test text", seed=0)
    return TokenPacker(source, models.tokenizer(), CONTEXT)


def chunks(documents: list[str], model=None, harvest_batch=2, held_out=0, outlier_norm=None):
    return TextChunks(
        packer(documents),
        model or FakeModel(),
        harvest_batch=harvest_batch,
        held_out_tokens=held_out,
        outlier_norm=outlier_norm,
    )


def buffer(
    documents: list[str], model=None, *, batch_size=5, pool_tokens=64, harvest_batch=2, seed=0,
    dtype=torch.float32, outlier_norm=None, ahead=None, reuse=1,
):  # fmt: skip
    source = chunks(documents, model, harvest_batch, outlier_norm=outlier_norm)
    return ActivationBuffer(
        source, batch_size=batch_size, pool_tokens=pool_tokens, seed=seed, dtype=dtype, ahead=ahead,
        reuse=reuse,
    )  # fmt: skip


def drain(source: ActivationBuffer) -> list[Tensor]:
    batches = list(iter(source.next_batch, None))
    assert all(len(batch) == 1 for batch in batches)
    return [batch[0] for batch in batches]


def everything(documents: list[str], model=None) -> Tensor:
    """All activations of the text in order, harvested in one go."""
    rows = list(packer(documents))
    if not rows:
        return torch.empty(0, 3)
    return harvest(model or FakeModel(), Chunk.of(rows, CONTEXT)).kept()[0]


def bag(rows: Tensor) -> Counter:
    return Counter(map(tuple, rows.tolist()))


shapes = {
    "documents": st.integers(0, 40),
    "batch_size": st.integers(1, 90),
    "pool_tokens": st.integers(1, 300),
    "harvest_batch": st.integers(1, 5),
    "ahead": st.booleans(),
    "reuse": st.integers(1, 4),
}


@settings(deadline=None, max_examples=80)
@given(**shapes)
def test_every_activation_as_often_as_asked(documents, **options):
    texts, batch_size, reuse = text_of(documents), options["batch_size"], options["reuse"]
    source = buffer(texts, **options)
    batches = drain(source)
    assert all(len(b) == batch_size and b.dtype == torch.float32 for b in batches[:-1])
    assert all(0 < len(b) <= batch_size for b in batches)
    served = torch.cat(batches) if batches else torch.empty(0, 3)
    assert bag(served) == Counter({row: reuse * n for row, n in bag(everything(texts)).items()})
    assert source.counts.harvested * reuse == len(served)
    assert source._free_count == len(source._pools[0])
    assert len(set(source._free.tolist())) == len(source._pools[0])
    assert source.next_batch() is None


@settings(deadline=None, max_examples=60)
@given(**shapes, taken=st.integers(0, 40), more=st.integers(0, 20))
def test_the_next_batch_is_the_next_batch(documents, taken, more, **options):
    texts = text_of(documents)
    whole = drain(buffer(texts, **options | {"ahead": False}))
    source = buffer(texts, **options)
    list(islice(iter(source.next_batch, None), taken))
    state = through_disk(source.state_dict())
    counts = dict(vars(source.counts))
    resumed = buffer(texts, **options)
    resumed.load_state_dict(state)
    assert vars(resumed.counts) == counts
    served = [batch for (batch,) in islice(iter(resumed.next_batch, None), more)]
    assert_batches_equal(served, whole[taken:][:more])
    again = buffer(texts, **options)  # a resumed run is interrupted and resumed like any other
    again.load_state_dict(through_disk(resumed.state_dict()))
    assert_batches_equal(drain(again), whole[taken + more :])
    assert_batches_equal(drain(source), whole[taken:])
    assert vars(again.counts) == vars(source.counts)
    assert again._free_count == len(again._pools[0])


def failing(function, count: int):
    """``function``, whose call number ``count`` raises."""
    calls = itertools.count(1)

    def call(*arguments):
        if next(calls) == count:
            raise OSError("gone")
        return function(*arguments)

    return call


@settings(deadline=None, max_examples=120)
@given(**shapes, where=st.sampled_from(["text", "draw", "harvest"]), count=st.integers(1, 40))
@pytest.mark.slow
def test_a_batch_that_fails_leaves_the_state_before_it(
    documents, batch_size, pool_tokens, harvest_batch, ahead, reuse, where, count
):
    def start(source: TextSource) -> ActivationBuffer:
        packer = TokenPacker(source, models.tokenizer(), CONTEXT, documents_per_batch=3)
        parts = TextChunks(packer, FakeModel(), harvest_batch=harvest_batch, held_out_tokens=0)
        return ActivationBuffer(
            parts,
            batch_size=batch_size,
            pool_tokens=pool_tokens,
            seed=0,
            reuse=reuse,
            dtype=torch.float32,
            ahead=ahead,
        )

    texts = text_of(documents)
    whole = drain(start(TextSource([texts], iter, name="test text", seed=0)))
    read = failing(lambda text: text, count if where == "text" else -1)
    source = start(TextSource([texts], lambda docs: map(read, docs), name="test text", seed=0))
    if where != "text":
        setattr(source._source, where, failing(getattr(source._source, where), count))
    served, state = [], through_disk(source.state_dict())
    try:
        while (batch := source.next_batch()) is not None:
            served.append(batch[0])
            state = through_disk(source.state_dict())
    except OSError:
        after = through_disk(source.state_dict())
        assert after["meta"] == state["meta"]
        assert all(torch.equal(t, state["tensors"][n]) for n, t in after["tensors"].items())
    resumed = start(TextSource([texts], iter, name="test text", seed=0))
    resumed.load_state_dict(state)
    assert_batches_equal(served + drain(resumed), whole)


def through_disk(state: dict) -> dict:
    """As the trainer keeps it: tensors that safetensors takes, and JSON."""
    import safetensors.torch

    tensors = safetensors.torch.load(safetensors.torch.save(state["tensors"]))
    return {"tensors": tensors, "meta": json.loads(json.dumps(state["meta"]))}


def assert_batches_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_resume_on_a_real_model(tmp_path: Path):
    model = CutModel.load(models.gemma4_multimodal(), (5,))
    texts = text_of(90)

    def start() -> ActivationBuffer:
        return buffer(texts, model, batch_size=64, pool_tokens=512, harvest_batch=4)

    whole = drain(start())
    assert len(whole) > 12
    for taken in (0, 6, len(whole) - 1):
        source = start()
        for _ in range(taken):
            source.next_batch()
        state = source.state_dict()
        save_file(state["tensors"], tmp_path / "state.safetensors")
        resumed = start()
        resumed.load_state_dict(
            {"tensors": load_file(tmp_path / "state.safetensors"), "meta": state["meta"]}
        )
        assert_batches_equal(drain(resumed), whole[taken:])


def test_the_state_is_small():
    source = buffer(text_of(180), pool_tokens=128)
    sizes = []
    while source.next_batch() is not None:
        sizes.append(source.state_dict()["tensors"]["tokens"].numel())
    assert max(sizes) == 128  # two generations of half a pool


def test_order_follows_from_the_seed():
    texts = text_of(60)
    first, again, other = (torch.cat(drain(buffer(texts, seed=s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bag(first) == bag(other)


def test_batches_mix_the_documents_of_a_pool():
    texts = text_of(180)
    batches = drain(buffer(texts, batch_size=32, pool_tokens=512))
    rows = [batch[:, 2].unique().numel() for batch in batches[:-1]]
    assert everything(texts)[:32, 2].unique().numel() < 7
    assert min(rows) > 15


@pytest.mark.parametrize("reuse", [1, 2, 3])
def test_no_activation_outlives_its_generations(reuse: int):
    texts = text_of(180)
    in_order = [tuple(row) for row in everything(texts).tolist()]
    assert len(set(in_order)) == len(in_order)
    source = buffer(texts, batch_size=1, pool_tokens=128, harvest_batch=2, reuse=reuse)
    generation_of: dict[tuple, int] = {}
    ages, served_in = Counter(), Counter()
    harvested = 0
    while (batch := source.next_batch()) is not None:
        stage = source._live[-1].index
        for row in in_order[harvested : source.counts.harvested]:
            generation_of[row] = stage
        harvested = source.counts.harvested
        row = tuple(batch[0][0].tolist())
        ages[stage - generation_of[row]] += 1
        served_in[row, stage] += 1
    assert set(ages) == set(range(reuse + 1))
    assert max(ages.values()) - min(ages.values()) <= stage + 1
    assert max(served_in.values()) == 1, "every time among others"


def test_a_stage_mixes_its_two_generations():
    source = buffer(text_of(180), batch_size=1, pool_tokens=256)
    while source._live[-1].index < 3:
        source.next_batch()
    older = torch.isin(source._order, source._live[0].parts(0, 2)[1])
    assert source._position == 1
    assert 0.3 < older.float().mean() < 0.7
    for part in older.tensor_split(4):
        assert 0.2 < part.float().mean() < 0.8


@pytest.mark.parametrize("first", [True, False])
def test_halves_are_a_random_split(first: bool):
    source = buffer(text_of(100), pool_tokens=1024)
    source.next_batch()
    generation = source._live[-1]
    half = generation.parts(0, 2)[not first]
    assert len(half) in (len(generation.slots) // 2, -(-len(generation.slots) // 2))
    places = torch.isin(generation.slots, half)
    runs = int((places[1:] != places[:-1]).sum()) + 1
    assert runs > len(generation.slots) / 3  # neither the first half of the text nor the second


def test_special_tokens_and_padding_are_never_served():
    texts = text_of(40)
    source = buffer(texts)
    served = torch.cat(drain(source))
    assert not torch.isin(served[:, 0].long(), FakeModel.special_ids).any()
    rows = list(packer(texts))
    special = sum(int(torch.isin(row, FakeModel.special_ids).sum()) for row in rows)
    assert special >= len(rows)
    assert len(rows[-1]) < CONTEXT  # there is padding
    assert source.counts.special == special
    assert source.counts.harvested + special == sum(map(len, rows))


def test_nonfinite_rows_are_dropped_and_counted():
    texts = ["abcabc", "hello", "banana"] * 10
    model = FakeModel(poisoned="b")
    source = buffer(texts, model)
    served = torch.cat(drain(source))
    assert served.isfinite().all()
    bad = sum(text.count("b") for text in texts)
    assert source.counts.nonfinite == bad
    assert bag(served) == bag(everything(texts, model))
    assert len(served) == len(everything(texts)) - bad


@pytest.mark.parametrize("poisoned_layer", [0, 1, 2])
def test_rows_of_all_layers_belong_to_the_same_tokens(poisoned_layer: int):
    texts = ["abcabc", "hello", "banana"] * 30
    model = FakeModel("b", layers=(3, 1, 5), poisoned_layer=poisoned_layer)
    source = buffer(texts, model, pool_tokens=128)
    batches = list(iter(source.next_batch, None))
    assert all(len(batch) == 3 for batch in batches)
    for first, second, third in batches:
        assert torch.equal(second, first + 1e6) and torch.equal(third, first + 2e6)
    # What is dropped in one layer is dropped in all.
    assert source.counts.nonfinite == sum(text.count("b") for text in texts)
    assert bag(torch.cat([b[0] for b in batches])) == bag(everything(texts, FakeModel("b")))
    resumed = buffer(texts, model, pool_tokens=128)
    part = buffer(texts, model, pool_tokens=128)
    for _ in range(20):
        part.next_batch()
    resumed.load_state_dict(through_disk(part.state_dict()))
    for found, expected in zip(iter(resumed.next_batch, None), batches[20:], strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("quantization", "remedy"), [("nf4", "quantization none"), ("none", "bfloat16")]
)
def test_all_nonfinite_stops_with_layer_and_dtype(quantization: str, remedy: str):
    model = FakeModel(poisoned=ALPHABET)
    model.quantization = quantization
    with pytest.raises(StreamError, match=rf"layer 3 of fake.*float32.*{remedy}"):
        buffer(["hello", "world"], model).next_batch()


@pytest.mark.parametrize(
    ("quantization", "remedy"),
    [
        ("nf4", "--quantization nf4-bf16, which computes in bf16, or --quantization none"),
        ("nf4-dequantized", "--quantization nf4-bf16"),
        ("nf4-bf16", "use --quantization none"),
        ("none", "convert the model"),
    ],
)
def test_some_nonfinite_is_told_once_with_its_share_and_remedy(
    quantization: str, remedy: str, caplog
):
    model = FakeModel(poisoned="b")
    model.quantization = quantization
    drain(buffer(["abcabcaaab"] * 60, model, pool_tokens=64))
    (told,) = [r.getMessage() for r in caplog.records if "is finite" in r.getMessage()]
    share = float(told.split("rows, ")[1].split("%")[0])
    assert 20 < share < 40 and remedy in told and "counted as nonfinite" in told


def test_more_than_half_nonfinite_stops():
    model = FakeModel(poisoned="b")
    model.quantization = "nf4"
    with pytest.raises(StreamError, match=r"6\d\.\d%, are not.*use --quantization nf4-bf16"):
        drain(buffer(["abb"] * 60, model))
    with pytest.raises(StreamError, match="no activation of layer 3"):
        chunks(["bbbb"] * 60, FakeModel("b"), 3, held_out=40).held_out()


def test_another_model_is_refused_on_resume():
    def of(weights: dict[str, str]):
        model = FakeModel()
        model.weights = weights
        return buffer(text_of(40), model)

    source = of({"model.safetensors": "9 bytes, sha256 12", "config.json": "1 bytes, sha256 56"})
    source.next_batch()
    state = through_disk(source.state_dict())
    of(
        {"model.safetensors": "9 bytes, sha256 12", "config.json": "1 bytes, sha256 56"}
    ).load_state_dict(state)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: 9 bytes, sha256 12 in the run"
    ) as e:
        of(
            {"model.safetensors": "9 bytes, sha256 34", "config.json": "1 bytes, sha256 56"}
        ).load_state_dict(state)
    assert "config" not in str(e.value)


def test_a_model_that_gives_other_rows_is_refused_on_resume():
    texts = ["abcabc", "hello", "banana"] * 10
    source = buffer(texts)
    source.next_batch()
    resumed = buffer(texts, FakeModel(poisoned="b"))
    with pytest.raises(CheckpointError, match="harvesting again gives"):
        resumed.load_state_dict(source.state_dict())


def test_pool_size_and_dtype():
    source = buffer(text_of(5), pool_tokens=100, harvest_batch=2)
    assert source._pools[0].shape == (96, 3)  # two generations of three chunks of two rows of eight
    assert source._pools[0].dtype == torch.float32
    assert buffer(text_of(5), pool_tokens=1)._pools[0].shape == (64, 3)
    stored = buffer(text_of(30), batch_size=4, dtype=torch.bfloat16)
    assert stored._pools[0].dtype == torch.bfloat16
    assert stored.next_batch()[0].dtype == torch.float32


@pytest.mark.parametrize("pool_tokens", [1, 128, 300])
def test_harvest_ahead_is_spread_over_the_stage_and_changes_no_batch(pool_tokens: int):
    texts = text_of(180)
    source = buffer(texts, batch_size=4, pool_tokens=pool_tokens, ahead=True)
    generation = source.chunks_per_generation
    before = 0
    for expected in drain(buffer(texts, batch_size=4, pool_tokens=pool_tokens, ahead=False)):
        (batch,) = source.next_batch()
        assert torch.equal(batch, expected)
        assert source._free_count >= 0
        done = len(source._next.chunks)
        assert done - before <= 1  # never several forward passes between two steps
        if not source._source.packer.exhausted:
            served = source._position / len(source._order)
            assert abs(done / generation - served) <= (1 + 4 / 8) / generation + 0.5
        before = done if done else 0


@pytest.mark.gpu
def test_on_a_gpu_harvesting_beside_training_changes_no_batch():
    """The language model on its own stream, kept busy by large products on the training's."""

    class OnGPU(FakeModel):
        device = torch.device("cuda")

        def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer.cuda() for layer in super().residuals(tokens.cpu()))

    texts = text_of(400)
    options = {"batch_size": 16, "pool_tokens": 256, "outlier_norm": 50.0}
    expected = drain(buffer(texts, FakeModel(poisoned="b"), **options))
    busy = torch.randn(2048, 2048, device="cuda")
    source = buffer(texts, OnGPU(poisoned="b"), **options)
    assert source._ahead
    for batch in expected[:20]:
        busy = (busy @ busy).tanh()
        assert torch.equal(source.next_batch()[0].cpu(), batch)
    resumed = buffer(texts, OnGPU(poisoned="b"), **options)
    resumed.load_state_dict(through_disk(source.state_dict()))
    assert_batches_equal([batch.cpu() for batch in drain(resumed)], expected[20:])
    assert resumed.counts.nonfinite > 0


@pytest.mark.parametrize("layers", [(3,), (3, 5)])
def test_norm_outliers_are_dropped_and_counted(layers: tuple):
    """'z' has the largest token id; a model that blows its norm up, in the last layer alone."""

    class Sink(FakeModel):
        def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
            found = super().residuals(tokens)
            found[-1][tokens == ids("z")[0]] *= 1e4
            return found

    texts = [f"hello zoo {i} fizz" for i in range(30)]
    source = buffer(texts, Sink(layers=layers), outlier_norm=50.0)
    served = torch.cat([b[0] for b in iter(source.next_batch, None)])
    assert source.counts.outliers == sum(text.count("z") for text in texts) == 90
    assert not (served[:, 0] == ids("z")[0]).any()
    assert len(served) == source.counts.harvested
    kept_all = buffer(texts, Sink(layers=layers))
    assert sum(len(b[0]) for b in iter(kept_all.next_batch, None)) == len(served) + 90
    assert kept_all.counts.outliers == 0


def test_harvest_seconds_grow():
    source = buffer(text_of(5))
    assert source.harvest_seconds == 0.0
    source.next_batch()
    assert source.harvest_seconds > 0.0


# --- held out ---


def test_held_out_rows_are_not_trained_on():
    texts = text_of(80)
    model = FakeModel()
    parts = chunks(texts, model, held_out=50)
    (held_out,) = parts.held_out()
    assert held_out.shape == (50, 3) and held_out.dtype == torch.float32
    assert torch.equal(held_out, everything(texts)[:50])
    source = ActivationBuffer(parts, batch_size=7, pool_tokens=64, seed=0, dtype=torch.float32)
    trained = torch.cat(drain(source))
    taken = len(everything(texts)) - len(trained)
    assert 50 <= taken < 50 + CONTEXT
    assert bag(trained) == bag(everything(texts)[taken:])


def test_held_out_leaves_out_nonfinite_rows():
    parts = chunks(["abcabc", "hello"] * 20, FakeModel("b"), 3, held_out=40)
    assert parts.held_out()[0].isfinite().all()


def test_empty_text():
    with pytest.raises(StreamError, match="the text is empty: test text"):
        chunks(["", " \n"], held_out=10)


@pytest.mark.parametrize("tokens", [19, 20, 1000])
def test_too_little_text_to_hold_out(tokens: int):
    texts = ["abcdefghij"] * 2
    with pytest.raises(
        StreamError, match=rf"holds only 20 tokens.*first {tokens:,}.*--eval-tokens"
    ):
        chunks(texts, held_out=tokens)
    assert len(chunks(texts, held_out=7)._held_out_rows) == 1


def test_the_first_norms_are_told(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(9000, 8, generator=torch.Generator().manual_seed(0))
    x[::1000] *= 1000
    for outlier_norm, level, said in (
        (10.0, logging.INFO, "are dropped (--outlier-norm inf keeps them)"),
        (None, logging.WARNING, "--outlier-norm 10 drops them"),
    ):
        norms = FirstNorms(["layer 3", "layer 5"], outlier_norm)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            norms.see([x[:100], x[:100].sign()])
            assert not caplog.records  # too few to say anything
            norms.see([x[100:].half(), x[100:].sign()])
            norms.see([x, x])
            norms.tell()
        first, second = caplog.records
        assert (first.levelno, second.levelno) == (level, logging.INFO)
        line = first.getMessage()
        assert line.startswith("layer 3: norms of the first 9,000 activations: median 2.7")
        assert "9 (0.10%) above 10 times the median hold 100% of the variance" in line
        assert line.endswith(said)


def test_the_first_norms_of_untidy_activations(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(5, 4)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    with caplog.at_level(logging.INFO):
        norms = FirstNorms(["layer 3"], 10.0)
        norms.see([x])
        norms.tell()
        FirstNorms(["layer 3"], 10.0).tell()
        empty = FirstNorms(["layer 3"], 10.0)
        empty.see([x[:2]])
        empty.tell()
    (record,) = caplog.records
    assert "of the first 3 activations: median 2" in record.getMessage()
    assert record.getMessage().endswith("none is above 10 times the median")
