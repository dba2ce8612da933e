"""The history of every result, and the command that says what moved between two commits."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {
    "date": "2026-01-01",
    "commit": "aaaaaaa",
    "hardware": "2-core CPU",
    "threads": 2,
    "versions": {"torch": "9", "python": "3"},
}


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


def step(trainer="fastsae", seconds=(1.0, 1.2, 1.1), **about):
    row = {"kind": "step", "group": "training step | B=1", "trainer": trainer, "peak_mib": 10.0}
    return row | {"seconds": list(seconds), "ratio": 1.0, **about}


def test_every_value_is_a_line(results):
    lines = list(results.long_rows(ABOUT, [step(gate={"explained_variance": 0.5})]))
    assert [(line["metric"], line["value"], line["unit"], line["rounds"]) for line in lines] == [
        ("time", "1.1", "s/step", "3"),
        ("time / ours", "1", "x", "3"),
        ("peak memory", "10", "MiB", "3"),
        ("explained variance", "0.5", "", "1"),
    ]
    for line in lines:
        assert tuple(line) == results.COLUMNS
        assert line["hardware"] == "2-core CPU, 2 threads" and line["commit"] == "aaaaaaa"
        assert line["versions"] == "torch 9; python 3" and line["benchmark"] == "step"


def test_what_was_not_measured_has_no_line(results):
    nothing = [
        step(seconds=()),
        step(seconds=(), refused="gradient of W_dec"),
        {"test": "a", "seconds": 1.0},
    ]
    assert list(results.long_rows(ABOUT, nothing)) == []


def test_sizes_of_a_curve_are_cases_of_their_own(results):
    rows = [step(kind="scaling", axis="F", F=F) for F in (64, 128)]
    cases = [line["case"] for line in results.long_rows(ABOUT, rows) if line["metric"] == "time"]
    assert cases == ["training step | B=1, F=64", "training step | B=1, F=128"]


def test_a_report_is_on_disk_after_every_row(results, tmp_path):
    history = tmp_path / "history.csv"
    for _ in range(2):
        report = results.Report(tmp_path / "out" / "suite.json", history=history, scale="tiny")
        report.about["date"], report.about["commit"] = "2026-01-01", "aaaaaaa"
        for trainer in ("fastsae", "other"):
            report.add(**step(trainer))
            written = json.loads((tmp_path / "out" / "suite.json").read_text())
            assert written == {"about": report.about, "rows": report.rows}
    lines = results.read_csv(history)
    assert lines == results.read_csv(tmp_path / "out" / "suite.csv"), "nothing is added twice"
    assert [line["trainer"] for line in lines] == ["fastsae"] * 3 + ["other"] * 3
    assert tuple(lines[0]) == results.COLUMNS


def history_of(results, path, *runs):
    for commit, rows in runs:
        results.append(path, results.long_rows(ABOUT | {"commit": commit}, rows))
    return path


def test_a_regression_shows(results, tmp_path):
    path = history_of(
        results,
        tmp_path / "history.csv",
        ("aaaaaaa", [step(seconds=[9.0]), step(seconds=[1.0]), step("peer", [2.0], ratio=2.0)]),
        ("bbbbbbb", [step(seconds=[1.2], peak_mib=8.0), step("peer", [2.05], ratio=1.7)]),
    )
    lines, worse = results.changes(results.read_csv(path), "aaaaaaa", "bbbbbbb")
    assert worse and len(lines) == 4 and lines[-1].startswith("6 results compared, 3 moved")
    assert lines[0] == "WORSE   +20.0%  time of fastsae, training step | B=1: 1 -> 1.2 s/step"
    assert lines[1].startswith("better  -20.0%  peak memory of fastsae")
    assert lines[2].startswith("WORSE   -15.0%  time / ours of peer")
    lines, worse = results.changes(results.read_csv(path), "aaaaaaa", "bbbbbbb", 0.3)
    assert lines == ["6 results compared, 0 moved by more than 30%"] and not worse


def test_a_slower_peer_is_no_regression_of_ours(results, tmp_path):
    path = history_of(
        results, tmp_path / "h.csv", ("a", [step("peer", [1.0])]), ("b", [step("peer", [2.0])])
    )
    lines, worse = results.changes(results.read_csv(path), "a", "b")
    assert lines[0].startswith("WORSE  +100.0%") and not worse


def test_explained_variance_rises_from_below_zero(results, tmp_path):
    runs = [
        (commit, [step(gate={"explained_variance": ev})]) for commit, ev in (("a", -1), ("b", 0.5))
    ]
    path = history_of(results, tmp_path / "h.csv", *runs)
    lines, worse = results.changes(results.read_csv(path), "a", "b")
    assert lines[0].startswith("better +150.0%  explained variance of fastsae") and not worse


def test_only_the_same_hardware_is_compared(results, tmp_path):
    path = history_of(results, tmp_path / "h.csv", ("a", [step()]))
    results.append(path, results.long_rows(ABOUT | {"commit": "b", "threads": 1}, [step()]))
    with pytest.raises(ValueError, match="no result in common"):
        results.changes(results.read_csv(path), "a", "b")
    with pytest.raises(ValueError, match="no results of commit 'c'; there are results of a, b"):
        results.changes(results.read_csv(path), "a", "c")


def test_the_command_compares_names_that_git_knows(results, monkeypatch, tmp_path, capsys):
    report = importlib.import_module("report")
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    runs = ((head, [step(seconds=[1.0])]), ("old", [step(seconds=[1.5])]))
    path = history_of(results, tmp_path / "h.csv", *runs)
    assert report.compare("old", "HEAD", 0.05, path) == 0
    assert "better  -33.3%" in capsys.readouterr().out
    assert report.compare("HEAD", "old", 0.05, path) == 1
    assert report.compare("HEAD", "none", 0.05, path) == 2
    assert "no results of commit 'none'" in capsys.readouterr().err


def test_the_history_has_every_published_result(results):
    history = results.read_csv()
    known = {tuple(line.values()) for line in history}
    assert len(known) == len(history), "a line stands there twice"
    for run in results.read_results():
        for line in results.long_rows(run["about"], run["rows"]):
            assert tuple(line[name] for name in results.COLUMNS) in known
    assert {line["benchmark"] for line in history} >= {"step", "op", "end to end", "quality"}
    assert all(line["commit"] and line["date"] for line in history)
    for line in history:
        value, metric = float(line["value"]), line["metric"]
        assert math.isfinite(value)
        assert value >= 0 or metric.endswith("explained variance")  # of an SAE worse than the mean


@pytest.mark.slow
def test_help_is_the_docstring(results):
    run = subprocess.run(
        [sys.executable, "benchmarks/report.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and "--compare A B" in run.stdout
