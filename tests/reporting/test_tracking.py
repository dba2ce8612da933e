"""What a run tells: the same numbers everywhere, and nobody waits for the network."""

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import wandb_stand_in

import fastsae
from fastsae.metrics import DENSITY_EDGES
from fastsae.reporting import weights_and_biases
from fastsae.reporting.tracking import (
    Tracker,
    read_metrics,
    warn_of_baseline,
    warn_of_idle_latents,
)
from fastsae.reporting.weights_and_biases import WandbRun, wandb_mode

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
        "objective", "error", "aux", "mse", "explained_variance", "l0", "alive_fraction", "dead", "threshold", "lr",
        "tokens_seen", "step", "tokens_per_second", "tokens_per_second_step", "decoder_norm_error",
        "density_histogram", "density_tokens",
    }  # fmt: skip
    assert len(metrics) == 10 and all(promised <= m.keys() for m in metrics)
    for m in metrics:
        assert m["density_tokens"] == 64 and 0 < sum(m["density_histogram"]) <= 32
        assert 0 < m["decoder_norm_error"] < 1e-6
        assert 0 < m["tokens_per_second"] <= m["tokens_per_second_step"]
    assert metrics[-1]["threshold"] == pytest.approx(float(sae.threshold))


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with Tracker(tmp_path, CONFIG, 0) as tracker:
        tracker.log(
            {"tokens_seen": 1, "explained_variance": float("nan"), "bounds": (-math.inf, 1.0)}
        )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = {"tokens_seen": 1, "explained_variance": None, "bounds": [None, 1.0]}
    assert json.loads(line, parse_constant=refuse) == written == read_metrics(tmp_path)[0]


# --- in the background ---


