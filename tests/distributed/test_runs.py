"""Whole runs of several processes, as ``torchrun`` starts them, on the demo's model."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import fastsae
from fastsae.training import checkpoint

ROOT = Path(__file__).parents[2]
RUN = (
    "--demo", "--tokens", "20000", "--batch-size", "250", "--d-sae", "301", "--k", "8", "--lanes", "4",
    "--latent-shards", "4", "--pool-tokens", "8192", "--eval-tokens", "2000", "--dead-after-tokens", "1000",
    "--latent-quota-until", "0.5", "--checkpoint-every-tokens", "2500", "--log-every-tokens", "2500",
    "--report", "none",
    "--wandb", "disabled", "--device", "cpu", "--name", "run",
)  # fmt: skip
"""250 rows in 4 lanes, 301 latents in 4 shards: neither divides. The quota is on for half of it, then latents die."""


def start(
    processes: int, out: Path, *flags: str, torchrun: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """``train.py`` with ``RUN`` and ``flags`` on so many processes; one is started without torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command += torchrun
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *RUN, "--out", str(out), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed; asserts its exit code."""
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
            variables = entry.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if parent == str(process.pid) and ranks:
            found[ranks[0]] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has a checkpoint of ``step`` or a later one."""
    deadline = time.monotonic() + 200
    while max(checkpoint.steps(out / "run/checkpoints"), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)


def digest(out: Path) -> str:
    """SHA-256 over all that a run has come to, apart from times: weights, moments, counters, the stream's
    state, metrics, and the SAE."""
    run = out / "run"
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    found = hashlib.sha256()
    for file in sorted(newest.glob("*.safetensors")):
        found.update(file.name.encode())
        found.update(file.read_bytes())
    meta = checkpoint.load_meta(newest)
    for name in ("tokens_seen", "steps", "stream", "stream_skip", "stream_ahead", "fired_tokens"):
        found.update(json.dumps(meta[name], sort_keys=True).encode())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found.update(json.dumps(untimed(json.loads(line))).encode())
    found.update((run / "sae_weights.safetensors").read_bytes())
    return found.hexdigest()


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if "second" not in name}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, without torchrun."""
    out = tmp_path_factory.mktemp("alone")
    finish(start(1, out))
    return out


def test_the_run_is_one_worth_comparing(alone: Path) -> None:
    """Latents are dead, so that aux-k is at work; the quota ends; the text's lanes differ."""
    metrics = [json.loads(line) for line in (alone / "run/metrics.jsonl").read_text().splitlines()]
    assert any(each["dead"] > 0 and each["aux"] > 0 for each in metrics)
    newest = checkpoint.newest(alone / "run/checkpoints")
    assert newest is not None
    names = {file.name for file in newest.iterdir()}
    assert {f"shard_0{i}.safetensors" for i in range(4)} < names
    shards = [load_file(newest / f"shard_0{i}.safetensors") for i in range(4)]
    assert [len(shard["W_dec"]) for shard in shards] == [75, 75, 75, 76]
    sae = fastsae.load(alone / "run")
    assert (sae.d_in, sae.d_sae) == (128, 301)


def test_four_processes_give_the_same_bits(alone: Path, tmp_path: Path) -> None:
    """Two and three: with what happens to them on the way, below."""
    output = finish(start(4, tmp_path))
    assert digest(tmp_path) == digest(alone)
    assert output.count("finished run:") == 1, "only the first process speaks"


@pytest.mark.slow
def test_killed_stopped_and_resumed_on_other_numbers(alone: Path, tmp_path: Path) -> None:
    """One of two is killed and torchrun starts both again; four are stopped; one is killed; three end it."""
    process = start(2, tmp_path, torchrun=("--max-restarts", "2"))
    wait_for_step(tmp_path, 20, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    wait_for_step(tmp_path, 40, process)  # it went on
    process.send_signal(signal.SIGTERM)
    finish(process, 1)

    process = start(4, tmp_path)
    wait_for_step(tmp_path, 50, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 1)
    assert output.count("everything is saved in") == 1
    stopped = checkpoint.steps(tmp_path / "run/checkpoints")[-1]

    process = start(1, tmp_path)
    wait_for_step(tmp_path, min(stopped + 10, 70), process)
    process.kill()
    process.communicate()

    finish(start(3, tmp_path))
    assert digest(tmp_path) == digest(alone)
