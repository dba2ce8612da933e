"""Kernel tests on compiled kernels: a plugin of pytest.

    PYTHONPATH=kernels python -m pytest -p emulator.plugin tests/ops

Tests that would run in Triton's interpreter run what Triton compiles for sm_90 instead. A test fails where
a launch touches what it should not, and where threads or programs race. ``--order``, ``--order-seed`` and
``--noise`` are of :class:`Emulator`.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

# Read when a kernel is decorated, and set by the tests where it is not.
os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch

from .driver import ORDERS, Emulator

BENIGN = (
    # Each of them stores True.
    (r"group_max_kernel|encode_\w+_kernel", r"two programs write the same value", r".*"),
    # Of a row with fewer elements than threads, several warps hold the same elements, and one of them
    # stores: what the others read after that goes nowhere. Wide rows are tests/test_emulator.py's.
    (r"(de|en)coder_kernel", r"a warp .*, without a barrier", r"W_.*"),
    (
        r"keep_largest_kernel|error_gradient_kernel|where_active_kernel",
        r"a warp .*, without a barrier",
        r".* and .*",
    ),
)
"""Races that change nothing: kernels, kinds and buffers."""


def _is_benign(*race: str) -> bool:
    return any(all(map(re.fullmatch, benign, race)) for benign in BENIGN)


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("emulator").addoption
    add("--order", choices=ORDERS, default="random", help="of a launch's programs [random]")
    add("--order-seed", type=int, default=0)
    add("--noise", type=float, default=0.0, help="share of the error of approximate instructions")
    add("--every-kernel", action="store_true", help="fail unless every kernel was launched")


def pytest_configure(config: pytest.Config) -> None:
    option: Any = config.getoption
    emulator = Emulator(option("--order"), option("--order-seed"), option("--noise"))
    config.pluginmanager.register(Emulation(emulator, option("--every-kernel")), "emulation")


class Emulation:
    def __init__(self, emulator: Emulator, every: bool) -> None:
        self.emulator, self.every = emulator, every
        emulator.install()
        from fastsae_kernels import dispatch, encoder

        # CPU tensors are Triton's now, as under the interpreter; the encoder must not know.
        dispatch.INTERPRETED = True
        encoder.INTERPRETED = False
        torch.set_num_threads(1)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self):
        before = self.emulator.races.found.copy()
        result = yield
        new = self.emulator.races.found - before
        races = [race for race in new if not _is_benign(*race)]
        first = self.emulator.races.first
        assert not races, "races: " + "; ".join(f"{', '.join(r)} ({first[r]})" for r in races)
        return result

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("emulated")
        races = self.emulator.races
        for race, times in sorted(races.found.items()):
            line = f"{', '.join(race)}: {times} times, first at {races.first[race]}"
            terminalreporter.write_line(line + (" (benign)" if _is_benign(*race) else ""))
        terminalreporter.write_line("\n".join(self.emulator.table()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        missing = sorted(_kernels() - set(self.emulator.counts)) if self.every else []
        if missing:
            print(f"\nnever launched: {', '.join(missing)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _kernels() -> set[str]:
    """The names of all kernels there are."""
    modules = [m for name, m in sys.modules.items() if name.startswith("fastsae_kernels")]
    names = {name for module in modules for name in vars(module)}
    return {name for name in names if name.endswith("_kernel")}