class Client:
    """In the place of wandb: one run, which keeps what is logged and does what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resumed: bool = False) -> None:
        self.modes: list[str] = []
        self.logged: list[dict] = []
        self.resumed, self.summary = resumed, {}
        self.connecting = self.logging = self.finishing = lambda: None
        monkeypatch.setitem(sys.modules, "wandb", self)
        monkeypatch.setattr(weights_and_biases, "_unreachable", lambda: None)

    def Settings(self, **_: object) -> None: ...

    def Histogram(self, np_histogram: object) -> object:
        return np_histogram

    def init(self, *, mode: str, **_: object) -> "Client":
        self.modes.append(mode)
        self.connecting()
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, metrics: dict) -> None:
        self.logging()
        self.logged.append(metrics)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.finishing()


@pytest.mark.parametrize("hanging", ["connecting", "finishing"])
def test_a_call_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, hanging: str
) -> None:
    client, released = Client(monkeypatch), threading.Event()
    setattr(client, hanging, released.wait)
    monkeypatch.setattr(weights_and_biases, "PATIENCE_SECONDS", 0.2)
    started = time.monotonic()
    run = WandbRun(tmp_path, CONFIG, "kept", "online")
    for i in range(10):
        run.log({"tokens_seen": i})
    assert time.monotonic() - started < 1
    run.close({}, failed=False)
    assert time.monotonic() - started < 1
    assert "not finished within 0.2 s; 0 calls failed" in caplog.text
    assert f"wandb sync {tmp_path}/wandb/*run-*-kept" in caplog.text
    # Other runs of the program do not wait in vain as long.
    monkeypatch.setattr(weights_and_biases, "HURRIED_SECONDS", 0.1)
    other = WandbRun(tmp_path, CONFIG, "other", "online")
    other.close({}, failed=False)
    assert "not finished within 0.1 s" in caplog.text
    released.set()
    for late in (run, other):
        late._thread.join()
    WandbRun(tmp_path, CONFIG, "third", "online").close({}, failed=False)
    assert caplog.text.count("not finished") == 2


def test_what_is_logged_while_connecting_comes_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, released = Client(monkeypatch), threading.Event()
    client.connecting = released.wait
    run = WandbRun(tmp_path, CONFIG, None, "online")
    for i in range(5):
        run.log({"tokens_seen": i})
    assert not client.logged
    released.set()
    run.close({"l0": 2.0}, failed=True)
    assert client.logged == [{"tokens_seen": i} for i in range(5)]
    assert client.summary == {"l0": 2.0} and client.exit_code == 1


def test_calls_that_fail_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, failing = Client(monkeypatch), iter([True, True, False, True])

    def fail_or_not() -> None:
        if next(failing):
            raise ConnectionError("gone")

    client.logging = fail_or_not
    run = WandbRun(tmp_path, CONFIG, None, "online")
    for i in range(4):
        run.log({"tokens_seen": i})
    run.close({}, failed=False)
    assert client.logged == [{"tokens_seen": 2}]
    assert caplog.text.count("ConnectionError: gone") == 1 and "3 calls failed" in caplog.text


def test_no_thread_without_a_service(tmp_path: Path) -> None:
    before = threading.active_count()
    with Tracker(tmp_path, CONFIG, 0) as tracker:
        assert threading.active_count() == before and tracker.wandb_id is None


@pytest.mark.parametrize("resumed", [True, False])
def test_lines_that_the_service_does_not_have_are_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed: bool
) -> None:
    client = Client(monkeypatch, resumed)
    config = dataclasses.replace(CONFIG, wandb="offline")
    with Tracker(tmp_path, CONFIG, 0) as tracker:
        for i in range(3):
            tracker.log({"tokens_seen": i})
    with Tracker(tmp_path, config, 1, "kept") as tracker:  # the last line comes again
        for i in range(2, 4):
            tracker.log({"tokens_seen": i})
    assert [m["tokens_seen"] for m in client.logged] == ([2, 3] if resumed else [0, 1, 2, 3])


# --- Weights & Biases ---


def without_settings(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """As on a machine where wandb was never used."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", {}, "disabled"),
        ("auto", {"WANDB_API_KEY": "a" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "a" * 40}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": "a" * 40}, "offline"),
        ("auto", {"WANDB_MODE": "run", "WANDB_API_KEY": "a" * 40}, "online"),
        ("offline", {}, "offline"),
        ("disabled", {"WANDB_API_KEY": "a" * 40}, "disabled"),
    ],
)
def test_what_auto_means(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, environment: dict, mode: str
) -> None:
    without_settings(monkeypatch, tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(dataclasses.replace(CONFIG, wandb=asked)) == mode
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    if not environment and asked == "auto":
        assert wandb_mode(CONFIG) == "disabled"
        assert wandb_mode(dataclasses.replace(CONFIG, wandb="auto")) == "online"


@pytest.mark.parametrize("folder", [".config/wandb", "wandb", ".wandb"])
def test_auto_leaves_the_choice_to_the_settings_of_wandb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    without_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    auto = dataclasses.replace(CONFIG, wandb="auto")
    settings = tmp_path / folder / "settings"
    settings.parent.mkdir(parents=True)
    for mode in ("offline", "disabled"):
        settings.write_text(f"[default]\nmode = {mode}\n")
        assert wandb_mode(auto) == mode
        assert wandb_mode(dataclasses.replace(CONFIG, wandb="online")) == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode(auto) == "online"
    monkeypatch.delenv("WANDB_MODE")
    settings.write_text("[default]\nproject = x\n")
    assert wandb_mode(auto) == "online"
    settings.write_text("not settings at all")
    assert wandb_mode(auto) == "online"


def test_a_key_for_a_service_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_settings(monkeypatch, tmp_path)
    auto = dataclasses.replace(CONFIG, wandb="auto")
    (tmp_path / "keys").write_text("machine wandb.mine.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert wandb_mode(auto) == "disabled"
    settings = tmp_path / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.mine.org\n")
    assert wandb_mode(auto) == "online"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["offline", "disabled"])
def test_what_the_commands_of_wandb_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    without_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    auto = dataclasses.replace(CONFIG, wandb="auto")
    assert wandb_mode(auto) == "online"
    subprocess.run([sys.executable, "-m", "wandb", command], check=True, capture_output=True)
    assert wandb_mode(auto) == command


def test_a_service_out_of_reach_is_written_to_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable = weights_and_biases._unreachable
    client = Client(monkeypatch)
    monkeypatch.setattr(weights_and_biases, "_unreachable", unreachable)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracked = WandbRun(tmp_path, CONFIG, "kept", "online")
    tracked.close({}, failed=False)
    assert tracked.id == "kept" and client.modes == ["offline"]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-kept" in caplog.text


PROGRAM = textwrap.dedent("""
    import sys, time
    sys.path[:0] = {tests!r}
    import fastsae, test_tracking as t, dataclasses
    t.weights_and_biases.PATIENCE_SECONDS = {patience}
    config = dataclasses.replace(t.CONFIG, out={out!r}, wandb={mode!r}, tokens={tokens})
    def slowly():
        for batch in t.batches():
            time.sleep({pause})
            yield batch
    waited, close = [], t.WandbRun.close
    def timed(*arguments, **options):
        started = time.monotonic()
        close(*arguments, **options)
        waited.append(time.monotonic() - started)
    t.WandbRun.close = timed
    fastsae.Trainer(fastsae.Sweep(config, ks=(2, 4)), slowly()).fit()
    print(len(waited), max(waited))
""")


def train(service: wandb_stand_in.Service, **values: object) -> subprocess.Popen[str]:
    values = {"mode": "auto"} | values
    program = PROGRAM.format(tests=list(map(str, Path(__file__).parents[:2])), **values)
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment(service), stdout=-1, stderr=-1, text=True
    )


