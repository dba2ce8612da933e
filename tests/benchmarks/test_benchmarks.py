"""The benchmarks' own machinery: clocks, gates, tables, and that the README says what was measured."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# --- two run lengths ---


def test_what_a_run_does_once_cancels(load):
    measure = load("measure")
    clock = {"now": 0.0}

    def run(steps):
        clock["now"] += 7.0 + 0.25 * steps  # set up, then steps

    def timed(call, device):
        before = clock["now"]
        call()
        return clock["now"] - before

    assert measure.two_lengths(run, 2, 10, timed) == pytest.approx(0.25)
    assert measure.two_lengths(run, 0, 1, timed) == pytest.approx(0.25)


def test_impossible_lengths_and_times_are_refused(load):
    measure = load("measure")
    for short, long in ((3, 3), (5, 2), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= short < long"):
            measure.two_lengths(lambda steps: None, short, long)
    with pytest.raises(RuntimeError, match="not quiet"):
        measure.two_lengths(lambda steps: -steps, 1, 2, timed=lambda call, device: call())


def test_ratios_are_paired_by_round(load):
    steps = load("steps")
    found = {
        "fastsae": steps.Measured([1.0, 2.0, 4.0]),
        "other": steps.Measured([3.0, 6.0, 40.0]),
        "wrong": steps.Measured(refused="gradient of W_dec: relative error 1"),
    }
    assert steps.ratios(found) == {"fastsae": 1.0, "other": 3.0}
    assert "no time: gradient of W_dec" in steps.table(found)


def test_peak_memory_is_that_of_the_block(load):
    measure = load("measure")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a block needs Linux")
    size = 64 * 2**20
    with measure.PeakMemory("cpu") as memory:
        torch.ones(size // 4).sum()
    assert size * 0.9 < memory.peak < size * 1.5


# --- gates ---


@pytest.fixture
def problem(load):
    measure, trainers = load("measure"), load("trainers")
    shape = measure.Shape(32, 24, 160, 4)
    dead = torch.zeros(160, dtype=torch.bool)
    dead[::3] = True
    return trainers.Problem(shape, measure.activations(shape, 2, "cpu"), dead=dead)


@pytest.mark.parametrize("name", ["fastsae", "fastsae, autograd", "torch, eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("with_dead", [False, True])
def test_the_gate_lets_right_steps_through(load, problem, name, with_dead, precision):
    gates, runners = load("gates"), load("trainers").RUNNERS
    dead = problem.dead if with_dead else None
    gates.check_step(runners[name], dataclasses.replace(problem, dead=dead, precision=precision))


def test_the_gate_refuses_wrong_steps(load, problem):
    gates, trainers = load("gates"), load("trainers")

    class Unprojected(trainers.Dense):
        def _step(self, x):
            dead = self.since >= trainers.DEAD_AFTER
            self.objective(*self.parameters, x, self.problem.shape.K, dead, self.problem.k_aux)[
                0
            ].backward()
            self.adam.step()

    class Skipping(trainers.Fastsae):
        def train(self, batches, steps):
            for x in batches:
                self.result = self.step(x * 1.001)

    class WithoutAux(trainers.Dense):
        def mark_dead(self):
            pass

    for wrong in (Unprojected, Skipping, WithoutAux):
        with pytest.raises(AssertionError, match="relative error|other counts"):
            gates.check_step(wrong, problem)


def test_the_gate_refuses_other_reconstructions(load, problem):
    gates, trainers = load("gates"), load("trainers")
    gates.check_reconstruction(trainers.Dense, problem)

    class Biased(trainers.Dense):
        def reconstruct(self, x):
            return super().reconstruct(x) + 0.01 * x

    with pytest.raises(AssertionError, match="reconstruction: relative error"):
        gates.check_reconstruction(Biased, problem)


def test_no_time_is_given_for_a_result_that_differs(load, monkeypatch):
    steps = load("steps")

    def refuse(*_):
        raise AssertionError("gradient of W_enc: relative error 5e-01")

    monkeypatch.setattr(steps.gates, "check", refuse)
    rows = steps.measure_step("cpu", [(32, 24, 160, 4)], precision="fp32", names=["fastsae"])[
        "rows"
    ]
    assert len(rows) == 2
    for row in rows:
        assert "relative error 5e-01" in row["refused"] and "us" not in row


def test_measure_step_times_what_torch_alone_can(load):
    found = load("steps").measure_step(
        "cpu", [(64, 32, 256, 4)], precision="fp32", dead_shares=(0.4,), names=["fastsae", "SAELens?"],
        rounds=1, short=1, long=20,
    )  # fmt: skip
    ours, unknown = found["rows"]
    assert ours["us"] > 0 and ours["dead_share"] == 0.4 and ours["peak_mib"] >= 0
    assert "KeyError" in unknown["refused"]


def test_the_step_module_needs_no_peer(load):
    code = (
        "import sys; sys.path[:0] = ['benchmarks']; import steps;"
        "print([m for m in ('sae_lens', 'sparsify', 'dictionary_learning', 'pytest', 'transformers')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_refused_provider_is_not_timed(load, monkeypatch):
    ops, measure = load("ops"), load("measure")
    shape = measure.Shape(16, 32, 256, 4)
    op = ops.selection(shape, "fp32", "cpu")
    for provider in ("fastsae", "fastsae, without group maxima", "torch, eager"):
        op.check(provider)
    op.providers["fastsae"] = lambda: (
        ops.batch_topk(
            torch.randn(shape.B, shape.F, generator=torch.Generator().manual_seed(9)), shape.K
        ).csr
    )
    with pytest.raises(AssertionError, match="not the reference's set"):
        op.check("fastsae")


@pytest.mark.parametrize("name", ["encode", "per_token_selection", "decode", "update"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_compute_what_they_say(load, name, dtype):
    ops, measure = load("ops"), load("measure")
    op = getattr(ops, name)(measure.Shape(16, 32, 256, 4), dtype, "cpu")
    for provider in op.providers:
        if "compiled" not in provider:
            op.check(provider)
    assert op.bytes_moved > 0


# --- report ---


def benchmark_json(**overrides):
    def bench(trainer, seconds, **info):
        group = "training step | B=1 D=2 F=3 k=1 fp32, 0% dead"
        info = {"kind": "step", "trainer": trainer, "peak_mib": 10.0, "ratio": 1.0, **info}
        return {"group": group, "stats": {"data": seconds}, "extra_info": info}

    about = {
        "date": "2026-01-01",
        "hardware": "2-core CPU",
        "threads": 2,
        "versions": {"torch": "9"},
    }
    benches = [bench("fastsae", [0.2, 0.4, 0.3]), bench("peer", [0.1, 0.2, 0.15], ratio=0.5)]
    return {
        "machine_info": about,
        "commit_info": {"id": "abcdef123"},
        "benchmarks": benches,
    } | overrides


def test_the_table_is_made_from_json_and_shows_where_ours_loses(load, tmp_path):
    report = load("report")
    runs = report.merge([], report.condense(benchmark_json()))
    path = tmp_path / "performance.json"
    report.write_results(runs, path)
    text = report.section(report.read_results(path))
    assert "| peer | 150 ms | 0.50x | 10 MiB | 1.00x |" in text
    assert "| **fastsae** | 300 ms | 1.00x |" in text
    assert text.index("peer") < text.index("**fastsae**"), "the fastest stands first"
    assert "2-core CPU, 2 threads" in text and "torch 9" in text and "2026-01-01" in text


def test_a_row_measured_again_replaces_the_older_one(load):
    report = load("report")
    old = report.condense(benchmark_json())
    data = benchmark_json()
    data["benchmarks"] = data["benchmarks"][:1]
    runs = report.merge([old], report.condense(data))
    assert [[row["trainer"] for row in run["rows"]] for run in runs] == [["peer"], ["fastsae"]]
    assert len(report.merge(runs, report.condense(benchmark_json()))) == 1


def test_only_what_stands_between_the_markers_is_replaced(load, tmp_path):
    report = load("report")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme("new", path)
    assert path.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    path.write_text("nothing here")
    with pytest.raises(ValueError, match="performance: begin"):
        report.write_readme("new", path)


def test_the_readme_holds_the_committed_results(load):
    report = load("report")
    text = report.README.read_text(encoding="utf-8")
    shown = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.section(report.read_results()).strip(), (
        "run `python benchmarks/report.py`"
    )


def test_results_name_no_machine(load):
    report = load("report")
    for run in report.read_results():
        assert set(run["about"]) <= {
            "date", "hardware", "threads", "versions", "scale", "device", "commit",
        }  # fmt: skip
    assert json.dumps(report.read_results()).isascii()


def test_plots_are_drawn(load, tmp_path):
    report = load("report")
    about = {"hardware": "a CPU"}
    ops = [
        {"kind": "op", "stage": stage, "trainer": who, "group": f"{stage} | B=1 fp32", "seconds": [0.1],
         "roofline_seconds": 0.05, "flops_fp32": 1e9, "bytes": 1e9}
        for stage in report.STAGES for who in ("fastsae", "torch, eager")
    ]  # fmt: skip
    curve = [
        {"kind": "scaling", "trainer": "fastsae", "group": "g", "axis": axis, "seconds": [0.1], "precision": "fp32",
         **{"B": 64, "D": 8, "F": 64, "k": 2}, axis: 64 * i}
        for axis in ("F", "k", "B") for i in (1, 2)
    ]  # fmt: skip
    report.write_plots([{"about": about, "rows": ops + curve}], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"stages.png", "scaling.png"}


# --- pytest benchmarks ---


def test_the_scale_fits_the_machine(load, monkeypatch):
    measure = load("measure")
    monkeypatch.setattr(measure, "product_flops", lambda *_: 1e9)
    assert measure.scale_for("cpu") == "tiny"
    monkeypatch.setattr(measure, "product_flops", lambda *_: 1e15)
    assert measure.scale_for("cpu") == "recipe"
    assert measure.scale_for("cuda") == "recipe"


def test_pytest_benchmarks_collects_them_and_pytest_does_not():
    def collected(*arguments):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        return run.stdout

    found = collected("benchmarks", "--scale", "tiny")
    assert "scale: tiny" in found
    for kind in (
        "encode",
        "batch_selection",
        "decode",
        "weight_update",
        "step",
        "scaling",
        "tokens",
    ):
        assert f"bench_{kind}[" in found
    assert "bench_" not in collected("tests/test_package.py", "tests/test_plan.py")


def test_a_worker_gives_back_what_its_trainer_raised(load):
    worker = load("worker")
    with worker.Worker() as process:
        with pytest.raises(worker.WorkerError, match="AttributeError"):
            process.ask(do="nothing")
        problem = {
            "shape": [32, 24, 160, 4],
            "device": "cpu",
            "precision": "fp32",
            "dead_share": 0.0,
        }
        assert process.ask(do="check", name="fastsae", **problem) == {}
        process.ask(do="build", name="fastsae", **problem)
        assert process.ask(do="run", steps=2) > 0
        assert process.ask(do="peak") > 0
