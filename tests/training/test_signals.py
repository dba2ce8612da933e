"""SIGINT and SIGTERM at every stage of a run: one sentence, and the same command goes on."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import models
import pytest

from fastsae.cli import main
from fastsae.data import cache
from fastsae.data.buffer import ActivationBuffer
from fastsae.errors import Interrupted
from fastsae.reporting import report
from fastsae.training import trainer
from fastsae.training.signals import Signals

FLAGS = (
    "--layer", "2", "--quantization", "none", "--context-length", "32", "--harvest-batch", "4",
    "--d-sae", "128", "--k", "4", "--batch-size", "64", "--tokens", "1280", "--pool-tokens", "1024",
    "--eval-tokens", "256", "--checkpoint-every-tokens", "640", "--device", "cpu", "--wandb", "disabled",
)  # fmt: skip


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Give the command; its exit code, and the last line it printed."""
    text = tmp_path / "prose.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking.\n\n" * 200)
    common = ("--model", models.llama(), "--text-files", str(text), "--out", str(tmp_path / "runs"))

    def give(*flags: str) -> tuple[int, str]:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        code = main(["train", *common, "--name", "run", *FLAGS, *flags])
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return code, (printed.strip().splitlines() or [""])[-1]

    return give


def signalled(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, number: int
) -> None:
    """A signal arrives in the ``call``-th call of a function."""
    function, calls = getattr(owner, name), []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(trainer, "open_stream", 1), (ActivationBuffer, "_harvest_one", 3)],
)
def test_before_the_first_step(
    train, tmp_path: Path, owner: object, name: str, call: int, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, owner, name, call, number)
        code, said = train()
    assert code == 128 + number
    assert said == "stopped before the first step; give the same command again to begin"
    assert not (tmp_path / "runs").exists()
    assert train()[0] == 0


@pytest.mark.slow
def test_while_the_cache_is_written(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_BYTES", 64 << 10)
    flags = ("--cache-dir", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, cache, "_save", 7, signal.SIGTERM)
        code, said = train(*flags)
    assert code == 128 + signal.SIGTERM and said.startswith("stopped before the first step")
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").glob("activations_*")}
    assert len(kept) == 2
    assert train(*flags)[0] == 0
    assert len(list((tmp_path / "cache").glob("activations_*"))) > 2
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.slow
def test_in_training_and_while_it_is_taken_up_again(train, tmp_path: Path) -> None:
    runs = tmp_path / "runs/run"
    saved = f"everything is saved in {runs}. Give the same command again to go on"
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, trainer.Run, "train_on", 3, signal.SIGTERM)
        assert train() == (128 + signal.SIGTERM, f"stopped at 192 of 1,280 tokens; {saved}")
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, ActivationBuffer, "_harvest", 2, signal.SIGINT)
        assert train() == (128 + signal.SIGINT, f"stopped at 192 of 1,280 tokens; {saved}")
    assert train()[0] == 0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("evaluate", 1),
        *(
            pytest.param(name, 1, marks=pytest.mark.slow)
            for name in ("load_pretrained", "write_report_page", "plot")
        ),
    ],
)
def test_after_the_training(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    run = tmp_path / "runs/run"
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, report, name, call, signal.SIGTERM)
        code, said = train()
    assert code == 128 + signal.SIGTERM
    assert said.startswith(f"stopped after the training; the SAE is saved in {run}. Give the same")
    assert "report" not in json.loads((run / "summary.json").read_text())

    def refuse(*_: object) -> None:
        raise AssertionError("there is nothing left to train")

    monkeypatch.setattr(trainer, "open_stream", refuse)
    assert train()[0] == 0
    assert json.loads((run / "summary.json").read_text())["report"] == "report.html"


def test_of_two_signals_the_second_takes_its_usual_course() -> None:
    received: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with (
            pytest.raises(Interrupted, match="saved") as caught,
            Signals(lambda: "saved") as signals,
        ):
            with signals.deferred():
                signal.raise_signal(signal.SIGTERM)
                assert signals.received == signal.SIGTERM and not received
                signal.raise_signal(signal.SIGTERM)
                assert received == [signal.SIGTERM]
            pytest.fail("the first signal was forgotten")
        assert caught.value.signal == signal.SIGTERM
        with pytest.raises(Interrupted), Signals(lambda: "saved"):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the signal did nothing")
        signal.raise_signal(signal.SIGTERM)
        assert len(received) == 2, "the handler was not put back"
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_outside_the_main_thread_and_without_a_folder_nothing_is_done() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with Signals(lambda: ""):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with Signals(lambda: "", enabled=False):
        found.append(signal.getsignal(signal.SIGTERM))
    assert found == [before, before]
