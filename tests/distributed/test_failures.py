"""What can go wrong between processes: one message, the right exit codes, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastsae.training import checkpoint
from tests.distributed.test_runs import ROOT, RUN, finish, start, wait_for_step, workers
from tests.processes import free_port

IMPATIENT = """
import datetime, sys
from fastsae import team
from fastsae.cli.command import main
team.join(datetime.timedelta(seconds=8))
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""The command with little patience."""


def by_hand(
    commands: Sequence[Sequence[str]],
    places: Sequence[Path],
    program: Sequence[str] = (str(ROOT / "train.py"),),
) -> list[tuple[int, str]]:
    """Exit code and output of a process for each command, started as a scheduler would, without torchrun."""
    port = free_port()
    processes = []
    for rank, (flags, place) in enumerate(zip(commands, places, strict=True)):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *RUN, *flags],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place, env=environment,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(each.returncode, output) for each, output in zip(processes, outputs, strict=True)]


def only_message(found: list[tuple[int, str]]) -> str:
    """The one error that was said; asserts that there is one, and that nobody failed in another way."""
    everything = "".join(output for _, output in found)
    assert everything.count("error: ") == 1, everything
    assert "Traceback" not in everything and "terminate" not in everything, everything
    return everything[everything.index("error: ") :]


def test_more_processes_than_lanes(tmp_path: Path) -> None:
    found = by_hand(
        [["--out", str(tmp_path), "--lanes", "1", "--latent-shards", "1"]] * 2, [tmp_path] * 2
    )
    assert [code for code, _ in found] == [2, 2]
    assert "this run has 1 lanes, and there are 2 processes" in only_message(found)


@pytest.mark.parametrize(
    ("other", "said"),
    [(["--lr", "1e-3"], "lr = 0.001, not None"), (["--k", "8", "4"], "runs = ['run-L2-")],
)
def test_processes_started_differently(tmp_path: Path, other: list[str], said: str) -> None:
    flags = ["--out", str(tmp_path)]
    found = by_hand([flags, [*flags, *other]], [tmp_path] * 2)
    assert [code for code, _ in found] == [2, 2]
    message = only_message(found)
    assert "process 1 of 2" in message and said in message


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    found = by_hand([["--out", "runs"]] * 2, places)
    assert [code for code, _ in found] == [2, 2]
    assert "process 1 of 2 does not see what process 0 writes to runs" in only_message(found)


def test_a_setting_that_nobody_can_train_with(tmp_path: Path) -> None:
    """All processes find it before they know of each other."""
    found = by_hand([["--out", str(tmp_path), "--k", "-1"]] * 2, [tmp_path] * 2)
    assert [code for code, _ in found] == [2, 2]
    assert "k must be" in only_message(found)


def test_bad_text_of_one_process(tmp_path: Path) -> None:
    """A record in lane 1 of 2 that holds no text: the process that reads it says so, the other one ends."""
    text = tmp_path / "text.jsonl"
    good = json.dumps({"text": "One small step after another, and a few words more. " * 4})
    text.write_text("\n".join([good] * 100 + ['{"text": 7}'] + [good] * 700))
    flags = [
        "--text-files", str(text), "--lanes", "2", "--latent-shards", "2",
    ]  # fmt: skip
    output = finish(start(2, tmp_path / "runs", *flags), 1)
    ours = output.split("torch/distributed/elastic")[0]  # torchrun then has a report of its own
    assert "line 101" in only_message([(1, ours)])
    assert "exitcode  : 2" in output.replace("exitcode : ", "exitcode  : ")


THREADS = """
import os, sys
from fastsae.cli import main

code = main(["train", *sys.argv[1:]])
import torch._dynamo  # whoever compiles imports it, and with it what may hold on to the group
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print("left behind:", [name for name in names if "gloo" in name])
raise SystemExit(code)
"""


def test_no_thread_of_the_communication_is_left(tmp_path: Path) -> None:
    """At the end of a process such a thread may find the interpreter gone, and abort."""
    flags = ["--out", str(tmp_path), "--tokens", "2000"]
    found = by_hand([flags, flags], [tmp_path] * 2, ["-c", THREADS])
    assert [code for code, _ in found] == [0, 0], found
    assert all("left behind: []" in output for _, output in found), found


def test_text_that_ends(tmp_path: Path) -> None:
    """All is saved at the same step, and one says so."""
    text = tmp_path / "text.jsonl"
    words = "Nine dull words make up the whole of it. "
    lines = [json.dumps({"text": words * (20 + 7 * i % 13)}) for i in range(90)]
    text.write_text("\n".join(lines))
    flags = [
        "--text-files", str(text), "--lanes", "2", "--latent-shards", "2", "--out", str(tmp_path / "runs"),
    ]  # fmt: skip
    found = by_hand([flags, flags], [tmp_path] * 2)
    message = only_message(found)
    assert [code for code, _ in found] == [2, 2]
    assert "the text ended after" in message and "Everything is saved" in message
    assert "of 2" in message, "which lane ended is told"
    newest = checkpoint.newest(tmp_path / "runs/run/checkpoints")
    assert newest is not None
    seen = checkpoint.load_meta(newest)["tokens_seen"]
    assert f"{seen:,} activations" in message


def test_a_signal_to_one_process(tmp_path: Path) -> None:
    """All of them save and stop, with the signal's exit code."""
    process = start(2, tmp_path)
    wait_for_step(tmp_path, 20, process)
    one, two = workers(process)
    os.kill(two, signal.SIGTERM)
    output = finish(process, 1)
    assert output.count("everything is saved in") == 1
    assert "exitcode  : 143" in output.replace("exitcode : ", "exitcode  : ")
    assert not any(Path(f"/proc/{pid}").exists() for pid in (one, two))


@pytest.mark.slow
def test_a_signal_to_all_that_is_passed_on_to_them_too(tmp_path: Path) -> None:
    """As a scheduler gives it: to the processes and to torchrun, which passes it on."""
    process = start(2, tmp_path)
    wait_for_step(tmp_path, 20, process)
    for pid in (*workers(process), process.pid):
        os.kill(pid, signal.SIGTERM)
    output = finish(process, 1)
    assert output.count("everything is saved in") == 1, output


@pytest.mark.slow
def test_a_process_that_hangs(tmp_path: Path) -> None:
    """The others give up after their patience, with exit code 3."""
    program = tmp_path / "impatient.py"
    program.write_text(IMPATIENT)
    port = free_port()
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, str(program), *RUN, "--out", str(tmp_path / "runs")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_step(tmp_path / "runs", 20, both[0])
    both[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output = both[0].communicate(timeout=60)[0]
    assert both[0].returncode == 3 and output.count("error: another process") == 1, output
    assert time.monotonic() - began < 40
    both[1].kill()
    both[1].communicate()
