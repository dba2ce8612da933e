"""The command as a wheel installs it: with tyro alone it helps and plans, with torch it trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import models
import pytest

pytestmark = pytest.mark.slow


def needed_by(name: str) -> set[str]:
    """``name`` and every distribution it needs, by names of pip."""
    found = {name}
    for line in distribution(name).requires or ():
        if "extra ==" not in line and "python_version <" not in line:
            found |= needed_by(re.split(r"[^\w.-]", line)[0])
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with tyro borrowed from the one the tests run in."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    python = folder / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed_by("tyro"):
        there = distribution(name)
        for top in {Path(file).parts[0] for file in there.files or () if ".." not in str(file)}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(there.locate_file(top))))
    return folder


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def test_there_is_no_torch(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "bin/python", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("command", ["", "train", "evaluate", "contrast", "compare", "plan"])
def test_help(environment: Path, tmp_path: Path, command: str) -> None:
    done = run(environment / "bin/fastsae", *command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: fastsae {command}".rstrip() in done.stdout


def test_as_a_module(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin/python"
    done = run(python, "-m", "fastsae", "plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "24,576 latents" in done.stdout
    wrong = run(python, "-m", "fastsae", "train", "--bach-size", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ") and "--batch-size" in wrong.stderr


def test_training(environment: Path, tmp_path: Path) -> None:
    """Last, for it adds all that the tests run with. What is on the path is the wheel still."""
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "everything.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "a.txt").write_text("Some words to read. \n\n" * 400)
    small = (
        "--model", models.llama(), "--text-files", "a.txt", "--layer", "2", "--quantization", "none",
        "--context-length", "32", "--d-sae", "128", "--k", "4", "--batch-size", "64", "--tokens", "640",
        "--eval-tokens", "256", "--pool-tokens", "512", "--wandb", "disabled", "--name", "small",
    )  # fmt: skip
    fastsae = environment / "bin/fastsae"
    done = run(fastsae, "train", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/small/sae_weights.safetensors").is_file()
    compared = run(fastsae, "compare", "runs", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "small" in compared.stdout and "finished" in compared.stdout
    where = "import fastsae, fastsae_kernels; print(fastsae.__file__, fastsae_kernels.__file__)"
    found = run(environment / "bin/python", "-c", where, cwd=tmp_path).stdout.split()
    assert all(Path(file).is_relative_to(packages) for file in found)
