"""The quality benchmark's own machinery, with fastsae as its only trainer."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("quality")
    yield module
    sys.modules.pop("quality", None)


@pytest.fixture
def tiny(quality, monkeypatch):
    """The script with one small case, random activations, and fastsae on both sides."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, 8, generator=generator)
    rows = (torch.rand(800, 24, generator=generator) > 0.9).float() @ directions
    monkeypatch.setattr(quality, "activations", lambda *_: (rows[:640], rows[640:]))
    case = quality.Case(layer=0, d_sae=32, k=3, batch_size=32, steps=20, lr=1e-2)
    monkeypatch.setattr(quality, "CASES", {"tiny": case})

    ours = quality.VARIANTS[quality.OURS]

    def untrained(problem):
        return ours(quality.replace(problem, steps=1))

    monkeypatch.setattr(quality, "VARIANTS", {quality.OURS: ours, "untrained": untrained})
    return quality


def run(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def row(trainer: str, seed: int, ev: float, alive: float = 1.0) -> dict:
    return {
        "case": "c",
        "trainer": trainer,
        "seed": str(seed),
        "explained_variance": str(ev),
        "alive_fraction": str(alive),
        "threshold_explained_variance": str(ev),
        "threshold_l0": "3.0",
    }


def test_a_run_writes_its_results_and_the_better_trainer_passes(
    tiny, monkeypatch, tmp_path, capsys
):
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "0", "1")
    rows = tiny.read_runs(tmp_path)
    assert [(r["trainer"], r["seed"]) for r in rows] == [
        ("fastsae", "0"), ("fastsae", "1"), ("untrained", "0"), ("untrained", "1"),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "quality.json").read_text())
    (comparison,) = summary["comparison"]
    assert comparison["seeds"] == [0, 1]
    assert comparison["explained_variance"]["difference"] > 0.1
    assert summary["environment"]["versions"]["torch"] == torch.__version__
    assert summary["cases"]["tiny"]["d_sae"] == 32
    printed = capsys.readouterr().out
    run(tiny, monkeypatch, "--out", str(tmp_path), "--table")
    table = capsys.readouterr().out
    assert table.count("| tiny |") == 2
    assert printed.endswith(table)


@pytest.mark.slow
def test_results_are_added_to_and_replaced_by_key(tiny, monkeypatch, tmp_path):
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "1")
    before = tiny.read_runs(tmp_path)
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "0", "1", "--trainers", "fastsae")
    after = tiny.read_runs(tmp_path)
    assert [(r["trainer"], r["seed"]) for r in after] == [
        ("fastsae", "0"), ("fastsae", "1"), ("untrained", "1"),
    ]  # fmt: skip
    assert before[0] == after[1], "the same seed gives the same SAE"


def test_differences_are_paired_by_seed(quality):
    ours, theirs = {0: 0.80, 1: 0.60, 2: 0.71}, {1: 0.59, 0: 0.78, 3: 0.10}
    rows = [row("fastsae", s, ev) for s, ev in ours.items()]
    rows += [row("peer", s, ev) for s, ev in theirs.items()]
    (found,) = quality.compare(rows)
    assert found["seeds"] == [0, 1]
    assert found["explained_variance"]["difference"] == pytest.approx(0.015)
    # Two differences d, e have a standard error of |d - e| / 2.
    assert found["explained_variance"]["standard_error"] == pytest.approx(0.005)


def test_both_criteria_must_hold(quality):
    def verdict(ours, theirs):
        rows = [row("fastsae", s, *values) for s, values in enumerate(ours)]
        rows += [row("peer", s, *values) for s, values in enumerate(theirs)]
        return quality.compare(rows)[0]["passes"]

    peer = [(0.8, 0.9), (0.8, 0.9)]
    assert verdict([(0.796, 0.9), (0.796, 0.9)], peer), "within the margin"
    assert not verdict([(0.79, 0.9), (0.79, 0.9)], peer), "below it, without noise"
    assert not verdict([(0.9, 0.88), (0.9, 0.88)], peer), "alive fraction counts as well"
    assert verdict([(0.82, 0.9), (0.76, 0.9)], peer), "below it, within the noise"


def test_one_seed_has_no_standard_error(quality):
    (found,) = quality.compare([row("fastsae", 0, 0.8), row("peer", 0, 0.81)])
    assert math.isnan(found["explained_variance"]["standard_error"])
    assert not found["passes"]


def test_a_seed_draws_the_same_rows_once_for_everyone(quality):
    pool = torch.arange(100.0)[:, None]
    first, again = (quality.draw_batches(pool, 10, 9, seed=3) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert len(torch.cat(first).unique()) == 90
    other = quality.draw_batches(pool, 10, 9, seed=4)
    assert not torch.cat(first).equal(torch.cat(other))
    with pytest.raises(SystemExit, match="100 activations"):
        quality.draw_batches(pool, 10, 11, seed=3)


def test_a_case_is_the_same_problem_for_everyone(quality):
    case = quality.Case(layer=0, d_sae=32, k=3, batch_size=10, steps=9, lr=1e-2)
    problem = case.problem(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), seed=3)
    assert problem.shape == quality.Shape(10, 8, 32, 3) and problem.tokens == 90
    assert (problem.dead_after, problem.seed, problem.lr) == (9, 3, 1e-2)
    assert len(problem.batches) == 9 and problem.batches[0].shape == (10, 8)


def test_trainers_cannot_change_each_others_batches(quality):
    batches = list(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).split(32))
    problem = quality.Problem(quality.Shape(32, 8, 16, 2), batches, steps=2, dead_after=1000)
    before = torch.cat(batches)

    def vandal(problem):
        sae = quality.VARIANTS[quality.OURS](problem)
        for batch in problem.batches:
            batch.zero_()
        return sae

    quality.scores(vandal, problem, torch.cat(batches))
    assert torch.cat(batches).equal(before)


def test_peers_counts_of_steps_are_scaled_to_the_run(quality):
    problem = quality.Problem(quality.Shape(32, 8, 16, 2), [], steps=2000)
    assert problem.scaled_steps(1000) == 20
    assert problem.scaled_steps(1) == 1


def test_means_over_the_seeds_go_to_the_history(tiny, monkeypatch, tmp_path):
    run(tiny, monkeypatch, "--out", str(tmp_path), "--seeds", "0", "1", "--trainers", "fastsae")
    results = importlib.import_module("results")
    lines = results.read_csv(tmp_path / "history.csv")
    assert {line["metric"] for line in lines} == {
        "explained variance", "alive fraction", "threshold explained variance", "threshold l0",
    }  # fmt: skip
    assert {
        (line["benchmark"], line["case"], line["trainer"], line["rounds"]) for line in lines
    } == {("quality", "tiny", "fastsae", "2")}
    mean = sum(float(r["explained_variance"]) for r in tiny.read_runs(tmp_path)) / 2
    assert float(lines[0]["value"]) == pytest.approx(mean, rel=1e-5)
