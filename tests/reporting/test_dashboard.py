"""The report: passages are the right ones, and whatever a token holds, it stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import models
import torch
from small_saes import small_sae

from fastsae import HeldOutText, SplicedModel
from fastsae.evaluation.evaluate import evaluate
from fastsae.reporting.dashboard.collect import AFTER, BEFORE
from fastsae.reporting.dashboard.geometry import PART, TokenNames, logit_effects, neighbours
from fastsae.reporting.dashboard.write import (
    Collector,
    encode,
    write_page,
    write_report_page,
)

NASTY = "</script><!-- \" ' \\ \u2028 \u202e \x00 <script>alert(1)</script>"


def test_passages_are_the_strongest_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 200, (int(n),), generator=generator) for n in torch.arange(5, 35)]
    text = HeldOutText(rows, range(len(rows)), [0], "random")
    grid = [torch.rand(len(row), 6, generator=generator) for row in rows]
    grid = [g * (torch.rand(g.shape, generator=generator) < 0.2) for g in grid]
    collector = Collector(6, top=4, random=2)
    for batch in text.batches(7):
        z = torch.cat(grid[batch.first : batch.first + 7])
        collector(batch, batch.text, z, z)
    for latent in range(6):
        best = sorted(range(30), key=lambda r: -float(grid[r][:, latent].max()))[:4]
        assert collector.top.rows[latent].tolist() == best
        for slot, row in enumerate(best):
            peak = int(grid[row][:, latent].argmax())
            assert int(collector.top.positions[latent, slot]) == peak
            padded = torch.zeros(BEFORE + len(rows[row]) + AFTER)
            padded[BEFORE : BEFORE + len(rows[row])] = grid[row][:, latent]
            window = padded[peak : peak + BEFORE + 1 + AFTER]
            assert collector.top.windows[latent, slot].equal(window)
    everything = torch.cat(grid)
    assert collector.fired.equal((everything > 0).sum(0))
    assert collector.histogram.sum(1).equal(collector.fired)
    assert collector.max.equal(everything.amax(0))


def test_neighbours_and_logit_effects_against_their_definitions() -> None:
    model = SplicedModel.load(models.llama(), 2)
    sae = small_sae(64, 100, 8)
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = rows @ rows.T - 3 * torch.eye(100)
    assert neighbours(sae, 5).indices.equal(cosines.topk(5).indices)
    gain = model._decoder.norm.weight
    # The vocabulary is padded beyond the tokenizer's 260 tokens.
    effects = (sae.W_dec.detach() * gain) @ model._model.lm_head.weight[:260].T
    promoted, suppressed = logit_effects(sae, model, 5)
    assert promoted.indices.equal(effects.topk(5).indices)
    assert suppressed.indices.equal(effects.topk(5, largest=False).indices)


def test_token_names_keep_spaces() -> None:
    tokenizer = models.tokenizer()
    names = TokenNames(tokenizer)
    ids = tokenizer(" <a>\n", add_special_tokens=False)["input_ids"]
    assert [names(i) for i in ids] == [" ", "<", "a", ">", "\n"]
    part_of_a_character = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert "\ufffd" not in names(part_of_a_character)


def test_a_character_of_several_tokens_is_shown_once() -> None:
    tokenizer = models.tokenizer()
    names = TokenNames(tokenizer)
    ids = tokenizer("a 😀é", add_special_tokens=False)["input_ids"]
    assert names.row(ids) == ["a", " ", "😀", PART, PART, PART, "é", PART]
    assert [names.in_row(ids, i) for i in (0, 2, 4, 7)] == ["a", "😀", "😀" + PART, "é" + PART]
    # By itself, and where a row ends, a part is a byte.
    assert names(ids[2]) == "<0xF0>" and names.row(ids[:4]) == ["a", " ", "<0xF0>", "<0x9F>"]


def test_rows_that_pad_the_vocabulary_are_no_tokens() -> None:
    model = SplicedModel.load(models.llama(), 2)
    assert model.vocabulary == 512 and len(model.tokenizer) == 260
    assert TokenNames(model.tokenizer)(300) == "<300: no token>"
    for ranked in logit_effects(small_sae(64, 200, 8), model) or ():
        assert int(ranked.indices.max()) < 260


def test_nothing_in_the_data_can_end_the_script(tmp_path: Path) -> None:
    encoded = encode({"token": NASTY, "bad": float("nan")})
    assert "<" not in encoded and encoded.isascii()
    assert json.loads(encoded) == {"token": NASTY, "bad": None}
    page = write_page(tmp_path / "a.html", NASTY, {"tokens": [NASTY]}).read_text()
    assert page.count("</script>") == 2 and "alert(1)</script>" not in page
    assert not re.search(r"(?:src|href)=\"?https?:", page)


def test_the_page_and_its_data(tmp_path: Path) -> None:
    model = SplicedModel.load(models.llama(), 2)
    sae = small_sae(64, 300, 8)
    text = HeldOutText.tokenize([NASTY * 3, "More words to read."], model.tokenizer, 32)
    collector = Collector(300)
    result = evaluate(sae, text, model=model, observers=[collector])
    page = write_report_page(tmp_path, sae, result, collector, model, text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert data["latents"]["count"] == 300 and data["evaluation"]["tokens"] == text.tokens
    names = {path.name for path in (tmp_path / "report_data").iterdir()}
    assert names == {"index.js", "latents-0.js", "latents-1.js", "text-0.js"}
    for path in (tmp_path / "report_data").iterdir():
        content = path.read_text()
        assert content.isascii() and "<" not in content
        name, value = re.fullmatch(
            r'fastsaeData\("([\w-]+)",(.*)\);\n', content, re.DOTALL
        ).groups()
        assert f"{name}.js" == path.name and json.loads(value)