def environment(service: wandb_stand_in.Service) -> dict[str, str]:
    return os.environ | {"WANDB_BASE_URL": service.address, "WANDB_API_KEY": "a" * 40}


def assert_told(service: wandb_stand_in.Service, runs: Path) -> None:
    """The service has every number of every run."""
    assert len(service.names) == 2
    for run_id, name in service.names.items():
        told = {line["tokens_seen"]: line for line in service.history[run_id]}
        written = read_metrics(runs / name)
        assert len(told) == len(written) == 10
        for theirs, ours in zip(told.values(), written, strict=True):
            histogram = theirs["log10_density"]
            assert histogram["values"] == ours.pop("density_histogram")
            assert histogram["bins"] == list(DENSITY_EDGES)
            for metric, value in ours.items():
                assert theirs[metric] == pytest.approx(value), metric


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_the_service_is_told_what_the_file_holds(tmp_path: Path, mode: str) -> None:
    """Two SAEs side by side, stopped and resumed: two runs on the service, with every number.

    Offline both parts are on the disk. Synced one after the other, the second must not erase the first,
    not even where the service does not say how far the first has come.
    """
    with wandb_stand_in.service() as service:
        for tokens in (320, 640):
            process = train(
                service, out=str(tmp_path), tokens=tokens, pause=0, patience=60, mode=mode
            )
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    if mode == "auto":
        assert all(len(history) == 10 for history in service.history.values())
        return assert_told(service, tmp_path)
    assert not service.names
    parts = sorted(tmp_path.glob("*/wandb/offline-run-*"))
    assert len(parts) == 4
    for resumes in (True, False):
        with wandb_stand_in.service() as service:
            service.resumes = resumes
            for part in parts:
                for mark in part.glob("*.wandb.*"):  # of what was synced
                    mark.unlink()
                sync = [sys.executable, "-m", "wandb", "sync", str(part)]
                subprocess.run(sync, env=environment(service), check=True, capture_output=True)
        assert_told(service, tmp_path)


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
    assert "not finished within 2 s" in errors and "is sent by\n  wandb sync " in errors
    # Two ends, each of which may wait for 2 s; what the training itself takes depends on the machine.
    ends, longest = printed.split()[-2:]
    assert int(ends) == 2 and float(longest) < 5
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


def test_an_sae_that_pca_beats_is_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_baseline(CONFIG, 3e-4, 0.7, None)
    warn_of_baseline(CONFIG, 3e-4, 0.7, 0.69)
    warn_of_idle_latents(CONFIG, 0.5, 1000)
    assert not caplog.records
    warn_of_baseline(CONFIG, 3e-4, 0.653, 0.767)
    assert "explains more of the variance (0.767) than this SAE (0.653)" in caplog.text
    warn_of_idle_latents(CONFIG, 0.287, 4096)
    assert "only 28.7% of the latents were active within the last 4,096 tokens" in caplog.text
    assert all(flag in caplog.text for flag in ("--lr", "--outlier-norm", "--d-sae"))
