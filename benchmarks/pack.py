"""A folder for a machine with a GPU and without a registry: wheels, and kernels compiled for it.

    python benchmarks/pack.py FOLDER --packages tyro docstring-parser --mib 64
    python benchmarks/pack.py FOLDER --ways     with all that the part `variants` launches; takes minutes

Run it in the Python, with the torch and the Triton, that the machine has (``--python`` names another one):
Triton finds what the very same Triton compiled for the very same Python. The folder says how it is used.
Wheels that do not fit are left out, the largest first, and named.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1536  # of the kernels that are compiled
AT = Path("/tmp/fastsae-triton")
"""Where the compiled kernels will be on the machine: Triton keeps whole paths."""
KEPT = (".cubin", ".json")  # what a launch reads of them
PLATFORM = "manylinux_2_28_x86_64"
COMMANDS = f"""\
cp -r triton {AT}
pip install --no-index --no-deps --find-links wheels {{names}}
TRITON_CACHE_DIR={AT} python benchmarks/gpu.py --part smoke --out results
"""


def compile_kernels(width: int = WIDTH, ways: bool = False) -> None:
    """Launch the kernels of a step, and all those of ``kernels/aot``, at one width, as Triton does it for sm_90:
    they are compiled into its cache, and run nothing. A step's in other ways too, if asked. In a process of its own."""
    import gpu_model  # first: it says where the others are
    import gpu_step
    from measure import Shape
    from triton import JITFunction

    import cases  # isort: skip

    class Compiler(gpu_model.Sampler):
        def launch(self, function, *_) -> None:
            self.last = gpu_model.Launch(function.name)

    @contextmanager
    def launched(*_):
        yield

    compiler = Compiler()
    compiler.install(assemble=True)
    launch = JITFunction.run

    def run(kernel, *arguments, **options):
        compiled = launch(kernel, *arguments, **options)
        if ways and gpu_step.repeatable(options):
            for way in gpu_step.ways(compiled, options):
                with suppress(Exception):  # what does not compile is no way there, either
                    launch(kernel, *arguments, **options | way)
        return compiled

    # Sizes are multiples of 16, as a training's: to the compiler they are the same.
    with mock.patch.object(JITFunction, "run", run):
        for _ in gpu_model.steps(Shape(64, width, 512, 16), compiler):
            pass
    cases.WIDTHS, cases._Cases.record = (width,), launched
    cases.all_cases()


def strip(cache: Path, at: Path = AT) -> int:
    """Leave of each kernel in ``cache`` what a launch reads, with the paths that it will have below ``at``;
    returns how many there are."""
    for file in cache.rglob("*.*"):
        if file.suffix not in KEPT:
            file.unlink()
    groups = [*cache.glob("*/__grp__*.json")]
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        paths = {n: str(at / group.parent.name / n) for n in names if (group.parent / n).exists()}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)


def run(*command: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env=own | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def fetch_wheels(folder: Path, python: str, packages: list[str]) -> None:
    """Our own wheel, and those of ``packages``, without what they depend on."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    if packages:
        version = run(python, "-c", "import platform; print(platform.python_version())").strip()
        where = ("--python-version", version, "--platform", PLATFORM, "--only-binary", ":all:")
        run(*pip, "download", "-q", "--no-deps", *where, "-d", str(folder), *packages)


def fit(folder: Path, most: int) -> list[str]:
    """Remove the largest wheels until ``folder`` has at most ``most`` bytes; returns their names.

    Raises ValueError where the kernels alone have more.
    """
    size = lambda: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    wheels = sorted((folder / "wheels").glob("*.whl"), key=lambda wheel: wheel.stat().st_size)
    left_out = []
    while size() > most:
        if not wheels:
            raise ValueError(f"{folder}: {size():,} bytes without any wheel, more than {most:,}")
        left_out.append(wheels[-1].name)
        wheels.pop().unlink()
    return left_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made anew")
    parser.add_argument("--packages", nargs="*", default=[], help="those that the machine lacks")
    parser.add_argument("--python", default=sys.executable, help="the machine's own [this one]")
    parser.add_argument("--ways", action="store_true", help="kernels in other ways too")
    parser.add_argument("--mib", type=float, default=64, help="size of the folder at most [64]")
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    fetch_wheels(folder / "wheels", options.python, options.packages)
    code = "import sys; sys.path.insert(0, 'benchmarks'); import pack; "
    code += f"pack.compile_kernels(ways={options.ways})"
    run(options.python, "-c", code, TRITON_CACHE_DIR=str(folder / "triton"))
    count = strip(folder / "triton")
    left_out = fit(folder, int(options.mib * 2**20))
    names = [wheel.name.split("-")[0] for wheel in sorted((folder / "wheels").glob("*.whl"))]
    versions = "import platform, torch, triton; print(platform.python_version(), torch.__version__, triton.__version__)"
    python, torch, triton = run(options.python, "-c", versions).split()
    lines = [f"{count} kernels for sm_90, of Python {python}, torch {torch}, Triton {triton}."]
    lines += [f"Left out, too large: {', '.join(left_out)}."] * bool(left_out)
    text = "\n".join([*lines, "", COMMANDS.format(names=" ".join(names))])
    (folder / "README").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
