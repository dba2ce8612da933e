"""Everything that needs a GPU, in one command.

    python benchmarks/gpu.py --part smoke|tests|kernels|step|stream|all --out DIR

Runs from the tree without an install, on torch, triton, numpy and pytest (``stream`` needs transformers
and bitsandbytes too, a peer's step its package). ``smoke`` checks every operation and each of our ways
to step, in a minute. Each part is a run of pytest that begins nothing after 8 minutes; DIR gets its
results after every measurement (``<part>.json``, and ``.csv`` as in the history) and ``<part>.xml``, what
failed or was left out. Without a GPU it says what it skips and ends well.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from results import Report  # noqa: E402

SECONDS_PER_PART = 460
PARTS = {
    "smoke": "bench_ops.py bench_step.py -k fastsae --rounds 0 --shape 256,256,4096,16 --no-history",
    "tests": "tests -m gpu --continue-on-collection-errors",
    "kernels": "bench_ops.py --scale recipe --batches 1024 4096 16384",
    "step": "bench_step.py -k bench_step --scale recipe --batches 1024 4096 --steps-apart 4",
    "stream": "bench_stream.py",
}
"""Each part's arguments of pytest."""
REHEARSAL = "--device cpu --shape 64,64,512,8 --batches 64 --no-history"


def run(part: str, folder: Path, rehearse: bool, only: str | None) -> int:
    """The exit code of pytest; 124 where it ran out of time."""
    arguments = PARTS[part].split()
    if part != "tests":
        arguments += ["--out", f"{folder / part}.json"]
        arguments += [] if rehearse else ["--seconds", str(SECONDS_PER_PART)]
        # A plain pytest has no plugins: their options in pytest.ini would stop it.
        arguments += ["-c", "pytest.ini", "-o", "addopts=--import-mode=importlib"]
    if rehearse:
        arguments += [*REHEARSAL.split(), "--rounds", "0" if part == "smoke" else "1"]
    if only is not None:
        arguments += ["-k", only]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", f"--junitxml={folder / part}.xml"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    try:
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT if part == "tests" else ROOT / "benchmarks",
            env=environment,
            timeout=None if rehearse else SECONDS_PER_PART + 120,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped after {SECONDS_PER_PART + 120} s")
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="all but tests, tiny, on the CPU")
    parser.add_argument("-k", metavar="EXPRESSION", help="pytest's, in place of the part's own")
    options = parser.parse_args()
    codes, folder = {}, options.out.resolve()
    for part in PARTS if options.part == "all" else (options.part,):
        if part != "tests" if options.rehearse else torch.cuda.is_available():
            codes[part] = run(part, folder, options.rehearse, options.k)
        else:
            why = "not rehearsed" if options.rehearse else "no CUDA device"
            Report(folder / f"{part}.json").add(part=part, skipped=why)
            print(f"{part}: skipped ({why})")
    for part, code in codes.items():
        print(f"{part}: {'ended well' if code == 0 else f'failed (exit code {code})'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
