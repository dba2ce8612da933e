"""The GPU command: what it does without a GPU, and that all of it runs before there is one."""

import csv
import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("smoke", "tests", "kernels", "step", "stream")


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the command would use")
@pytest.mark.slow
def test_runs_to_its_end_without_a_gpu(tmp_path):
    result = command("--part", "all", "--out", str(tmp_path / "new"))
    assert result.returncode == 0, result.stderr
    for part in PARTS:
        assert f"{part}: skipped (no CUDA device)" in result.stdout
        written = json.loads((tmp_path / "new" / f"{part}.json").read_text())
        assert written["rows"] == [{"part": part, "skipped": "no CUDA device"}]
        assert {"date", "commit", "hardware", "threads"} <= set(written["about"])
        assert written["about"]["versions"]["torch"] == torch.__version__
        with (tmp_path / "new" / f"{part}.csv").open() as file:
            assert "versions" in csv.DictReader(file).fieldnames


def outcomes(path: Path) -> dict[str, str]:
    """What became of each test of pytest's XML, by name."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        problem = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        found[case.get("name", "")] = "passed" if problem is None else problem.tag
    return found


@pytest.mark.slow
def test_the_smoke_part_checks_everything_and_times_nothing(tmp_path):
    result = command("--part", "smoke", "--out", str(tmp_path), "--rehearse")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "smoke: ended well" in result.stdout
    found = outcomes(tmp_path / "smoke.xml")
    assert (
        sum(name.startswith("bench_op[") and what == "passed" for name, what in found.items()) >= 12
    )
    steps = {name: what for name, what in found.items() if name.startswith("bench_step[")}
    assert list(steps.values()).count("passed") == 2, steps
    rows = json.loads((tmp_path / "smoke.json").read_text())["rows"]
    assert rows and not any(row.get("seconds") for row in rows)


@pytest.mark.slow
def test_the_step_part_times_what_torch_alone_can(tmp_path):
    # A peer's package takes long to import, and torch.compile wants a compiler.
    result = command(
        "--part", "step", "--out", str(tmp_path), "--rehearse", "-k", "fastsae or eager"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {(row["trainer"], row["dead"]) for row in rows} == {
        (name, dead) for name in ("fastsae", "torch, eager") for dead in (0.0, 0.38)
    }
    for row in rows:
        assert len(row["seconds"]) == 1 and row["seconds"][0] > 0 and row["peak_mib"] > 0
        assert row["ratio"] == 1.0 or row["trainer"] != "fastsae"
    with (tmp_path / "step.csv").open() as file:
        assert {line["metric"] for line in csv.DictReader(file)} >= {"time", "time / ours"}


@pytest.mark.slow
def test_a_failure_is_the_exit_code(tmp_path):
    result = command("--part", "kernels", "--out", str(tmp_path), "--rehearse", "-k", "nosuch")
    assert result.returncode == 1
    assert "kernels: failed (exit code 5)" in result.stdout


@pytest.fixture
def bench_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_step")


def test_the_roofline_adds_up(bench_step):
    rates = {"bytes": 4.3e12, "gather": 5.5e12, "flops_bf16": 790e12}
    shape = importlib.import_module("measure").RECIPE
    # Masters and moments twice, the copy once: 26 bytes a weight; 8-bit moments: 14.
    weights = 2 * 24576 * 1536 * 26 / 4.3e12
    rest = 2 * 4 * 1024 * 24576 / 4.3e12 + 4 * 65536 * 1536 * 2 / 5.5e12
    rest += 2 * 1024 * 1536 * 24576 / 790e12
    least = bench_step.least_seconds
    assert least(shape, rates) == pytest.approx(weights + rest)
    small = least(shape, rates, moment_bytes=1)
    assert small == pytest.approx(weights * 14 / 26 + rest)
    dead = least(shape, rates, dead=9339) - least(shape, rates)
    assert dead == pytest.approx(10 * 1024 * 1536 * 9339 / 790e12)


def test_a_wrong_step_passes_no_gate(bench_step, monkeypatch):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)

    class Moved(gates.Weights):
        def __init__(self, problem):
            super().__init__(problem)
            self.b_dec = self.b_dec + 0.1

    monkeypatch.setattr(gates, "Weights", Moved)
    with pytest.raises(AssertionError, match="relative error"):
        gates.check("fastsae", trainers.Problem.synthetic(shape, "cpu", "bf16"))


@pytest.mark.parametrize(
    "way",
    ["fastsae", "fastsae, graph", pytest.param("fastsae, graph, 8-bit", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("share", [0.0, 0.38])
def test_our_ways_pass_the_gate_in_bf16(bench_step, way, share):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)
    gates.check(way, trainers.Problem.synthetic(shape, "cpu", "bf16", share))
