"""The GPU command: what it does without a GPU, and that all of it runs before there is one."""

import ast
import csv
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fastsae.training.update import FusedUpdate
from fastsae_kernels import dispatch, segments
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
def test_the_profile_part_looks_inside_a_step(tmp_path):
    result = command("--part", "profile", "--out", str(tmp_path), "--rehearse")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "profile.json").read_text())["rows"]
    by_kind: dict[str, list[dict]] = {}
    for row in rows:
        by_kind.setdefault(row.get("kind", "none"), []).append(row)
    forms = {
        "eager",
        "replayed",
        *(f"{way}, {what}" for way in ("eager", "replayed") for what in ("38 % dead", "8-bit")),
    }
    assert {row["form"] for row in by_kind["profile"]} == forms
    assert {row["form"] for row in by_kind["host"]} == forms
    for row in by_kind["profile"]:
        times = [kernel["us"] for kernel in row["kernels"]]
        assert 0 < len(times) <= 60 and times == sorted(times, reverse=True)
        assert all(kernel["name"] and kernel["count"] > 0 for kernel in row["kernels"])
    assert len(by_kind["capture"][0]["calls"]) == by_kind["capture"][0]["eager_calls"] + 3
    assert len(by_kind["bits"]) == 3 and all(row["equal"] for row in by_kind["bits"])
    assert outcomes(tmp_path / "profile.jsonl")["bench_loaded[B=64 D=64 F=512 k=8]"] == "skipped"


