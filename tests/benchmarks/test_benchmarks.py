"""The benchmarks' own machinery: clocks, gates, tables, and that the README says what was measured."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# --- two run lengths, in turns ---


def test_what_a_run_does_once_cancels(load):
    measure = load("measure")

    def run(steps):
        return 7.0 + 0.25 * steps  # set up, then steps

    assert measure.two_lengths(run, 2, 10) == pytest.approx(0.25)
    assert measure.two_lengths(run, 0, 1) == pytest.approx(0.25)


def test_impossible_lengths_and_times_are_refused(load):
    measure = load("measure")
    for short, long in ((3, 3), (5, 2), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= short < long"):
            measure.two_lengths(lambda steps: 1.0, short, long)
    with pytest.raises(RuntimeError, match="not quiet"):
        measure.two_lengths(lambda steps: -steps, 1, 2)


def test_ratios_are_paired_by_round(load):
    harness = load("harness")
    found = {
        "fastsae": harness.Measured([1.0, 2.0, 4.0]),
        "other": harness.Measured([3.0, 6.0, 40.0]),
        "wrong": harness.Measured(refused="gradient of W_dec: relative error 1"),
    }
    assert harness.ratios(found) == {"fastsae": 1.0, "other": 3.0}
    assert found["wrong"].row(None) == {"refused": "gradient of W_dec: relative error 1"}
    del found["fastsae"]
    assert harness.ratios(found) == {}


class Scripted:
    """A worker that takes the seconds it is told to; the second trainer fails in its second round."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def ask(self, what, *arguments, **options):
        if what in ("check", "build"):
            self.name = arguments[0]
        self.asked.append((self.name, what))
        runs = self.asked.count((self.name, "run"))
        if self.name == "torch, eager" and runs > 5:
            raise self.error("out of memory")
        values = {"check": {}, "run": float(arguments[0]) if what == "run" else 0, "peak_mib": 5.0}
        return values.get(what)

    def close(self):
        self.asked.append((self.name, "close"))


