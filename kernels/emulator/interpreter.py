"""Triton's interpreter with a launch's programs in another order: a plugin of pytest.

    PYTHONPATH=kernels python -m pytest -p emulator.interpreter --order reversed tests/ops

No program may depend on one before it.
"""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
from triton.runtime import interpreter

Place = tuple[int, ...]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("interpreter").addoption
    add("--order", choices=("reversed", "random"), default="reversed", help="[reversed]")
    add("--order-seed", type=int, default=0)


def pytest_configure(config: pytest.Config) -> None:
    builder: Any = interpreter.interpreter_builder
    shuffled = random.Random(config.getoption("--order-seed"))
    set_dim, set_place = builder.set_grid_dim, builder.set_grid_idx
    instead: dict[Place, Place] = {}

    def begin(*grid: int) -> None:
        places = list(itertools.product(*map(range, grid)))
        others = places[::-1]
        if config.getoption("--order") == "random":
            shuffled.shuffle(others)
        instead.clear()
        instead.update(zip(places, others, strict=True))
        set_dim(*grid)

    builder.set_grid_dim = begin
    builder.set_grid_idx = lambda *place: set_place(*instead[place])
