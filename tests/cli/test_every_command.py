"""What holds for every command: its help is instant, and what is wrong is said in one line."""

from __future__ import annotations

import errno
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import fastsae
from fastsae.cli import main
from fastsae.cli.command import COMMANDS
from fastsae.cli.evaluate import EvaluateOptions
from fastsae.sae.activation import Inference

HELP_SECONDS = 0.5
LIGHT = {"fastsae", "tyro", "docstring_parser", "typeguard", "typing_extensions"}
"""Beside the standard library: tyro, and what it needs."""


def process_seconds(*arguments: str) -> float:
    """Processor time of a fresh process: its duration on an idle machine, and no other on a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_instant(command: tuple[str, ...]) -> None:
    times = [process_seconds("fastsae", *command, "--help") for _ in range(3)]
    assert statistics.median(times) < HELP_SECONDS


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_imports_next_to_nothing(command: tuple[str, ...]) -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from fastsae.cli import main\n"
        "try: main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('loaded', *sorted(loaded - sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    said, _, loaded = done.stdout.rpartition("loaded")
    assert set(loaded.split()) <= LIGHT
    assert f"usage: fastsae {' '.join(command)}".rstrip() in said
    assert all(name in said for name in ([] if command else COMMANDS))


WRONG = {
    "no such command": (["trian"], ["'trian' is not a command", "train, evaluate, contrast"]),
    "no such flag": (["plan", "--d-sea", "3"], ["--d-sea", "--d-sae", "fastsae plan --help"]),
    "a flag of another command": (["compare", "runs", "--tokens", "3"], ["--tokens"]),
    "no value": (["plan", "--k"], ["--k", "fastsae plan --help"]),
    "not a number": (["plan", "--k", "many"], ["--k", "many"]),
    "not a choice": (["evaluate", "SAE", "--modes", "tok"], ["tok", "topk", "threshold", "batch"]),
    "no runs": (["compare"], ["give folders of runs"]),
    "no SAE": (["evaluate"], ["SAE", "fastsae evaluate --help"]),
    "no such SAE": (["evaluate", "nowhere"], ["nowhere does not exist"]),
    "a file for an SAE": (["evaluate", __file__], ["is a file"]),
    "a folder without an SAE": (["evaluate", "."], ["holds no SAE"]),
    "no such folder of runs": (["compare", "nowhere"], ["nowhere does not exist"]),
    "a file for a run": (["compare", __file__], ["is not a run"]),
    "a file for the output": (["evaluate", "nowhere", "--out", __file__], [f"{__file__} is a file"]),
    "a file above the output": (
        ["contrast", "nowhere", "--positive", "a", "--negative", "b", "--out", f"{__file__}/x/y"],
        ["cannot write to", "is a file", "--out"],
    ),
    "nowhere to export to": (["export", "nowhere"], ["give a folder with --neuronpedia"]),
    "no tokens": (["evaluate", "nowhere", "--tokens", "0"], ["tokens must be at least 1, got 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[case]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "contrast"])
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The administrator may write everywhere, so the system's answer is put in its place.
    def refuse(path: Path) -> None:
        assert path.parent == tmp_path
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    texts = ["--positive", "a", "--negative", "b"] if command == "contrast" else []
    for where in ([str(tmp_path)], ["nowhere", "--out", str(tmp_path / "new")]):
        assert main([command, *where, *texts]) == 2
        said = f"Permission denied in {tmp_path}. Choose another folder with --out"
        assert said in capsys.readouterr().err


def test_codes_of_what_ends_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in (
        (fastsae.StreamError("the text ended"), 2),
        (fastsae.errors.Interrupted("stopped; go on with ...", 15), 143),
        (KeyboardInterrupt(), 130),
    ):
        monkeypatch.setattr("fastsae.cli.plan.main", lambda *_, error=error: raise_(error))
        assert main(["plan"]) == code
        assert str(error) in capsys.readouterr().err


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("--version",)])
def test_whoever_reads_may_stop_reading(arguments: tuple[str, ...]) -> None:
    """As in ``fastsae train --help | head -1``."""
    command = [sys.executable, "-m", "fastsae", *arguments]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")  # 128 + SIGPIPE


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert fastsae.__version__ in capsys.readouterr().out


def test_the_modes_to_choose_from_are_those_there_are() -> None:
    modes, _ = get_args(get_type_hints(EvaluateOptions)["modes"])
    assert get_args(modes) == get_args(Inference)
