"""The GPU command: what it does without a GPU, and that what it would time computes what it says."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the command would use")
def test_runs_to_its_end_without_a_gpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--part", "all", "--out", str(tmp_path / "new")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for part in ("tests", "kernels", "step", "stream"):
        assert f"{part}: skipped (no CUDA device)" in result.stdout
        written = json.loads((tmp_path / "new" / f"{part}.json").read_text())
        assert written["rows"] == [{"part": part, "skipped": "no CUDA device"}]
        assert {"gpu", "torch", "triton", "date"} <= set(written["about"])
        with (tmp_path / "new" / f"{part}.csv").open() as file:
            assert next(csv.DictReader(file))["torch"] == torch.__version__


@pytest.fixture
def kernels(monkeypatch):
    """The list of kernel benchmarks, on CPU tensors and at a size for them."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu_kernels")
    for name, value in {"DEVICE": "cpu", "D": 64, "F": 2048, "k": 8}.items():
        monkeypatch.setattr(module, name, value)
    return module


NAMES = (
    "group_max batch_topk csr_to_csc topk encode_with_group_max sparse_decode fused_update aux_k"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_problems_compute_what_they_say(name, kernels):
    assert [entry.name for entry in kernels.ENTRIES] == NAMES.split()
    entry = next(entry for entry in kernels.ENTRIES if entry.name == name)
    try:
        problem = entry.build(32)
    except ImportError as error:
        pytest.skip(str(error))
    problem.check()
    for provider, call in problem.providers.items():
        if provider != "compiled":
            call(0), call(1)
    assert next(iter(problem.providers)) == "fastsae" and problem.bytes_moved > 0


def test_a_wrong_result_is_not_timed(kernels, monkeypatch, tmp_path):
    from gpu import Report

    monkeypatch.setattr(kernels, "topk", lambda pre, k: kernels.batch_topk(pre, len(pre) * k).csr)
    timed = []
    monkeypatch.setattr(kernels, "measure", lambda *a: timed.append(a))
    entry = next(entry for entry in kernels.ENTRIES if entry.name == "topk")
    with pytest.raises(AssertionError):
        kernels.time_entry(Report("kernels", tmp_path), entry, 32, {"copy": 1.0})
    assert not timed


@pytest.fixture
def gpu_step(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_step")


@pytest.mark.parametrize("share", [0.0, 0.38])
def test_our_steps_are_checked_and_timed(gpu_step, tmp_path, share):
    report = gpu_step.Report("step", tmp_path)
    ceiling = {"copy": 1e12, "gather": 1e12, "gemm": 1e15}
    shape = gpu_step.Shape(64, 64, 512, 8)
    gpu_step.time_ours(report, shape, share, ceiling, device="cpu", lengths=(1, 5), rounds=2)
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == list(gpu_step.WAYS)
    for row in rows:
        assert "failed" not in row, row
        assert row["us"] > 0 and row["share"] == pytest.approx(row["roof"] / row["us"])


def test_a_wrong_step_is_not_timed(gpu_step, tmp_path, monkeypatch):
    class Moved(gpu_step.gates.Weights):
        def __init__(self, problem):
            super().__init__(problem)
            self.b_dec = self.b_dec + 0.1

    monkeypatch.setattr(gpu_step.gates, "Weights", Moved)
    report = gpu_step.Report("step", tmp_path)
    ceiling = {"copy": 1e12, "gather": 1e12, "gemm": 1e15}
    shape = gpu_step.Shape(64, 64, 512, 8)
    gpu_step.time_ours(
        report, shape, 0.0, ceiling, device="cpu", lengths=(1, 3), rounds=2,
        ways=("fastsae, eager",),
    )  # fmt: skip
    (row,) = report.rows
    assert "us" not in row and row["failed"]


def test_the_roofline_adds_up(gpu_step):
    ceiling = {"copy": 4.3e12, "gather": 5.5e12, "gemm": 790e12}
    shape = gpu_step.RECIPE
    # Masters and moments twice, the copy once: 26 bytes a weight; 8-bit moments: 14.
    weights = 2 * 24576 * 1536 * 26 / 4.3e12
    rest = 2 * 4 * 1024 * 24576 / 4.3e12 + 4 * 65536 * 1536 * 2 / 5.5e12
    rest += 2 * 1024 * 1536 * 24576 / 790e12
    least = gpu_step.least_microseconds
    assert least(shape, ceiling) == pytest.approx(1e6 * (weights + rest))
    small = least(shape, ceiling, moment_bytes=1)
    assert small == pytest.approx(1e6 * (weights * 14 / 26 + rest))
    dead = least(shape, ceiling, dead=9339) - least(shape, ceiling)
    assert dead == pytest.approx(1e6 * 10 * 1024 * 1536 * 9339 / 790e12)
