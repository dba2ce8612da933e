"""What SIGINT and SIGTERM do to a run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Interrupted

log = logging.getLogger(__name__)


class Signals:
    """SIGINT and SIGTERM raise Interrupted: at once, or at the end of :meth:`deferred`.

    A second signal takes its usual course; but a process that was launched gets one from its scheduler and one
    from its launcher, and hears the first alone. A context manager, which does nothing outside the main thread:
    there the program around us handles signals.

    Args:
        saved: what is saved at that moment, and how to go on; the text of Interrupted.
        enabled: otherwise nothing is done either.

    Attributes: ``received``: the number of the signal that arrived, or None.
    """

    def __init__(self, saved: Callable[[], str], *, enabled: bool = True) -> None:
        self.received: int | None = None
        self._saved, self._enabled, self._deferred = saved, enabled, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM) if self._enabled else ():
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Look at ``received`` in here; if it is set, Interrupted is raised at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Interrupted(self._saved(), self.received)

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            return
        if "RANK" not in os.environ:
            self.__exit__()
        self.received = number
        if not self._deferred:
            raise Interrupted(self._saved(), number)
        log.info("signal %s: finishing this step, then saving", signal.Signals(number).name)
