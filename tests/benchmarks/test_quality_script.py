"""The quality benchmark's own machinery, with fastsae as its only trainer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import models
import pytest
import torch

import fastsae

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("quality")
    yield module
    for name in ("quality", "quality_data"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(quality, monkeypatch):
    """One small case on made-up activations, and fastsae at two grids of learning rates."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, 8, generator=generator)
    rows = (torch.rand(3200, 24, generator=generator) > 0.9).float() @ directions
    data = quality.Data(rows[:2560], rows[2560:], lambda sae: {"mcc": 0.5})
    case = quality.Case(lambda *_: data, d_sae=32, k=3, steps=40, batch_size=64)
    variants = {
        quality.OURS: quality.Variant(),
        "grid": quality.Variant(rates=(1e-2, 1e-7)),
        "half": quality.Variant(share=0.5, options={"k_aux": lambda case: case.k}),
    }
    monkeypatch.setattr(quality, "CASES", {"tiny": case})
    monkeypatch.setattr(quality, "VARIANTS", variants)
    quality.data_of.cache_clear()
    return quality


def run(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def test_a_run_is_measured_on_its_way(tiny):
    case, data = tiny.CASES["tiny"], tiny.CASES["tiny"].data()
    rows = list(tiny.run(tiny.VARIANTS[tiny.OURS], case, data, seed=0, lr=1e-2))
    assert [row["tokens"] // 64 for row in rows] == [4, 8, 20, 40]
    assert rows[0]["explained_variance"] < rows[-1]["explained_variance"]
    assert rows[-1]["mcc"] == 0.5 and "mcc" not in rows[0]
    again = list(tiny.run(tiny.VARIANTS[tiny.OURS], case, data, seed=0, lr=1e-2))
    assert again == rows, "the same seed gives the same SAE"
    halves = list(tiny.run(tiny.VARIANTS["half"], case, data, seed=0, lr=None))
    assert [row["tokens"] // 64 for row in halves] == [2, 4, 10, 20]


def test_no_run_begins_with_what_it_is_to_find(quality, tiny):
    """A decoder drawn as the true features were, with the same seed, is the true features."""
    case, drawn = tiny.CASES["tiny"], tiny.replace(tiny.CASES["tiny"].data(), drawn_with=2)
    with pytest.raises(SystemExit, match="seed 2 would begin with the true features"):
        list(tiny.run(tiny.VARIANTS[tiny.OURS], case, drawn, seed=2, lr=None))
    importlib.reload(quality)
    known = [case for name, case in quality.CASES.items() if name.startswith("features")]
    assert known
    for case in known:
        assert quality.quality_data.TRUTH_SEED not in (*case.seeds, case.choosing)


def test_the_rate_is_chosen_on_a_seed_that_is_not_published(tiny, monkeypatch, tmp_path, capsys):
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "0", "1")
    path = tmp_path / "quality_study.csv"
    done = [key[1:] for key in tiny.finals(tiny.read_runs(path))]
    grid = [(lr, seed) for name, lr, seed in done if name == "grid"]
    assert sorted(grid[:3]) == [("", 100), ("0.01", 100), ("1e-07", 100)]
    best = tiny.best_rate(tiny.read_runs(path), "tiny", "grid")
    assert best in ("", "0.01") and set(grid[3:]) == {(lr, s) for lr in ("", best) for s in (0, 1)}
    assert [key for key in done if key[0] == tiny.OURS] == [(tiny.OURS, "", 0), (tiny.OURS, "", 1)]
    table = tiny.tables(tiny.read_runs(path))
    assert capsys.readouterr().out.endswith(table + "\n")
    assert (
        table.count("| 2 |") == len(tiny.published(tiny.read_runs(path))) and "1e-07" not in table
    )
    before = path.read_text()
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "0", "1")
    assert path.read_text() == before, "what is there is not run again"
    run(tiny, monkeypatch, "--out", str(tmp_path), "--plot", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    metrics = {row["metric"] for row in tiny.read_csv(tmp_path / "history.csv")}
    assert metrics == {
        "explained variance", "alive fraction", "mcc", "threshold explained variance", "threshold l0",
    }  # fmt: skip


def test_a_case_may_choose_the_rate_on_a_published_seed(tiny):
    def row(lr: str, seed: int, explained: float) -> dict[str, str]:
        numbers = {"seed": seed, "tokens": 640, "explained_variance": explained}
        return {"case": "tiny", "trainer": "grid", "lr": lr} | {
            n: str(v) for n, v in numbers.items()
        }

    tiny.CASES["tiny"] = tiny.replace(tiny.CASES["tiny"], choosing=0)
    rows = [row("", 0, 0.5), row("0.01", 0, 0.7)]
    assert list(tiny.wanted(rows, "tiny", "grid", (0, 1))) == [("1e-07", 0)]
    assert tiny.best_rate(rows, "tiny", "grid") is None
    assert {lr for _, _, lr in tiny.published(rows)} == {"own", "0.01"}, (
        "all, until one is the best"
    )
    rows.append(row("1e-07", 0, 0.6))
    assert list(tiny.wanted(rows, "tiny", "grid", (0, 1))) == [("0.01", 1)], "its own on one seed"
    assert {lr: set(seeds) for (_, _, lr), seeds in tiny.published(rows).items()} == {
        "own": {0}, "0.01": {0},
    }  # fmt: skip


def test_rates_beyond_a_worse_one_are_not_tried(quality):
    """Trying what is untried, one after the other, ends with the best of a hill, and does not climb down it."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2)

    def climb(own: float, *values: float) -> list[str]:
        hill, tried = {"": own} | dict(zip(map(str, rates), values, strict=True)), {}
        while lrs := quality.untried(tried, rates):
            tried[lrs[0]] = hill[lrs[0]]
        assert max(tried, key=tried.__getitem__) == max(hill, key=hill.__getitem__)
        return list(tried)

    assert climb(0.5, 0.7, 0.6, 0.5, 0.4) == ["", "0.001", "0.003"]
    assert climb(0.5, 0.7, 0.8, 0.6, 0.4) == ["", "0.001", "0.003", "0.01"]
    assert climb(0.9, 0.7, 0.6, 0.5, 0.4) == ["", "0.001", "0.003", "0.01", "0.03"]
    assert quality.untried({"": 0.5, "0.003": 0.7}, rates) == ["0.001", "0.01"]


def test_differences_are_paired_by_seed(quality):
    rows = lambda values: {s: {"explained_variance": str(v)} for s, v in values.items()}
    ours, theirs = rows({0: 0.80, 1: 0.60, 2: 0.71}), rows({1: 0.59, 0: 0.78, 3: 0.10})
    # Two differences d, e have a standard error of |d - e| / 2.
    assert quality.difference(ours, theirs) == "+0.0150 ± 0.0050"
    assert quality.difference(ours, rows({2: 0.7})) == "+0.0100"
    assert quality.difference(ours, {}) == ""


def test_a_seed_draws_the_same_rows_once_for_everyone(quality):
    pool = torch.arange(100.0)[:, None]
    first, again, other = (quality.Batches(pool, 10, 9, seed) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert len(torch.cat(list(first)).unique()) == 90 and len(first) == 9
    assert first[2:4][1].equal(first[3])
    assert not torch.cat(list(first)).equal(torch.cat(list(other)))
    first[0].zero_()
    assert first[0].equal(again[0]), "nobody can change another's batches"
    with pytest.raises(SystemExit, match="100 activations"):
        quality.Batches(pool, 10, 11, seed=3)


def test_the_first_versions_scaling_gives_an_sae_of_raw_activations(tiny):
    case, data = tiny.CASES["tiny"], tiny.CASES["tiny"].data()
    variant = tiny.Variant(options={"scale_by_norm": True})
    (*_, last) = tiny.run(variant, case, data, seed=0, lr=1e-2)
    assert last["explained_variance"] > 0.6
    assert last["threshold_l0"] == pytest.approx(case.k, rel=0.2)


def test_probing_finds_what_the_latents_say(quality):
    data = importlib.import_module("quality_data")
    labels = torch.arange(4).repeat_interleave(20)
    noise = torch.rand(80, 30, generator=torch.Generator().manual_seed(0))
    assert data._probing(noise, labels) < 0.65
    noise[:, :4] += torch.nn.functional.one_hot(labels, 4) * 2
    assert data._probing(noise, labels) == 1


@pytest.mark.slow
def test_a_language_model_is_read_and_scored(quality, monkeypatch, tmp_path):
    data = importlib.import_module("quality_data")
    monkeypatch.setattr(data, "DOCUMENTS", 4)
    monkeypatch.setattr(data, "SPLICED_TOKENS", 100)
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of words." for i in range(300)))
    config = fastsae.TrainConfig(
        model=models.llama(), layer=2, d_sae=48, k=4, tokens=640, batch_size=64, pool_tokens=256, device="cpu",
        eval_tokens=256, context_length=32, text_files=(str(tmp_path / "a.txt"),), quantization="none",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    found = data.language_model(config)
    assert found.train.shape == (640, 64) and len(found.held_out) >= 200
    case = quality.Case(lambda *_: found, d_sae=48, k=4, steps=10, batch_size=64)
    (*_, last) = quality.run(quality.VARIANTS[quality.OURS], case, found, seed=0, lr=None)
    assert last["loss_recovered"] == last["loss_recovered"] and 0 <= last["probing"] <= 1


def test_a_case_without_its_model_is_refused(quality, monkeypatch, tmp_path):
    arguments = ("--out", str(tmp_path), "--cases", "SmolLM2", "--trainers", "fastsae")
    with pytest.raises(SystemExit, match=r"smollm2.py DIR, then --model DIR"):
        run(quality, monkeypatch, *arguments)


def test_peers_counts_of_steps_are_scaled_to_the_run(quality):
    problem = quality.Problem(quality.Shape(32, 8, 16, 2), [], steps=2000)
    assert problem.scaled_steps(1000) == 20
    assert problem.scaled_steps(1) == 1
