"""Everything that needs a GPU, a part a command.

    python benchmarks/gpu.py --part smoke|step|profile|kernels|skewed|variants|tests|stream --out DIR

``smoke`` first; the others in this order, as long as there is time. Runs from the tree without an install, on torch, triton, numpy and pytest (``stream`` needs transformers
and, for NF4, bitsandbytes too, a peer's step its package). ``smoke`` checks every operation and each of our
ways to step, in a minute; ``profile`` looks inside a step; ``skewed`` has selections unlike random ones, and
aux-k; ``variants`` launches a step's kernels in other ways. A part is a run of pytest of at most 8 minutes, which begins nothing in the last;
DIR gets its results after every measurement (``<part>.json``, and ``.csv`` as in the history), and what
became of each test as it ends (``<part>.jsonl``). Without a GPU it says what it skips and ends well.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from results import Report  # noqa: E402

SECONDS_PER_PART, GRACE = 410, 60
GPU_TESTS = (
    "data/test_buffer", "ops/test_aux_k", "ops/test_batch_topk", "ops/test_decoder_norm",
    "ops/test_dispatch", "ops/test_encode_topk", "ops/test_encoder", "ops/test_fused_update",
    "ops/test_sharded_topk", "ops/test_sparse_decoder", "ops/test_step", "ops/test_topk",
    "training/test_sharded", "training/test_update",
)  # fmt: skip
"""The files with tests that need a GPU: others import what such a machine may lack."""
PARTS = {
    "smoke": "bench_ops.py bench_step.py -k fastsae --rounds 0 --shape 256,256,4096,16 --no-history",
    "step": "bench_step.py -k bench_step --scale recipe --batches 1024 4096 --steps-apart 4",
    "profile": "bench_gpu.py --scale recipe --deselect bench_gpu.py::bench_variants",
    "kernels": "bench_ops.py --scale recipe --batches 1024 4096 16384 -k 'not (skewed or dead)'",
    "skewed": "bench_ops.py --scale recipe -k 'skewed or dead'",
    "variants": "bench_gpu.py::bench_variants --scale recipe",
    "tests": " ".join(["-m gpu", *(f"tests/{name}.py" for name in GPU_TESTS)]),
    "stream": "bench_stream.py",
}
"""Each part's arguments of pytest, the part worth most first."""
REHEARSAL = "--device cpu --shape 64,64,512,8 --batches 64 --no-history"


def run(part: str, folder: Path, rehearse: bool, only: str | None) -> int:
    """The exit code of pytest; 124 where it ran out of time."""
    arguments = shlex.split(PARTS[part])
    if part != "tests":
        arguments += ["--out", f"{folder / part}.json"]
        arguments += [] if rehearse else ["--seconds", str(SECONDS_PER_PART)]
        # A plain pytest has no plugins: their options in pytest.ini would stop it.
        arguments += ["-c", "pytest.ini", "-o", "addopts=--import-mode=importlib"]
    elif importlib.util.find_spec("xdist"):
        arguments += ["-n", "12", "--dist", "worksteal", "-p", "no:benchmark"]
    if rehearse:
        arguments += [*REHEARSAL.split(), "--rounds", "0" if part == "smoke" else "1"]
    if only is not None:
        arguments += ["-k", only]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "results_by_line"]
    command += ["--lines", f"{folder / part}.jsonl"]
    # Options of plugins that are not there are no error.
    command += ["-W", "default::pytest.PytestConfigWarning"]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    try:
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT if part == "tests" else ROOT / "benchmarks",
            env=environment,
            timeout=None if rehearse else SECONDS_PER_PART + GRACE,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped after {SECONDS_PER_PART + GRACE} s")
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="all but tests, tiny, on the CPU")
    parser.add_argument("-k", metavar="EXPRESSION", help="pytest's, in place of the part's own")
    options = parser.parse_args()
    part, folder = options.part, options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if part == "tests" if options.rehearse else not torch.cuda.is_available():
        why = "not rehearsed" if options.rehearse else "no CUDA device"
        Report(folder / f"{part}.json").add(part=part, skipped=why)
        print(f"{part}: skipped ({why})")
        return 0
    code = run(part, folder, options.rehearse, options.k)
    print(f"{part}: {'ended well' if code == 0 else f'failed (exit code {code})'}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
