"""Where a stage of a run stands: a bar on a terminal, lines elsewhere, nothing of a short stage."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0
"""A stage that ends within them says nothing."""
LINE_SECONDS = 30.0
"""Between two lines where there is no terminal for a bar."""


@contextmanager
def progress(stage: str, total: float, unit: str = "tokens") -> Iterator[Callable[[float], object]]:
    """Show how much of ``total`` is done, how fast, and the time left, if log lines of level INFO are shown.

    Yields what is to be called with every amount done.
    """
    if not log.isEnabledFor(logging.INFO):
        yield lambda amount: None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            total=total, desc=stage, unit=f" {unit}", unit_scale=True, delay=QUIET_SECONDS, leave=False
        ) as bar:  # fmt: skip
            yield bar.update
        return
    started = time.monotonic()
    done, due = 0.0, started + QUIET_SECONDS

    def advance(amount: float) -> None:
        nonlocal done, due
        done += amount
        now = time.monotonic()
        if now >= due and 0 < done < total:
            due = now + LINE_SECONDS
            rate = done / max(now - started, 1e-9)
            left = timedelta(seconds=round((total - done) / rate))
            log.info(
                "%s: %.0f%% of %s %s, %.4g a second, %s left",
                stage, 100 * done / total, f"{total:,.0f}", unit, rate, left,
            )  # fmt: skip

    yield advance
