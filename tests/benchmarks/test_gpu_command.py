"""The GPU command: what it does without a GPU, and that all of it runs before there is one."""

import ast
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae.training.update import FusedUpdate
from fastsae_kernels.update import torch_impl

ROOT = Path(__file__).resolve().parents[2]
LACKING = (
    "datasets", "glassllm", "sae_lens", "tyro", "bitsandbytes", "wandb", "gguf",
    "dictionary_learning", "sparsify", "llamascopium", "transformer_lens",
)  # fmt: skip
"""Packages that a machine with a GPU may be without."""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # In what calls itself a worker of xdist, pytest-benchmark measures nothing.
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env=own | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the command would use")
def test_runs_to_its_end_without_a_gpu(gpu, tmp_path, monkeypatch, capsys):
    for part in gpu.PARTS:
        arguments = ["gpu.py", "--part", part, "--out", str(tmp_path / "new")]
        monkeypatch.setattr(sys, "argv", arguments)
        assert gpu.main() == 0
        assert f"{part}: skipped (no CUDA device)" in capsys.readouterr().out
        written = json.loads((tmp_path / "new" / f"{part}.json").read_text())
        assert written["rows"] == [{"part": part, "skipped": "no CUDA device"}]
        assert {"date", "commit", "hardware", "threads"} <= set(written["about"])
        assert written["about"]["versions"]["torch"] == torch.__version__
        with (tmp_path / "new" / f"{part}.csv").open() as file:
            assert "versions" in csv.DictReader(file).fieldnames


def outcomes(path: Path) -> dict[str, str]:
    """What became of each test, by name."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["test"].rpartition("::")[2]: line["outcome"] for line in lines}


def test_a_part_is_one_command_of_at_most_eight_minutes(gpu, monkeypatch, tmp_path):
    assert gpu.SECONDS_PER_PART + gpu.GRACE <= 480
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "all", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()


def test_the_tests_part_names_every_file_that_has_gpu_tests(gpu):
    def on_a_gpu(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        functions = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
        ]
        arguments = {a.arg for f in functions for a in f.args.args if f.name.startswith("test_")}
        return "pytest.mark.gpu" in text or bool(arguments & {"device", "impl"})

    tests = ROOT / "tests"
    found = {path for path in tests.rglob("test_*.py") if path != Path(__file__) and on_a_gpu(path)}
    assert found == {tests / f"{name}.py" for name in gpu.GPU_TESTS}


@pytest.mark.slow
def test_the_tests_part_needs_no_package_that_a_gpu_machine_lacks(gpu, tmp_path):
    (tmp_path / "lacking.py").write_text(
        "import importlib.machinery as m\n"
        "real = m.PathFinder.find_spec\n"
        "def find(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {LACKING} else real(name, path, target)\n"
        "m.PathFinder.find_spec = staticmethod(find)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *map(str, (ROOT, ROOT / "kernels"))])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "lacking", "-p", "no:timeout"]
    command += ["-W", "default::pytest.PytestConfigWarning", "--collect-only"]
    result = subprocess.run(
        [*command, *gpu.PARTS["tests"].split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    for name in gpu.GPU_TESTS:
        assert f"{name}.py::" in result.stdout


def test_what_was_found_outlives_the_process(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_one(): pass\ndef test_two(): assert 1 == 2\ndef test_three(): os._exit(7)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "results_by_line", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, "-c", os.devnull, "--lines", "lines.jsonl", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
    )
    assert result.returncode == 7
    assert outcomes(tmp_path / "lines.jsonl") == {"test_one": "passed", "test_two": "failed"}
    assert "1 == 2" in (tmp_path / "lines.jsonl").read_text()


def test_a_process_whose_device_is_lost_is_replaced(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plugin = importlib.import_module("results_by_line")
    ended = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    plugin.pytest_runtest_logfinish()
    assert ended == []

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    plugin.pytest_runtest_logfinish()
    assert ended == [1]


@pytest.mark.slow
def test_one_operation_that_fails_costs_no_other_its_time(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "broken.py").write_text(
        "import measure, ops\n"
        "from triton.runtime.errors import OutOfResources\n"
        "def fail(*_):\n    raise OutOfResources(300000, 232448, 'shared memory')\n"
        "ops.kernels.sparse_decode = fail\n"
        "measure.ceilings = fail\n"
    )
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    result = command(
        "--part", "kernels", "--out", str(tmp_path), "--rehearse", "-k", "fastsae and fp32",
        PYTHONPATH=paths, PYTEST_PLUGINS="broken",
    )  # fmt: skip
    assert result.returncode == 1
    found = outcomes(tmp_path / "kernels.jsonl")
    failed = [name for name, outcome in found.items() if outcome == "failed"]
    assert len(failed) == 1 and "decode" in failed[0], result.stdout[-3000:]
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    refused = [row["refused"] for row in rows if row.get("part") == "ceilings"]
    assert refused and "shared memory" in refused[0]
    timed = {row["stage"] for row in rows if row.get("seconds")}
    assert {"encode", "selection", "transpose", "update", "aux-k"} <= timed


@pytest.mark.slow
def test_the_smoke_part_checks_everything_and_times_nothing(tmp_path):
    result = command("--part", "smoke", "--out", str(tmp_path), "--rehearse")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "smoke: ended well" in result.stdout
    found = outcomes(tmp_path / "smoke.jsonl")
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
    # Masters and moments twice: 24 bytes a weight; 8-bit moments: 12.
    weights = 2 * 24576 * 1536 * 24 / 4.3e12
    rest = 2 * 4 * 1024 * 24576 / 4.3e12 + 4 * 65536 * 1536 * 2 / 5.5e12
    rest += 2 * 1024 * 1536 * 24576 / 790e12
    least = bench_step.least_seconds
    assert least(shape, rates) == pytest.approx(weights + rest)
    small = least(shape, rates, moment_bytes=1)
    assert small == pytest.approx(weights * 12 / 24 + rest)
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
@pytest.mark.parametrize("lag", [0, 4], ids=["lag of a CPU", "lag of CUDA"])
@pytest.mark.parametrize("share", [0.0, 0.38])
def test_our_ways_pass_the_gate_in_bf16(bench_step, way, share, lag, monkeypatch):
    monkeypatch.setattr(FusedUpdate, "AUX_LAG_STEPS", {"cpu": lag})
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)
    gates.check(way, trainers.Problem.synthetic(shape, "cpu", "bf16", share))


def test_a_replay_that_differs_passes_no_gate(bench_step):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)

    class Stale(trainers.Graphed):
        """Replays its first batch, as a graph does that nothing is copied into."""

        def train(self, batches, steps):
            first = next(batches)
            again = self.settings["cuda_graph"]
            super().train(iter([first, *((first if again else x) for x in batches)]), steps)

    problem = trainers.Problem.synthetic(shape, "cpu", "bf16")
    gates.check_replays(trainers.Graphed, problem)
    with pytest.raises(AssertionError, match=r"replayed steps give another sae\.W_enc"):
        gates.check_replays(Stale, problem)


def test_a_wrong_8_bit_moment_passes_no_gate(bench_step, monkeypatch):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)
    problem = trainers.Problem.synthetic(shape, "cpu", "bf16")
    right = torch_impl.encode_moment_

    def wrong(code, scale, value, *rest):
        right(code, scale, value * 1.1, *rest)

    monkeypatch.setattr(torch_impl, "encode_moment_", wrong)
    with pytest.raises(AssertionError, match="gradient of W_enc: relative error"):
        gates.check("fastsae, graph, 8-bit", problem)
