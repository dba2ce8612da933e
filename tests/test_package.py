"""The package as a thing to install: what it is made of, what importing it costs."""

import statistics
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import fastsae

ROOT = Path(__file__).parents[1]


def test_the_repository_does_not_shadow_hugging_faces_kernels() -> None:
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is None or spec.origin is None, (
        "kernels/__init__.py shadows Hugging Face's `kernels`"
    )


def test_the_wheel_holds_two_packages(wheel: Path) -> None:
    assert wheel.name.startswith("fastsae_triton-")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fastsae", "fastsae_kernels"}
    assert {"fastsae/py.typed", "fastsae_kernels/py.typed", "fastsae/stream/__init__.py"} <= set(
        names
    )


def test_every_public_name_is_there_and_unknown_ones_are_not() -> None:
    for name in fastsae.__all__:
        assert getattr(fastsae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BatchTopk'"):
        _ = fastsae.BatchTopk


def test_import_adds_little_to_importing_torch() -> None:
    """Under 0.2 s beyond torch; the median of three fresh processes. Names are imported on first use."""

    def seconds() -> float:
        code = (
            "import torch, time; t = time.perf_counter(); import fastsae; from fastsae import TrainConfig;"
            "print(time.perf_counter() - t)"
        )
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    assert statistics.median(seconds() for _ in range(3)) < 0.2


def test_the_configuration_needs_the_standard_library_alone() -> None:
    code = "import sys; import fastsae.config; print(sorted(m for m in ('torch', 'numpy', 'tyro') if m in sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("below", "above"), [("fastsae_kernels", "fastsae"), ("fastsae", "benchmarks")]
)
def test_dependencies_point_one_way(below: str, above: str) -> None:
    folder = ROOT / ("kernels/fastsae_kernels" if below == "fastsae_kernels" else below)
    for path in folder.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] != above, f"{path}: {line}"