def test_trainers_take_turns_and_one_that_fails_keeps_no_time(load, monkeypatch):
    harness, shape = load("harness"), load("measure").Shape(32, 24, 160, 4)
    monkeypatch.setattr(harness, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(Scripted, "error", RuntimeError, raising=False)
    found = harness.time_steps(shape, ["fastsae", "torch, eager", "torch, compiled"], rounds=3)
    order = [name for name, what in Scripted.asked if what == "run"]
    assert order[3:12] == ["fastsae"] * 3 + ["torch, eager"] * 3 + ["torch, compiled"] * 3
    assert found["fastsae"].seconds == [1.0] * 3 and found["fastsae"].peak_mib == 5.0
    assert found["torch, eager"].seconds == [] and found["torch, eager"].refused == "out of memory"
    assert len(found["torch, compiled"].seconds) == 3
    assert [what for _, what in Scripted.asked].count("close") == 3


def test_peak_memory_is_that_of_the_block(load):
    measure = load("measure")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a block needs Linux")
    size = 64 * 2**20
    memory = measure.PeakMemory("cpu")
    torch.ones(size // 4).sum()
    assert size * 0.9 < memory.mib * 2**20 < size * 1.5


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
    gates, trainers = load("gates"), load("trainers").TRAINERS
    dead = problem.dead if with_dead else None
    gates.check_step(trainers[name], dataclasses.replace(problem, dead=dead, precision=precision))


def test_the_gate_refuses_wrong_steps(load, problem):
    gates, trainers = load("gates"), load("trainers")
    dense, ours = (trainers.TRAINERS[name] for name in ("torch, eager", "fastsae"))

    class Unprojected(dense):
        def _step(self, x):
            dead = self.since >= trainers.DEAD_AFTER
            self.objective(*self.parameters, x, self.problem.shape.K, dead, self.problem.k_aux)[
                0
            ].backward()
            self.adam.step()

    class Skipping(ours):
        def train(self, batches, steps):
            for x in batches:
                self.counts = self.step(x * 1.001).counts

    class WithoutAux(dense):
        def mark_dead(self, dead):
            pass

    for wrong in (Unprojected, Skipping, WithoutAux):
        with pytest.raises(AssertionError, match="relative error|other counts"):
            gates.check_step(wrong, problem)


def test_the_gate_refuses_other_reconstructions(load, problem):
    gates, dense = load("gates"), load("trainers").TRAINERS["torch, eager"]
    gates.check_reconstruction(dense, problem)

    class Biased(dense):
        def reconstruct(self, x):
            return super().reconstruct(x) + 0.01 * x

    with pytest.raises(AssertionError, match="reconstruction: relative error"):
        gates.check_reconstruction(Biased, problem)


@pytest.mark.slow
def test_our_ways_that_round_their_moments_pass_the_gate_of_the_others(load, problem):
    found = load("gates").check("fastsae, 8-bit", problem)
    assert found["explained_variance"] == pytest.approx(found["explained_variance_ours"], abs=0.1)


def test_no_time_is_given_for_a_result_that_differs(load, monkeypatch):
    worker, harness = load("worker"), load("harness")

    def refuse(*_):
        raise AssertionError("gradient of W_enc: relative error 5e-01")

    monkeypatch.setattr(worker.gates, "check", refuse)
    monkeypatch.setattr(harness, "Worker", lambda: Inline(worker))
    found = harness.time_steps(load("measure").Shape(32, 24, 160, 4), ["fastsae"], rounds=1)
    assert "relative error 5e-01" in found["fastsae"].refused and not found["fastsae"].seconds


class Inline:
    """A worker in this process, where it can be meddled with."""

    def __init__(self, module):
        self.module, self.server = module, module.Server()

    def ask(self, what, *arguments, **options):
        try:
            return getattr(self.server, what)(*arguments, **options)
        except Exception as error:
            raise RuntimeError(str(error)) from error

    def close(self):
        pass


@pytest.mark.slow
def test_steps_are_timed_and_who_is_missing_is_named(load, monkeypatch):
    harness = load("harness")
    monkeypatch.setattr(load("trainers").TRAINERS["SAELens"], "package", "no_such_package")
    found = harness.time_steps(
        load("measure").Shape(64, 32, 256, 4), ["fastsae", "SAELens"],
        dead_share=0.4, rounds=2, short=1, long=20,
    )  # fmt: skip
    ours = found["fastsae"].row(1.0)
    assert len(ours["seconds"]) == 2 and min(ours["seconds"]) > 0 and ours["peak_mib"] > 0
    assert found["SAELens"].refused == "no_such_package is not installed"


@pytest.mark.slow
def test_the_harness_needs_no_peer(load):
    code = (
        "import sys; sys.path[:0] = ['benchmarks']; import harness, ops;"
        "print([m for m in ('sae_lens', 'sparsify', 'dictionary_learning', 'pytest', 'transformers')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_refused_provider_is_not_timed(load):
    ops, measure = load("ops"), load("measure")
    shape = measure.Shape(16, 32, 256, 4)
    op = ops.build("selection", shape, "fp32", "cpu")
    for provider in ("fastsae", "fastsae, without group maxima", "torch, eager"):
        op.check(provider)
    other = torch.randn(shape.B, shape.F, generator=torch.Generator().manual_seed(9))
    op.providers["fastsae"] = lambda i: ops.kernels.batch_topk(other, shape.K).csr
    with pytest.raises(AssertionError, match="not the reference's set"):
        op.check("fastsae")


OPERATIONS = (
    "encode", "group maxima", "selection", "selection per token", "transpose", "decode", "update",
    "aux-k",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_compute_what_they_say(load, name, dtype):
    ops, measure = load("ops"), load("measure")
    assert tuple(ops.OPS) == OPERATIONS
    op = ops.build(name, measure.Shape(16, 32, 256, 4), dtype, "cpu")
    assert next(iter(op.providers)) == "fastsae" and op.bytes_moved > 0
    for provider, call in op.providers.items():
        if "compiled" not in provider and call is not None:
            op.check(provider)
            call(1)
    rates = {"bytes": 1e3, "gather": 1e9, "gather_l2": 1e9, "flops_fp32": 1e30, "flops_bf16": 1e30}
    assert op.roofline_seconds(rates) == pytest.approx(op.bytes_moved / 1e3)
    rates |= {"bytes": 1e30, "gather": 1e3, "gather_l2": 1e3}
    assert op.roofline_seconds(rates) == pytest.approx(op.gathered / 1e3)
    assert (op.gathered > 0) == (name in ("decode", "update"))


@pytest.mark.parametrize("skew", ["Zipf", "few latents", "tokens"])
def test_selections_are_as_skewed_as_they_say(load, skew):
    ops, measure = load("ops"), load("measure")
    csr = ops.skewed(measure.Shape(256, 32, 512, 8), skew, seed=0)
    z = csr.dense(512) > 0
    in_tokens, of_token = z.float().mean(0), z.sum(1)
    assert torch.equal(csr.offsets.diff(), of_token.int()) and csr.indices.dtype == torch.int32
    if skew == "tokens":
        assert of_token.min() == 1 and of_token.max() == 512
    else:
        assert (of_token == 8).all()
        often = 3 if skew == "Zipf" else 5
        assert (in_tokens[:often] > 0.25).all() and in_tokens[often:].mean() < 0.02


@pytest.mark.parametrize(
    "name", ["decode, skewed: Zipf", "update, skewed: few latents", "aux-k, dead: 9339"]
)
def test_skewed_operations_compute_what_they_say(load, name):
    ops, measure = load("ops"), load("measure")
    op = ops.build(name, measure.Shape(16, 32, 256, 4), "bf16", "cpu")
    for provider in ("fastsae", "torch, eager"):
        op.check(provider)


# --- report ---


def results(**overrides):
    def row(trainer, seconds, **info):
        group = "training step | B=1 D=2 F=3 k=1 fp32, 0% dead"
        info = {"kind": "step", "dead": 0.0, "peak_mib": 10.0, "ratio": 1.0, **info}
        return {"group": group, "trainer": trainer, "seconds": seconds, **info}

    about = {
        "date": "2026-01-01",
        "commit": "abcdef1",
        "hardware": "2-core CPU",
        "threads": 2,
        "versions": {"torch": "9"},
    }
    rows = [row("fastsae", [0.2, 0.4, 0.3]), row("peer", [0.1, 0.2, 0.15], ratio=0.5)]
    return {"about": about | overrides, "rows": rows}


def test_the_table_is_made_from_json_and_shows_where_ours_loses(load, tmp_path):
    report, stored = load("report"), load("results")
    path = tmp_path / "performance.json"
    stored.write_results(stored.merge([], results()), path)
    text = report.section(stored.read_results(path))
    assert "| peer | 150 ms | 0.50x | 10 MiB | 1.00x |" in text
    assert "| **fastsae** | 300 ms | 1.00x |" in text
    assert text.index("peer") < text.index("**fastsae**"), "the fastest stands first"
    assert "2-core CPU, 2 threads" in text and "torch 9" in text and "2026-01-01" in text
    assert "##" not in text, "one machine needs no heading"


def test_each_machine_has_tables_of_its_own(load):
    report, stored = load("report"), load("results")
    runs = stored.merge(stored.merge([], results()), results(hardware="a GPU", threads=1))
    assert len(runs) == 2, "what another machine measured is replaced by nobody"
    text = report.section(runs)
    assert text.count("| **fastsae** |") == 2
    assert text.index("## 2-core CPU, 2 threads") < text.index("## a GPU, 1 thread")


def test_the_readme_shows_four_others_beside_ours(load):
    report, stored = load("report"), load("results")
    run = results()
    names = ("SAELens", "sparsify", "torch, eager", "torch, compiled", "dictionary_learning")
    run["rows"] += [run["rows"][0] | {"trainer": name, "seconds": [0.9]} for name in names]
    run["rows"].append(run["rows"][0] | {"trainer": "llamascopium", "dead": 0.38, "group": "other"})
    shown = report.headline(stored.merge([], run))
    assert [row["trainer"] for row in shown] == [
        "fastsae", "SAELens", "dictionary_learning", "sparsify", "torch, eager",
    ]  # fmt: skip
    assert "B=1 D=2 F=3 k=1 fp32, 0% dead; 2-core CPU, 2 threads; torch 9; 2026-01-01" in (
        report.summary([run])
    )


def test_a_gpus_steps_stand_in_the_readme_and_its_kernels_in_a_table(load):
    report, stored = load("report"), load("results")
    on_gpu = results(hardware="a GPU", device="cuda")
    profiles = {
        "eager": [
            ("decode_kernel", 100),
            ("nvjet_a", 40),
            ("void at::fill", 8),
            ("tiny_kernel", 4),
        ],
        "replayed": [("decode_kernel", 90), ("cutlass_b", 60), ("Memcpy DtoD", 6)],
    }
    for form, kernels in profiles.items():
        named = [{"name": name, "count": 2, "us": us} for name, us in kernels]
        row = {"kind": "profile", "group": f"profile | a size, {form}", "trainer": "fastsae"}
        on_gpu["rows"].append(row | {"form": form, "steps": 2, "kernels": named, "seconds": [1e-4]})
    runs = stored.merge(stored.merge([], results()), on_gpu)
    readme = report.summary(runs)
    assert readme.count("| **fastsae** |") == 2 and "On a GPU: B=1 D=2 F=3 k=1" in readme
    table = report.section(runs).split("Kernel by kernel: profile, a size</summary>")[1]
    assert [line for line in table.splitlines() if line.startswith("|")][2:] == [
        "| decode_kernel | 50.0 | 45.0 |",
        "| products of the library | 20.0 | 30.0 |",
        "| the others | 6.0 | 3.0 |",
        "| **all** | 76 | 78 |",
    ]


def test_a_row_measured_again_replaces_the_older_one(load):
    stored = load("results")
    new = results()
    new["rows"] = [new["rows"][0], {"kind": "step", "refused": "gradient"}]
    runs = stored.merge([results()], new)
    assert [[row["trainer"] for row in run["rows"]] for run in runs] == [["peer"], ["fastsae"]]
    assert len(stored.merge(runs, results())) == 1


def test_only_what_stands_between_the_markers_is_replaced(load, tmp_path):
    report = load("report")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_between_markers("new", path)
    assert path.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    path.write_text("nothing here")
    with pytest.raises(ValueError, match="performance: begin"):
        report.write_between_markers("new", path)


def test_the_documents_hold_the_committed_results(load):
    report, stored = load("report"), load("results")
    runs = stored.read_results()
    assert len(report.DOCUMENTS) == 2
    for path, text in report.DOCUMENTS.items():
        shown = path.read_text(encoding="utf-8").split(report.BEGIN)[1].split(report.END)[0]
        assert shown.strip() == text(runs).strip(), "run `python benchmarks/report.py`"


def test_results_name_no_machine(load):
    runs = load("results").read_results()
    for run in runs:
        assert set(run["about"]) <= {
            "date", "hardware", "threads", "versions", "scale", "device", "commit",
        }  # fmt: skip
    assert json.dumps(runs).isascii()


def test_plots_are_drawn(load, tmp_path):
    report = load("report")
    about = {"hardware": "a CPU", "threads": 1, "versions": {"torch": "9"}, "date": "2026-01-01"}
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
    rows = results()["rows"] + ops + curve
    report.write_plots([{"about": about, "rows": rows}], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step_time.png", "stages.png", "scaling.png"}


# --- pytest benchmarks ---


def test_the_scale_fits_the_machine(load, monkeypatch):
    measure = load("measure")
    monkeypatch.setattr(measure, "product_flops", lambda *_: 1e9)
    assert measure.scale_for("cpu") == "tiny"
    monkeypatch.setattr(measure, "product_flops", lambda *_: 1e15)
    assert measure.scale_for("cpu") == "recipe"
    assert measure.scale_for("cuda") == "recipe"


@pytest.mark.slow
def test_pytest_benchmarks_collects_them_and_pytest_does_not():
    def collected(*arguments):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        return run.stdout

    found = collected("benchmarks", "--scale", "tiny")
    assert "scale: tiny" in found
    for kind in ("op", "step", "scaling", "tokens", "stream"):
        assert f"bench_{kind}[" in found
    for name in OPERATIONS:
        assert f"-{name}-fp32-fastsae]" in found or f"-{name}-bf16-fastsae]" in found
    assert "bench_" not in collected("tests/test_package.py", "tests/test_plan.py")


@pytest.mark.slow
def test_a_worker_gives_back_what_its_trainer_raised(load):
    worker, shape = load("worker"), load("measure").Shape(32, 24, 160, 4)
    process = worker.Worker()
    with pytest.raises(RuntimeError, match="AttributeError"):
        process.ask("nothing")
    about = {"device": "cpu", "precision": "fp32", "dead_share": 0.0}
    assert process.ask("check", "fastsae", shape, **about) == {}
    process.ask("build", "fastsae", shape, **about)
    assert process.ask("run", 2) > 0
    assert process.ask("peak_mib") > 0
    process._pool.submit(os._exit, 1)
    with pytest.raises(RuntimeError, match="has ended"):
        process.ask("peak_mib")
    process.close()
