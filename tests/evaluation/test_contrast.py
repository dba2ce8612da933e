"""The contrast finds what was planted, and nothing where nothing is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from small_saes import small_sae

import fastsae
from fastsae import ConfigError, SplicedModel
from fastsae.cli import main
from fastsae.evaluation.contrast import Pooled, contrast, minhash, near_copies, pool, summary
from fastsae.evaluation.statistics import benjamini_hochberg, fit_logistic, midranks, rank_sum_test


def columns(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ranks_share_ties() -> None:
    ranks, ties = midranks(columns([3.0, 1.0, 3.0, 2.0, 3.0]))
    assert ranks.tolist() == [[4.0, 1.0, 4.0, 2.0, 4.0]] and ties.tolist() == [24.0]


def test_auroc_counts_pairs() -> None:
    x = torch.randint(0, 4, (3, 30), generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(30) < 12
    auroc, _ = rank_sum_test(*midranks(x), y[None])
    for row, found in zip(x, auroc[:, 0], strict=True):
        pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(row[y], row[~y])]
        assert float(found) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_p_values_are_those_of_permutation() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 6, (4, 40), generator=generator).double()
    y = torch.arange(40) < 15
    x[:, y] += torch.tensor([0.0, 0.5, 1.0, 1.5])[:, None]
    ranks, ties = midranks(x.round())
    _, p = rank_sum_test(ranks, ties, y[None])
    shuffled = torch.stack([y[torch.randperm(40, generator=generator)] for _ in range(20_000)])
    auroc, _ = rank_sum_test(ranks, ties, torch.cat([y[None], shuffled]))
    extreme = (auroc[:, 1:] - 0.5).abs() >= (auroc[:, :1] - 0.5).abs() - 1e-12
    exact = extreme.double().mean(1)
    assert (p[:, 0] - exact).abs().max() < 0.012
    scipy = pytest.importorskip("scipy.stats")
    for row, found in zip(x.round(), p[:, 0], strict=True):
        theirs = scipy.mannwhitneyu(row[y], row[~y], method="asymptotic").pvalue
        assert float(found) == pytest.approx(theirs, rel=1e-9)


def test_constant_columns_say_nothing() -> None:
    auroc, p = rank_sum_test(*midranks(torch.zeros(1, 20)), (torch.arange(20) < 9)[None])
    assert auroc.item() == 0.5 and p.item() == 1


def test_benjamini_hochberg_by_hand() -> None:
    p = torch.tensor([0.04, 0.001, 0.03, 0.9], dtype=torch.float64)
    assert benjamini_hochberg(p).tolist() == pytest.approx([0.16 / 3, 0.004, 0.16 / 3, 0.9])


@pytest.mark.parametrize("width", [3, 50])
def test_the_logistic_fit_is_at_its_minimum(width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, width, generator=generator, dtype=torch.float64)
    y = x[:, 0] + torch.randn(40, generator=generator) > 0
    w = fit_logistic(x, y)
    gradient = x.T @ (torch.sigmoid(x @ w[:-1] + w[-1]) - y.double()) + w[:-1]
    assert gradient.abs().max() < 1e-6


def documents(n: int, seed: int, planted: bool = False) -> Pooled:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(n, 400, generator=generator)
    mean *= torch.rand(n, 400, generator=generator) < 0.3
    if planted:
        mean[:, :3] += 0.6 + 0.4 * torch.rand(n, 3, generator=generator)
    dense = mean @ torch.randn(400, 16, generator=torch.Generator())
    signatures = torch.randint(2**62, (n, 64), generator=generator)
    return Pooled(mean, mean > 0, dense, [row.numpy().tobytes() for row in mean], signatures)


def test_what_is_planted_is_found() -> None:
    result = contrast(documents(80, 0, planted=True), documents(90, 1))
    assert {row["latent"] for row in result["latents"][:3]} == {0, 1, 2}
    assert result["latents_found"] <= 5
    assert all(row["q_value"] <= 0.05 and row["auroc"] > 0.6 for row in result["latents"][:3])
    assert result["probes"]["sparse"] > 0.9
    assert result["probes"]["sparse_shuffled"] < 0.65


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is() -> None:
    found = [contrast(documents(60, 10 + i), documents(60, 50 + i)) for i in range(6)]
    assert sum(result["latents_found"] > 0 for result in found) <= 2
    shuffled = [n for result in found for n in result["shuffled"]["latents_found"]]
    # The chance of any false discovery is the stated 5 %: 120 tries, three standard deviations.
    assert sum(n > 0 for n in shuffled) <= 6 + 3 * (120 * 0.05 * 0.95) ** 0.5


# --- documents that repeat ---


def test_documents_of_both_sets_stay_together_and_are_told() -> None:
    both = documents(60, 0)
    result = contrast(both, both)
    assert result["repeated"]["in_both_sets"] == 60 and result["latents_found"] == 0
    assert result["probes"]["sparse"] <= 0.6 and result["probes"]["dense"] <= 0.6
    assert "60 documents are in both sets" in " ".join(summary(result))


def texts(topics: int, copies: int, seed: int) -> list[str]:
    """``copies`` near copies of each of so many texts of random words: one word differs."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 26, (n, 4), generator=random).tolist()
    word = lambda letters: "".join(chr(97 + letter) for letter in letters)
    found = []
    for _ in range(topics):
        words = [word(letters) for letters in draw(24)]
        for changed in draw(copies):
            found.append(" ".join([*words[:12], word(changed), *words[13:]]))
    return found


