"""Real processes on the demo's model, killed and given the same command again: the same bits."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch

from fastsae.reporting.tracking import read_metrics
from fastsae.training import checkpoint

ROOT = Path(__file__).parents[2]
TOKENS = 40_000
FLAGS = (
    "--demo", "--d-sae", "256", "--k", "8", "--batch-size", "256", "--tokens", str(TOKENS),
    "--pool-tokens", "8192", "--eval-tokens", "2048", "--dead-after-tokens", "5000",
    "--log-every-tokens", "1280", "--checkpoint-every-tokens", "2560", "--device", "cpu",
    "--wandb", "disabled",
)  # fmt: skip


def start(
    out: Path, name: str, *flags: str, base: tuple[str, ...] = FLAGS
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *base,
        "--out",
        str(out),
        "--name",
        name,
        *flags,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=out)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run to end well; returns what it printed."""
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], after: int = 0) -> None:
    deadline = time.monotonic() + 120
    while not any(step > after for step in checkpoint.steps(run / "checkpoints")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.005)


def newest_step(run: Path) -> int:
    return (checkpoint.steps(run / "checkpoints") or [0])[-1]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, counters, threshold, stream position and metrics, bit for bit."""
    one, two = (checkpoint.load(checkpoint.newest(run / "checkpoints")) for run in (a, b))
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.equal(two.tensors[name]), name
    for field in ("steps", "tokens_seen", "stream", "stream_skip"):
        assert one.meta[field] == two.meta[field], field
    for file in ("sae_weights.safetensors", "sae_weights.pt", "cfg.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    timeless = [
        [{name: v for name, v in m.items() if "second" not in name} for m in read_metrics(run)]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) > 20
    scores = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    for name in ("explained_variance", "pca_explained_variance", "l0", "alive_fraction"):
        assert scores[0][name] == scores[1][name]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    printed = finish(start(out, "run"))
    assert "explained variance" in printed and "Traceback" not in printed
    return out / "run"


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "everything is saved" in printed and "same command again" in printed
    assert "Traceback" not in printed
    saved = checkpoint.load(checkpoint.newest(tmp_path / "run/checkpoints"))
    assert 0 < saved.meta["tokens_seen"] < TOKENS
    printed = finish(start(tmp_path, "run"))
    assert f"resumed at {saved.meta['tokens_seen']:,} tokens" in printed
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_sigint_is_the_same(tmp_path: Path) -> None:
    process = start(tmp_path, "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "same command again" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_sigkill_at_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    """Killed three times, between and during checkpoint writes; every time it goes on."""
    moments = random.Random()  # other moments in every run of the suite
    run = tmp_path / "run"
    for _ in range(3):
        process = start(tmp_path, "run")
        wait_for_checkpoint(run, process, after=newest_step(run))
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if newest_step(run) * 256 >= TOKENS:
            break
    finish(start(tmp_path, "run"))
    assert_same_run(uninterrupted, run)


@pytest.mark.slow
def test_sigkill_inside_a_write(uninterrupted: Path, tmp_path: Path) -> None:
    """Killed at the moment a half-written checkpoint is seen beside the whole ones."""
    run = tmp_path / "run"
    process = start(tmp_path, "run")
    wait_for_checkpoint(run, process)
    deadline = time.monotonic() + 60
    while not list((run / "checkpoints").glob(".step_*.partial")):
        assert process.poll() is None and time.monotonic() < deadline, "no write was caught"
    process.kill()
    process.communicate()
    printed = finish(start(tmp_path, "run"))
    assert "resumed at" in printed
    assert_same_run(uninterrupted, run)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_gemma_4_in_nf4_is_killed_and_goes_on(tmp_path: Path) -> None:
    """The recipe's command on a small multimodal Gemma 4 of 20 layers, on local text."""
    text = tmp_path / "prose.jsonl"
    lines = (
        {"text": f"Line {i} of a text, in which {i * i} words differ. " * 3} for i in range(400)
    )
    text.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model = models.gemma4_multimodal(20, 10)
    recipe = ("--model", model, "--text-files", str(text), "--layer", "17", "--k", "64")
    small = (
        "--expansion", "4", "--context-length", "64", "--harvest-batch", "4", "--batch-size", "64",
        "--tokens", "2816", "--pool-tokens", "512", "--eval-tokens", "128", "--device", "cpu",
        "--log-every-tokens", "128", "--checkpoint-every-tokens", "512", "--wandb", "disabled",
    )  # fmt: skip
    base = (*recipe, *small)
    printed = finish(start(tmp_path, "whole", base=base))
    assert "first 18 of 20 layers, nf4" in printed
    process = start(tmp_path, "killed", base=base)
    wait_for_checkpoint(tmp_path / "killed", process)
    process.kill()
    process.communicate()
    assert 0 < newest_step(tmp_path / "killed") < 44
    printed = finish(start(tmp_path, "killed", base=base))
    assert "resumed at" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    config = json.loads((tmp_path / "whole" / "cfg.json").read_text())
    assert config["metadata"]["hf_hook_name"] == "model.language_model.layers.17"


@pytest.mark.slow
def test_more_tokens_continue_a_finished_run(tmp_path: Path) -> None:
    """With the same bits, where nothing follows the length of the run."""
    constant = (
        "--lr", "1e-3", "--lr-warmup-tokens", "0", "--lr-decay-tokens", "0", "--latent-quota", "0",
    )  # fmt: skip
    finish(start(tmp_path, "whole", *constant))
    finish(start(tmp_path, "run", *constant, "--tokens", str(TOKENS // 2)))
    printed = finish(start(tmp_path, "run", *constant))
    assert f"resumed at {-(-TOKENS // 2 // 256) * 256:,} tokens" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_changed_setting_is_refused(tmp_path: Path) -> None:
    finish(start(tmp_path, "run", "--tokens", "2560"))
    before = torch.load(tmp_path / "run/sae_weights.pt", weights_only=True)
    process = start(tmp_path, "run", "--lr", "0.1")
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in printed
    assert "lr: " in printed and "0.1 now" in printed
    after = torch.load(tmp_path / "run/sae_weights.pt", weights_only=True)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
