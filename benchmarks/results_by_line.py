"""A pytest plugin: what became of each test stands in a file as soon as it is known.

``--lines FILE`` gets a line of JSON for every test that ended and every file that could not be read. A
process killed at its time limit leaves all that it found; pytest's own reports come at its end.
"""

import json
import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--lines", help="file for one line of JSON a test, as it ends")


def pytest_configure(config):
    if (path := config.getoption("--lines")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(path))


class Lines:
    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.write_text("")

    def pytest_collectreport(self, report):
        if report.failed:
            self._write(report, 0.0)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def _write(self, report, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if not report.passed:
            line["why"] = report.longreprtext[-2000:] or str(report.longrepr)[-2000:]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """After an illegal access every launch of a process fails: xdist then starts another one."""
    if os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
