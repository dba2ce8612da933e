"""The demo's model is glassllm's, to rounding; its text is prose, and the same on every call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import glassllm
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsae.cli.presets import demo_config
from fastsae.config import TrainConfig
from fastsae.data import demo_text
from fastsae.data.stream import open_stream
from fastsae.errors import ConfigError, StreamError
from fastsae.lm import demo
from fastsae.lm.hooked import CutModel

SENTENCES = [
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
    "“Curiouser and curiouser!” cried Alice;  two spaces\nand a new line\n\n and another.",
    "Cafe\u0301 and naïve, numbers 0123456789, unknown signs {}<>@ and ▁ itself",
    " leading space, trailing space ",
    "",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return demo_text.documents()


def test_tokenizer_gives_the_same_ids(documents: list[str]):
    _, tokenizer = demo.load_model()
    _, theirs = glassllm.load_pretrained("en")
    assert len(tokenizer) == theirs.vocab_size
    for text in [*SENTENCES, *(d[:1000] for d in documents[::80])]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs.encode(text)
    plain = SENTENCES[0]
    assert tokenizer.decode(tokenizer(plain)["input_ids"]) == plain
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 3)


def test_model_gives_the_same_logits():
    model, tokenizer = demo.load_model()
    theirs, _ = glassllm.load_pretrained("en")
    ids = tokenizer(" ".join(SENTENCES[:2]), add_special_tokens=False)["input_ids"]
    generator = torch.Generator().manual_seed(0)
    batch = torch.cat([
        torch.tensor([[2, *ids][:40]]),
        torch.randint(1024, (3, 40), generator=generator),
    ])  # fmt: skip
    with torch.inference_mode():
        ours = model(batch).logits.numpy()
    np.testing.assert_allclose(ours, theirs(batch.numpy()).data, atol=1e-4, rtol=0)


def test_saved_as_an_ordinary_checkpoint(tmp_path: Path):
    model, tokenizer = demo.load_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(SENTENCES[1], return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizer(SENTENCES[1], return_tensors="pt")["input_ids"])
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states[2]
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(CutModel.load(str(tmp_path), (1,)).residuals(ids)[0], expected)


@pytest.mark.slow
def test_text_is_the_same_on_every_call(monkeypatch: pytest.MonkeyPatch, documents: list[str]):
    monkeypatch.setattr(demo_text, "_PACKAGES", ())
    again = demo_text.documents()
    assert again == documents[: len(again)]
    assert len(again) > 300


def test_text_is_prose(documents: list[str]):
    text = "\n".join(documents)
    assert len(text) > 2_000_000
    paragraphs = text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs)
    letters = sum(c.isalpha() or c == " " for c in text)
    assert letters / len(text) > 0.93
    _, tokenizer = demo.load_model()
    ids = [i for x in tokenizer(documents[::10])["input_ids"] for i in x]
    assert ids.count(tokenizer.unk_token_id) / len(ids) < 0.005


def test_text_order_follows_from_the_seed(documents: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_text, "documents", lambda: documents)
    orders = [list(demo_text.open_text(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(documents)


def test_settings_and_what_overrides_them():
    assert demo_config().demo
    config = demo_config(k=8, tokens=5000, layer=1)
    assert (config.k, config.tokens, config.layer) == (8, 5000, 1)
    assert config.model == demo_config().model == "glassllm"
    assert config.run_name.startswith("demo-")
    assert demo_config().quantization == "none" != TrainConfig().quantization


def test_there_is_enough_text_for_the_demo(documents: list[str]):
    _, tokenizer = demo.load_model()
    available = 10 * sum(map(len, tokenizer(documents[::10])["input_ids"]))
    config = demo_config()
    assert available > 1.2 * (config.tokens + config.eval_tokens)


@pytest.fixture
def few_documents(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    monkeypatch.setattr(demo_text, "documents", lambda: documents[:60])


def small(**overrides) -> TrainConfig:
    return demo_config(
        **{"device": "cpu", "pool_tokens": 8192, "eval_tokens": 1000, "batch_size": 256} | overrides
    )


@pytest.mark.usefixtures("few_documents")
def test_stream():
    stream = open_stream(small())
    (held_out,) = stream.held_out()
    assert held_out.shape == (1000, 128)
    assert held_out.isfinite().all()
    (first,) = stream.next_batch()
    assert (first.shape, first.dtype) == ((256, 128), torch.float32)
    assert not first.is_inference()
    assert stream.metadata[0]["hook_name"] == "blocks.2.hook_resid_post"
    assert stream.metadata[0]["model_name"] == "glassllm"
    assert stream.metadata[0]["prepend_bos"]
    assert stream.counts["special"] > 0
    assert set(stream.seconds) == {"tokenise", "harvest"}
    again = open_stream(small())
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.next_batch()[0], stream.next_batch()[0])
    assert torch.equal(again.held_out()[0], held_out)


@pytest.mark.usefixtures("few_documents")
def test_other_text_or_model_with_the_demo(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("Some words of mine. " * 500)
    stream = open_stream(small(text_files=(str(path),)))
    assert stream.metadata[0]["dataset_path"] == "a.txt"
    model, tokenizer = demo.load_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stream = open_stream(small(model=str(tmp_path / "model"), layer=3))
    assert stream.metadata[0]["model_name"] == str(tmp_path / "model")
    assert stream.metadata[0]["hook_name"] == "blocks.3.hook_resid_post"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer": 4}, "has 4 layers; use --layer 0 to 3"),
        ({"context_length": 129}, "handles at most 128 positions"),
        ({"quantization": "nf4"}, "use --quantization none"),
    ],
)
@pytest.mark.usefixtures("few_documents")
def test_settings_that_do_not_fit_the_model(overrides: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        open_stream(small(**overrides))


def test_package_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(StreamError, match=r'glassllm.*pip install -e "\.\[demo\]"'):
        demo.load_model()
