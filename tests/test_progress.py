"""A stage says how far it is where somebody listens, and nothing if it is short."""

import logging
import sys

import pytest

from fastsae import progress as module
from fastsae.progress import progress


class Clock:
    """In the place of ``time``: it stands still until it is told to go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_lines_with_share_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO, "fastsae")
    with progress("filling the pool", 4000) as advance:
        for _ in range(80):
            clock.now += 1
            advance(50)
    assert told(caplog) == [
        "filling the pool: 6% of 4,000 tokens, 50 a second, 0:01:15 left",
        "filling the pool: 44% of 4,000 tokens, 50 a second, 0:00:45 left",
        "filling the pool: 81% of 4,000 tokens, 50 a second, 0:00:15 left",
    ]


def test_a_short_stage_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO, "fastsae")
    with progress("evaluating", 10, "rows") as advance:
        for _ in range(10):
            clock.now += 0.49
            advance(1)
    with progress("nothing to do", 0) as advance:
        clock.now += 60
        advance(0)
    assert told(caplog) == []


def test_nobody_listens(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock(monkeypatch)
    caplog.set_level(logging.WARNING, "fastsae")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("evaluating", 10) as advance:
        clock.now += 60
        advance(1)
    assert told(caplog) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
) -> None:
    caplog.set_level(logging.INFO, "fastsae")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module, "QUIET_SECONDS", seconds)
    with progress("evaluating", 2000) as advance:
        for _ in range(2):
            advance(1000)
    shown = capsys.readouterr().err
    assert ("evaluating" in shown and "tokens/s" in shown) == (seconds == 0)
    assert told(caplog) == []
