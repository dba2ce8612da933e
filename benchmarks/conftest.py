"""``pytest benchmarks``: what is measured at which size, and where the results go.

Single operations are timed by pytest-benchmark on a CPU, by replayed graphs on a GPU; whole steps and
runs by ``harness``.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from harness import ROUNDS
from measure import SCALES, Shape, ceilings, scale_for
from results import HISTORY, Report


def pytest_addoption(parser):
    add = parser.getgroup("fastsae").addoption
    add("--scale", choices=[*SCALES, "auto"], default="auto", help="sizes [auto: what fits]")
    add("--shape", type=Shape.parse, help="B,D,F,k, instead of a scale")
    add("--batches", type=int, nargs="+", help="several B in place of the one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=ROUNDS, help=f"paired, of steps; 0 only checks [{ROUNDS}]")
    add("--steps-apart", type=int, default=2, help="steps by which two run lengths differ [2]")
    add("--gate", choices=["full", "narrow"], default="full", help="narrow: few and short tokens")
    add("--model", help="language model of the whole runs: a folder [the demo's]")
    add("--text", help="its text: a file, .jsonl or .txt")
    add("--layer", type=int, default=15, help="its layer [15]")
    add("--out", type=Path, help="file for the results, .json; the same in long format beside it")
    add("--no-history", action="store_true", help="add nothing to the history of results")
    add("--seconds", type=float, default=float("inf"), help="skip what has not begun by then")


def pytest_configure(config):
    option = config.getoption
    device, scale, shape = option("--device"), option("--scale"), option("--shape")
    if shape is not None:
        scale = "given"
    elif scale == "auto":
        scale = scale_for(device)
    shape = shape or SCALES[scale]
    config.fastsae_shapes = [replace(shape, B=B) for B in option("--batches") or [shape.B]]
    config.fastsae_deadline = time.monotonic() + option("--seconds")
    history = None if option("--no-history") else HISTORY
    config.fastsae_report = Report(option("--out"), device, history, scale=scale)


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.config.fastsae_shapes, ids=str, scope="session")


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.fastsae_deadline:
        pytest.skip("out of time")


def pytest_report_header(config):
    about, sizes = config.fastsae_report.about, "; ".join(map(str, config.fastsae_shapes))
    return (
        f"scale: {about['scale']} ({sizes}) on {about['hardware']}, {about['threads']} threads, "
        f"commit {about['commit']}"
    )


def pytest_terminal_summary(terminalreporter, config):
    shown = ("step", "scaling", "end to end", "stream")  # pytest-benchmark shows a CPU's operations
    shown = shown if config.getoption("--device") == "cpu" else (*shown, "op")
    groups: dict[str, list[str]] = {}
    for row in config.fastsae_report.rows:
        if row.get("seconds") and row["kind"] in shown:
            groups.setdefault(row["group"], []).append("  " + describe(row))
    if groups:
        terminalreporter.section("medians and extremes")
    for group, lines in groups.items():
        terminalreporter.write_line("\n".join([group, *lines]))


def describe(row: dict) -> str:
    """One line: times, ratio to ours, memory, share of the roofline."""
    times, middle = row["seconds"], median(row["seconds"])
    what = row["trainer"] + (f", {row['axis']}={row[row['axis']]:g}" if "axis" in row else "")
    ratio = f"{row['ratio']:6.2f}x" if row.get("ratio") else " " * 7
    roof = f"  {row['roofline_seconds'] / middle:.0%}" if row.get("roofline_seconds") else ""
    return (
        f"{what:44} {middle:10.4g} s  ({min(times):.4g} to {max(times):.4g}, {len(times)} rounds) "
        f"{ratio}  {row['peak_mib']:8,.0f} MiB{roof}"
    )


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def report(request) -> Report:
    return request.config.fastsae_report


@pytest.fixture(scope="session")
def rates(request, device, report) -> dict[str, float]:
    """The machine's ceilings, which are results too; none where they cannot be measured."""
    try:
        found = ceilings(device, request.config.fastsae_shapes[0])
    except Exception as error:  # which is no reason to measure nothing else
        report.add(part="ceilings", refused=f"{type(error).__name__}: {str(error)[:500]}")
        return {}
    for name, rate in found.items():
        value = (rate / 1e12, "TFLOP/s") if "flops" in name else (rate / 1e9, "GB/s")
        report.add(kind="ceiling", group=name, trainer="machine", values={"rate": value})
    return found
