"""Check compiled kernels without a GPU.

    python kernels/emulator/run.py tests              every kernel test on what Triton compiles for sm_90
    python kernels/emulator/run.py slice              a part of them, with every kernel, in minutes
    python kernels/emulator/run.py interpreter        the same tests interpreted, programs last to first
    python kernels/emulator/run.py counts             instructions of a training step's kernels, a table
    python kernels/emulator/run.py counts --write     the table into docs/emulator.md

Further arguments of the first three go to pytest: ``--order reversed``, ``--order-seed 1``,
``--noise 1``, ``-n 2``, a file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
ROOT = KERNELS.parent
sys.path[:0] = [str(KERNELS), str(ROOT)]
PAGE, BEGIN, END = ROOT / "docs/emulator.md", "<!-- counts: begin -->", "<!-- counts: end -->"
EMULATED, INTERPRETED = ("-p", "emulator.plugin"), ("-p", "emulator.interpreter")
ON_TRITON = ("-k", "triton or interpreter or kernels")
SLICE = ("-m", "not slow", "--every-kernel")


def run_tests(plugin: tuple[str, ...], *arguments: str) -> int:
    files = () if any(a.startswith("tests") for a in arguments) else ("tests/ops",)
    paths = os.pathsep.join([str(KERNELS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-r", "fE", *plugin, *arguments, *files]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}).returncode


def counts(write: bool) -> int:
    from emulator.counts import table

    text = "\n".join(table())
    print(text)
    if write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Check compiled kernels without a GPU.")
    parser.add_argument("what", choices=("tests", "slice", "interpreter", "counts"))
    parser.add_argument("--write", action="store_true", help="counts: write the table to the page")
    options, rest = parser.parse_known_args()
    if options.what == "counts":
        return counts(options.write)
    plugin = INTERPRETED if options.what == "interpreter" else EMULATED
    chosen = SLICE if options.what == "slice" else ()
    return run_tests(plugin, *ON_TRITON, *chosen, *rest)


if __name__ == "__main__":
    sys.exit(main())