@pytest.mark.slow
def test_the_skewed_part_times_what_random_selections_do_not_show(tmp_path):
    result = command("--part", "skewed", "--out", str(tmp_path), "--rehearse")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "skewed.json").read_text())["rows"]
    timed = {row["stage"] for row in rows if row.get("seconds")}
    skews = ("Zipf", "few latents", "tokens")
    wanted = {f"{name}, skewed: {skew}" for name in ("decode", "update") for skew in skews}
    assert timed == wanted | {f"aux-k, dead: {count}" for count in (1000, 9339, 24576)}
    for row in rows:
        if row.get("kind") == "op":
            assert row["memory_bytes"] > 0 and (row["gathered_bytes"] > 0) == (
                "aux" not in row["stage"]
            )


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
    ["fastsae", "fastsae, eager", pytest.param("fastsae, 8-bit", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("lag", [0, 4], ids=["lag of a CPU", "lag of CUDA"])
@pytest.mark.parametrize("share", [0.0, 0.38])
def test_our_ways_pass_the_gate_in_bf16(bench_step, way, share, lag, monkeypatch):
    monkeypatch.setattr(FusedUpdate, "AUX_LAG_STEPS", {"cpu": lag})
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)
    gates.check(way, trainers.Problem.synthetic(shape, "cpu", "bf16", share))


def test_what_replays_on_a_gpu_has_its_replays_checked(bench_step, monkeypatch):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    replays = lambda device: {n for n, each in trainers.TRAINERS.items() if each.replays(device)}
    assert {"fastsae", "fastsae, 8-bit"} <= replays("cuda") and not replays("cpu")
    assert not {"fastsae, eager", "torch, eager", "SAELens"} & replays("cuda:0")
    problem = trainers.Problem.synthetic(
        importlib.import_module("measure").Shape(8, 8, 32, 2), "cpu"
    )
    checked = []
    monkeypatch.setattr(gates, "check_step", lambda *_: None)
    monkeypatch.setattr(gates, "check_replays", lambda *of: checked.append(of))
    for name in ("fastsae", "fastsae, eager"):
        gates.check(name, dataclasses.replace(problem, device="cuda"))
    assert [trainer for trainer, _ in checked] == [trainers.TRAINERS["fastsae"]]


def test_a_replay_that_differs_passes_no_gate(bench_step):
    gates, trainers = importlib.import_module("gates"), importlib.import_module("trainers")
    shape = importlib.import_module("measure").Shape(64, 64, 512, 8)

    class Stale(trainers.Fastsae):
        """Replays its first batch, as a graph does that nothing is copied into."""

        def train(self, batches, steps):
            first = next(batches)
            again = self.settings.get("cuda_graph", True)
            super().train(iter([first, *((first if again else x) for x in batches)]), steps)

    problem = trainers.Problem.synthetic(shape, "cpu", "bf16")
    gates.check_replays(trainers.Fastsae, problem)
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
        gates.check("fastsae, 8-bit", problem)


# --- what only a GPU has, on the stand-in ---

SHAPE = (32, 16, 128, 4)


class Rows(list):
    """A report."""

    def add(self, **row) -> None:
        self.append(row)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The module of the profile and variants parts, on a device that is not there and whose clock stands still."""
    stand_in = pytest.importorskip("cuda_stand_in")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    device = stand_in.Device(index=0, count=1)
    monkeypatch.setattr(stand_in.Event, "elapsed_time", lambda *_: 2.0, raising=False)
    with device.installed():
        type_ = type(segments.long_segments_kernel)
        launched = type_.run

        def run(kernel, *arguments, maxnreg=None, num_warps=4, num_stages=3, **options):
            launched(kernel, *arguments, **options)
            if maxnreg == 64:
                raise RuntimeError("out of resources")
            metadata = SimpleNamespace(num_warps=num_warps, num_stages=num_stages, shared=0)
            return SimpleNamespace(metadata=metadata, n_regs=maxnreg or 40, n_spills=0)

        monkeypatch.setattr(importlib.import_module("measure"), "FLUSHED", 64)
        with mock.patch.object(type_, "run", run):
            yield importlib.import_module("bench_gpu")


def test_times_are_those_of_replays(on_a_gpu, monkeypatch):
    measure = importlib.import_module("measure")
    x = torch.zeros(4, device="cuda")
    times, captured = measure.call_seconds(lambda i: x.add_(1), 2, "cuda")
    assert captured and times == [2e-3] * 30


def test_the_kernels_of_a_step_as_they_were_loaded(on_a_gpu):
    rows, shape = Rows(), importlib.import_module("measure").Shape(*SHAPE)
    on_a_gpu.bench_loaded(rows, shape, "cuda:0")
    (row,) = rows
    names = {kernel["kernel"] for kernel in row["kernels"]}
    assert {"decoder_kernel", "encoder_kernel"} <= names
    assert all(kernel["registers"] >= 40 and kernel["grid"] for kernel in row["kernels"])


@pytest.mark.slow
def test_each_kernel_is_launched_in_other_ways_and_one_that_fails_costs_no_other(
    on_a_gpu, monkeypatch
):
    rows, shape = Rows(), importlib.import_module("measure").Shape(*SHAPE)
    monkeypatch.setattr(on_a_gpu.gpu_step, "WARPS", (4, 8))
    monkeypatch.setattr(on_a_gpu.gpu_step, "REGISTERS", (64, 96))
    monkeypatch.setattr(on_a_gpu.gpu_step, "STAGES", (2, 3))
    monkeypatch.setattr(on_a_gpu, "triton_impl", SimpleNamespace(TUNING=SimpleNamespace(entries=1)))
    config = SimpleNamespace(fastsae_deadline=float("inf"))
    on_a_gpu.bench_variants(SimpleNamespace(config=config), rows, shape, "cuda:0")
    ways = [row["way"] for row in rows if row["kernel"] == "decoder_kernel"]
    assert not [row for row in rows if row["kernel"].startswith(("count_", "batch_", "scatter_"))]
    for way in (
        {},
        {"num_stages": 2},
        {"maxnreg": 64},
        {"maxnreg": 96},
        {"num_warps": 8, "maxnreg": 96},
        {"entries": 2},
        {"entries": 4},
    ):
        assert way in ways
    for row in rows:
        assert ("refused" in row) == (row["way"].get("maxnreg") == 64)
        assert "refused" in row or row["cold_seconds"] == row["warm_seconds"] == 2e-3
    done = len(rows)
    config.fastsae_deadline = 0.0
    rows.clear()
    on_a_gpu.bench_variants(SimpleNamespace(config=config), rows, shape, "cuda:0")
    # Kernels as they are, and the update's tuned: none with other options of its launch.
    assert 0 < len(rows) < done and not [row for row in rows if "num_" in str(row["way"])]


def test_the_host_is_timed_and_bits_are_compared(on_a_gpu, monkeypatch):
    rows, shape = Rows(), importlib.import_module("measure").Shape(*SHAPE)
    monkeypatch.setattr(on_a_gpu, "REPEATED", 6)
    on_a_gpu.bench_host(rows, shape, "cuda:0", "replayed")
    on_a_gpu.bench_capture(rows, shape, "cuda:0")
    on_a_gpu.bench_bits(rows, shape, "cuda:0", "replayed, 38 % dead")
    host, capture, bits = rows
    assert (
        len(host["seconds"]) == 10 and capture["values"]["capturing call"][0] > 0 and bits["equal"]
    )


def test_the_gather_adds_up_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if not dispatch.INTERPRETED:
        pytest.skip("kernels run on CPU tensors under TRITON_INTERPRET=1 alone")
    gather = importlib.import_module("gather")
    table, index = torch.randn(32, 64), torch.randint(32, (3, 16), dtype=torch.int32)
    found = gather.gather_sums(table, index, 8, 32, 4)
    torch.testing.assert_close(found, table[index.long()].sum(1))
