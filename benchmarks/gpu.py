"""Everything that needs a GPU, in one command.

    python benchmarks/gpu.py --part tests|kernels|step|stream|all --out DIR

Runs from the tree without an install, on torch, triton, numpy and pytest (``stream`` needs transformers
and bitsandbytes too). Each part takes under 8 minutes. Results are in DIR as ``<part>.json`` and
``<part>.csv``, written again after every measurement; a short table is printed last. Without a GPU
it says what it skips and ends well.

Times are CUDA events around a replayed CUDA graph (around the plain call where it cannot be captured),
the L2 cache flushed before each and the inputs rotated: median, 20th and 80th percentile.
"""

import argparse
import csv
import datetime
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

PARTS = ("tests", "kernels", "step", "stream")
SECONDS_PER_PART = 460
COLUMNS = {
    "kernels": ("kernel", "B", "provider", "us", "us_p20", "us_p80", "roof", "share"),
    "stream": ("quantization", "stage", "tokens", "seconds", "tokens_per_second"),
}
"""What is printed of each part's rows at the end."""


class Report:
    """The results of one part: rows of one measurement each, on disk as soon as they are known."""

    def __init__(self, part: str, folder: Path):
        self.part, self.folder = part, folder
        self.rows: list[dict] = []
        self.started = time.monotonic()
        self.about = environment()
        folder.mkdir(parents=True, exist_ok=True)
        self.flush()

    def add(self, **row) -> None:
        self.rows.append(row)
        print("  ".join(f"{k}={_short(v)}" for k, v in row.items() if v is not None), flush=True)
        self.flush()

    def flush(self) -> None:
        path = self.folder / self.part
        text = json.dumps({"part": self.part, "about": self.about, "rows": self.rows}, indent=1)
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns, *self.about])
            writer.writeheader()
            writer.writerows(row | self.about for row in self.rows)

    def out_of_time(self) -> bool:
        """Whether this part has used its time; whoever stops says so in a row."""
        return time.monotonic() - self.started > SECONDS_PER_PART

    def table(self, *columns: str) -> str:
        """The rows that have all of ``columns``, aligned."""
        rows = [[_short(r[c]) for c in columns] for r in self.rows if all(c in r for c in columns)]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [columns, *rows]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environment() -> dict[str, str]:
    """What a figure is worth nothing without."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    found = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if found else "none",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if found else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        "commit": commit or "unknown",
    }


def _version(name: str) -> str:
    found = importlib.util.find_spec(name)
    return importlib.import_module(name).__version__ if found else "not installed"


def measure(call: Callable[[int], object], variants: int, samples: int = 30) -> dict:
    """Microseconds of ``call(i)``, ``i`` going round the input variants: median, p20, p80.

    ``graph`` says whether replayed graphs were timed, which leaves the host's launches out.
    """
    for i in range(variants):
        call(i)
    torch.cuda.synchronize()
    try:
        replays = []
        for i in range(variants):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(i)
            replays.append(graph.replay)
        captured = True
    except RuntimeError:
        replays = [lambda i=i: call(i) for i in range(variants)]
        captured = False
    torch.cuda.synchronize()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for sample in range(samples + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        replays[sample % variants]()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    spent = torch.tensor([1e3 * begin.elapsed_time(end) for begin, end in times[3:]])
    p20, median, p80 = spent.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"us": median, "us_p20": p20, "us_p80": p80, "graph": captured}


def run_tests(report: Report) -> None:
    """``pytest -m gpu``."""
    xml_path = report.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors"]
    command += [f"--junitxml={xml_path}", "tests"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    try:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=SECONDS_PER_PART
        ).returncode
    except subprocess.TimeoutExpired:
        report.add(test="all", result=f"stopped after {SECONDS_PER_PART} s")
        return
    for case in xml.etree.ElementTree.parse(xml_path).iter("testcase"):
        problem = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        report.rows.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "result": "passed" if problem is None else problem.tag,
                "seconds": float(case.get("time", 0)),
                "message": "" if problem is None else (problem.get("message") or "")[:500],
            }
        )
    results = [row["result"] for row in report.rows]
    report.add(summary={r: results.count(r) for r in sorted(set(results))}, exit_code=code)


def run_part(part: str, folder: Path) -> Report:
    report = Report(part, folder)
    if not torch.cuda.is_available():
        report.add(part=part, skipped="no CUDA device")
    elif part == "tests":
        run_tests(report)
    elif importlib.util.find_spec(f"gpu_{part}") is None:
        report.add(part=part, skipped="not part of this version")
    else:
        importlib.import_module(f"gpu_{part}").run(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    reports = [
        run_part(part, options.out)
        for part in (PARTS if options.part == "all" else (options.part,))
    ]
    print("\n" + ", ".join(f"{k} {v}" for k, v in reports[0].about.items()))
    for report in reports:
        skipped = next((row["skipped"] for row in report.rows if "part" in row), None)
        if skipped:
            print(f"{report.part}: skipped ({skipped})")
        elif report.part == "tests":
            print(f"tests: {report.rows[-1]}")
        else:
            print(report.table(*COLUMNS.get(report.part, COLUMNS["kernels"])))
    failed = any(row.get("result") in ("failure", "error") for r in reports for row in r.rows)
    failed |= any(row.get("exit_code") for r in reports for row in r.rows)
    failed |= any("failed" in row for r in reports for row in r.rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
