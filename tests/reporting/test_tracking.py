"""What a run tells: the same numbers everywhere, and nobody waits for the network."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import wandb_stand_in

import fastsae
from fastsae.reporting.background import Background
from fastsae.reporting.tracking import DENSITY_EDGES, read_metrics
from fastsae.reporting.weights_and_biases import WandbRun, wandb_mode
from fastsae.training.run import density_histogram

CONFIG = fastsae.TrainConfig(
    d_sae=32, k=2, batch_size=32, tokens=640, log_every_tokens=64, checkpoint_every_tokens=320,
    device="cpu", wandb="disabled",
)  # fmt: skip


def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=g) for _ in range(20)]


# --- metrics.jsonl ---


def test_metrics_hold_all_that_is_promised(tmp_path: Path) -> None:
    sae = fastsae.train(batches(), dataclasses.replace(CONFIG, out=str(tmp_path), name="run"))
    metrics = read_metrics(tmp_path / "run")
    promised = {
        "loss", "mse", "aux", "explained_variance", "l0", "alive_fraction", "dead", "threshold", "lr",
        "tokens_seen", "step", "tokens_per_second", "tokens_per_second_step", "decoder_norm_error",
        "density_histogram", "density_tokens",
    }  # fmt: skip
    assert len(metrics) == 10 and all(promised <= m.keys() for m in metrics)
    for m in metrics:
        assert m["density_tokens"] == 64 and 0 < sum(m["density_histogram"]) <= 32
        assert 0 < m["decoder_norm_error"] < 1e-6
        assert 0 < m["tokens_per_second"] <= m["tokens_per_second_step"]
    assert metrics[-1]["threshold"] == pytest.approx(float(sae.threshold))


def test_density_histogram_counts_latents() -> None:
    tokens = 100_000
    fired = torch.tensor([0, 1, 100_000, 17_782, 17_783, 100, 101, 0])
    counts = density_histogram(fired, tokens)
    assert len(counts) == len(DENSITY_EDGES) - 1 == 20 and sum(counts) == 6
    expected = [0] * 20
    expected[0] = 1  # 1e-5
    expected[8] = 2  # 1e-3 and a little more
    expected[16] = 1  # 10^-0.75 lies between 17,782 and 17,783
    expected[17] = 1
    expected[19] = 1  # every token
    assert counts == expected
    assert density_histogram(torch.tensor([1]), 10**7)[0] == 1  # below all edges


# --- in the background ---


def test_a_call_that_hangs_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    hanging, made = threading.Event(), []
    background = Background("the service", capacity=3, remedy="Do this")
    started = time.monotonic()
    background.submit(hanging.wait)
    time.sleep(0.05)
    for i in range(10):
        background.submit(lambda i=i: made.append(i))
    assert time.monotonic() - started < 1 and background.dropped == 7
    assert not background.close(0.2)
    assert "not finished within 0.2 s; 0 calls failed, 7 were dropped. Do this" in caplog.text
    hanging.set()
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]


def test_calls_that_fail_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    made = []

    def failing() -> None:
        raise ConnectionError("gone")

    with Background("the service") as background:
        for call in (failing, failing, lambda: made.append(1), failing):
            background.submit(call)
    assert made == [1] and background.failed == 3
    assert caplog.text.count("ConnectionError: gone") == 1 and "3 calls failed" in caplog.text


def test_no_thread_without_a_call() -> None:
    before = threading.active_count()
    with Background("the service", patience=1):
        assert threading.active_count() == before


# --- Weights & Biases ---


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", {}, "disabled"),
        ("auto", {"WANDB_API_KEY": "a" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "a" * 40}, "disabled"),
        ("offline", {}, "offline"),
        ("disabled", {"WANDB_API_KEY": "a" * 40}, "disabled"),
    ],
)
def test_what_auto_means(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, environment: dict, mode: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(dataclasses.replace(CONFIG, wandb=asked)) == mode
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    if not environment and asked == "auto":
        assert wandb_mode(CONFIG) == "disabled"
        assert wandb_mode(dataclasses.replace(CONFIG, wandb="auto")) == "online"


def test_a_service_out_of_reach_is_written_to_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modes = []
    run = types.SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda **_: None)
    client = types.SimpleNamespace(
        init=lambda mode, **_: modes.append(mode) or run, Settings=lambda **_: None
    )
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with Background("Weights & Biases") as background:
        tracked = WandbRun(tmp_path, CONFIG, "kept", "online", background)
        tracked.close(0)
    assert tracked.id == "kept" and modes == ["offline"]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-kept" in caplog.text


PROGRAM = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import fastsae, fastsae.training.trainer, test_tracking as t, dataclasses
    fastsae.training.trainer.WANDB_SECONDS = {patience}
    config = dataclasses.replace(t.CONFIG, k=(2, 4), out={out!r}, wandb="auto", tokens={tokens})
    def slowly():
        for batch in t.batches():
            time.sleep({pause})
            yield batch
    started = time.monotonic()
    fastsae.Trainer(config, slowly()).fit()
    print(time.monotonic() - started)
""")


def train(service: wandb_stand_in.Service, **values: object) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), **values)
    environment = os.environ | {"WANDB_BASE_URL": service.address, "WANDB_API_KEY": "a" * 40}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=-1, stderr=-1, text=True
    )


@pytest.mark.slow
def test_the_service_is_told_what_the_file_holds(tmp_path: Path) -> None:
    """Two SAEs side by side, stopped and resumed: two runs on the service, with every number."""
    with wandb_stand_in.service() as service:
        for tokens in (320, 640):
            process = train(service, out=str(tmp_path), tokens=tokens, pause=0, patience=60)
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    assert len(service.names) == 2
    for name, run_id in {name: run_id for run_id, name in service.names.items()}.items():
        told, written = service.history[run_id], read_metrics(tmp_path / name)
        assert len(told) == len(written) == 10
        for theirs, ours in zip(told, written, strict=True):
            histogram = theirs["log10_density"]
            assert histogram["values"] == ours.pop("density_histogram")
            assert histogram["bins"] == list(DENSITY_EDGES)
            for metric, value in ours.items():
                assert theirs[metric] == pytest.approx(value), metric


@pytest.mark.slow
def test_the_service_goes_away_during_the_run(tmp_path: Path) -> None:
    with wandb_stand_in.service() as service:
        process = train(service, out=str(tmp_path), tokens=640, pause=0.1, patience=2)
        deadline = time.monotonic() + 60
        while not service.names:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        service.down = True
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "not finished within 2 s" in errors and "`wandb sync` sends it" in errors
    assert float(printed.split()[-1]) < 30
    for run in tmp_path.iterdir():
        assert len(read_metrics(run)) == 10
        assert json.loads((run / "summary.json").read_text())["tokens_seen"] == 640
        assert fastsae.load(run).d_sae == 32


def test_a_broken_client_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    config = dataclasses.replace(CONFIG, out=str(tmp_path), name="run", wandb="offline")
    with caplog.at_level(logging.INFO):
        fastsae.train(batches(), config)
    assert "Weights & Biases: ModuleNotFoundError" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == 10