def test_near_copies_are_those_that_share_most_of_their_tokens() -> None:
    encode = lambda text: np.array(models.tokenizer()(text, add_special_tokens=False)["input_ids"])
    written = [*texts(6, 5, 0), "", "a", "ab", "ab"]
    group = near_copies(minhash([encode(text) for text in written]))
    assert group[:30].tolist() == [i - i % 5 for i in range(30)]
    assert group[30:].tolist() == [30, 31, 32, 32]
    # The estimate is that of the definition.
    one, other = encode("the quick brown fox jumps" * 3), encode("the quick brown cat jumps" * 3)
    sets = [{tuple(ids[i : i + 3]) for i in range(len(ids) - 2)} for ids in (one, other)]
    share = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    signatures = minhash([one, other])
    assert abs(float((signatures[0] == signatures[1]).double().mean()) - share) < 0.2


@pytest.mark.slow
def test_near_copies_are_held_out_together() -> None:
    """Two sides of one distribution: what tells a topic's copies apart from other topics tells nothing."""
    model = SplicedModel.load(models.llama(), 2)
    sae = small_sae(64, 128, 8)
    written = [texts(6, 10, seed) for seed in (0, 1)]
    positive, negative = (pool(sae, model, side, 160) for side in written)
    result = contrast(positive, negative, probe_latents=20)
    assert result["repeated"]["near_copies"] == 108
    unlike = lambda side: replace(side, signatures=torch.randint(2**62, side.signatures.shape))
    assert "are near copies of another one" in " ".join(summary(result))
    assert result["probes"]["dense"] < 0.75
    apart = unlike(positive), unlike(negative)
    assert contrast(*apart, probe_latents=20)["probes"]["dense"] > 0.95
    # Where all are near copies, nothing can be held out; that is no number.
    same = [[f"{texts(1, 1, 9)[0]} {i} {side}" for i in range(12)] for side in "ab"]
    result = contrast(*(pool(sae, model, side, 160) for side in same))
    assert result["probes"]["sparse"] is None and "Held-out accuracy: –" in summary(result)[-1]


def test_equal_texts_count_once() -> None:
    """Two sides of one distribution, twelve texts twenty times each: most latents were found."""
    model, sae = SplicedModel.load(models.llama(), 2), small_sae(64, 128, 8)
    written = [texts(12, 1, seed) for seed in (0, 1)]
    repeated = [pool(sae, model, side * 20, 64) for side in written]
    result = contrast(*repeated)
    assert result["documents"] == {"positive": 12, "negative": 12}
    assert result["repeated"] == {
        "positive": 228, "negative": 228, "in_both_sets": 0, "near_copies": 0
    }  # fmt: skip
    assert result["latents_found"] <= 1
    assert "456 documents more (95%) are equal" in " ".join(summary(result))
    # What is found is what is found without the repetition.
    once = [pool(sae, model, side, 64) for side in written]
    for name in ("mean", "active", "dense", "keys", "signatures"):
        for pooled, plain in zip(repeated, once, strict=True):
            assert np.array_equal(getattr(pooled, name), getattr(plain, name)), name
    plain = contrast(*once)
    for name in ("latents", "probes", "latents_tested", "shuffled", "documents"):
        assert result[name] == plain[name], name
    few = pool(sae, model, written[0][:9] * 20, 64)
    with pytest.raises(ConfigError, match=r"9 documents with text that differ \(171 repeat them\)"):
        contrast(few, once[1])


def test_too_few_documents() -> None:
    with pytest.raises(ConfigError, match="the negative set has 4 documents"):
        contrast(documents(20, 0), documents(4, 1))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The command, with an SAE and two sets of texts that differ in every word."""
    sae = small_sae(64, 128, 8, metadata={"hook_name": "model.layers.2"})
    fastsae.save(sae, tmp_path / "sae")
    for name, word in (("positive", "tick"), ("negative", "BOOM")):
        lines = (json.dumps({"text": f"{word} " * (3 + i)}) for i in range(12))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = (f"--{n}={tmp_path / n}.jsonl" for n in ("positive", "negative"))
    return ["contrast", str(tmp_path / "sae"), "--model", models.llama(), *files]


def test_the_command(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--out", str(tmp_path / "new/out")]) == 0
    assert "latents tested differ" in capsys.readouterr().out
    result = json.loads((tmp_path / "new/out/contrast.json").read_text())
    assert result["documents"] == {"positive": 12, "negative": 12}
    assert result["latents_found"] == len(result["latents"]) > 0
    assert (tmp_path / "new/out/contrast.html").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fdr", "1.5"), "fdr must be between 0 and 1"),
        (("--probe-latents", "0"), "probe_latents must be at least 1"),
        (("--documents", "0"), "documents must be at least 1"),
        (("--documents", "4"), "the positive set has 4 documents"),
        (("--positive",), "give files with --positive"),
        (("--negative", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_work(
    given: list[str],
    flags: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastsae.SplicedModel, "load", None)
    assert main([*given, *flags]) == 2
    assert said in capsys.readouterr().err


def test_documents_of_one_token(given: list[str], tmp_path: Path) -> None:
    for name, letters in (("positive", "abcdefghijklmnop"), ("negative", "ABCDEFGHIJKLMNOP")):
        lines = (json.dumps({"text": letter}) for letter in letters)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert main(given) == 0
    result = json.loads((tmp_path / "sae/contrast.json").read_text())
    assert result["documents"] == {"positive": 16, "negative": 16}
    assert result["repeated"]["near_copies"] == 0 and result["latents_tested"] > 0
