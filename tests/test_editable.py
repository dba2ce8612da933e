"""The folder ``kernels/`` of the repository is not taken for Hugging Face's package of that name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(python: Path | str, code: str, cwd: Path, path: str = "") -> str:
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_editable_install_has_two_packages(tmp_path: Path) -> None:
    """In a fresh virtual environment, built by the hatchling of this one: nothing is downloaded."""
    pytest.importorskip("hatchling")
    editables = pytest.importorskip("editables")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
            "--no-index", "--no-build-isolation", "-e", str(ROOT),
        ],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "editables").symlink_to(Path(str(editables.__file__)).parent)
    code = (
        "import importlib.util as u; import fastsae; "
        "print(fastsae.__file__, u.find_spec('fastsae_kernels').origin, u.find_spec('kernels'))"
    )
    found = [str(ROOT / "fastsae/__init__.py"), str(ROOT / "kernels/fastsae_kernels/__init__.py")]
    assert run(python, code, tmp_path).split() == [*found, "None"]


BITSANDBYTES = """
try:
    from kernels import get_kernel
except ImportError as error:
    print(type(error).__name__, error.name)
else:
    print("found", get_kernel)
"""


@pytest.mark.parametrize(
    "where", ["root", *(pytest.param(w, marks=pytest.mark.slow) for w in ("installed", "nowhere"))]
)
@pytest.mark.slow
def test_bitsandbytes_does_not_find_the_folder(tmp_path: Path, where: str) -> None:
    """As it looks for the package when it is imported, also where a program runs in the repository."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text(BITSANDBYTES)
    if where == "installed":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text("get_kernel = 'the real one'")
    code = (
        "import torch; from fastsae.lm.loading import _nf4_config as config; "
        "config(torch.bfloat16); import sys; print('kernels' in sys.modules)"
    )
    path = [str(tmp_path), str(ROOT / "kernels"), *([str(ROOT)] if where != "nowhere" else [])]
    importlib.invalidate_caches()
    if where == "nowhere":
        (tmp_path / "fastsae").symlink_to(ROOT / "fastsae")
    said = run(sys.executable, code, tmp_path, os.pathsep.join(path)).split("\n")
    if where == "installed":
        assert said[:2] == ["found the real one", "True"]
    else:
        assert said[:2] == ["ModuleNotFoundError kernels", "False"]
