"""Work for the network, done in order by a thread of its own: the training never waits for it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

HURRIED_SECONDS = 5.0
"""How long a program that was interrupted, or failed, waits for the network."""

log = logging.getLogger(__name__)


class Background:
    """Makes calls one after the other, in a thread.

    A call that fails costs nothing but a warning: the first one names the error, the others are
    counted and told at the end. When ``capacity`` calls are waiting, further ones are dropped, and
    counted too.

    As a context manager it waits for what was submitted when the block ends well, ``patience`` seconds
    at most, and only for a moment when it ends by an exception.

    Args:
        name: what the calls are for, as warnings say it.
        patience: seconds that the end of the block may take.
        remedy: what the user can do about calls that were not made; part of the warnings.
        capacity: calls that may wait.
    """

    def __init__(
        self, name: str, patience: float = 60, remedy: str = "", capacity: int = 1000
    ) -> None:
        self.name = name
        self.patience = patience
        self.remedy = remedy
        self.failed = 0
        self.dropped = 0
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(capacity)
        # A daemon: a connection that hangs must not keep a finished program from ending.
        self._thread = threading.Thread(target=self._work, name=f"fastsae {name}", daemon=True)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(self.patience if kind is None else min(self.patience, HURRIED_SECONDS))

    def submit(self, call: Callable[[], object]) -> None:
        """Have ``call`` made after those submitted before; returns at once."""
        if not self._thread.ident:
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                log.warning("%s does not keep up: what does not fit is dropped", self.name)

    def close(self, timeout: float) -> bool:
        """Wait for the calls submitted so far, ``timeout`` seconds at most. Whether all were made."""
        if not self._thread.ident:
            return True
        deadline = time.monotonic() + timeout
        try:
            self._calls.put(None, timeout=timeout)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        done = not self._thread.is_alive()
        if not done or self.failed or self.dropped:
            left = "" if done else f"not finished within {timeout:g} s; "
            log.warning(
                "%s: %s%d calls failed, %d were dropped%s",
                self.name, left, self.failed, self.dropped, self.remedy and f". {self.remedy}",
            )  # fmt: skip
        return done

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # whatever the service does, the run goes on
                self.failed += 1
                if self.failed == 1:
                    log.warning("%s: %s: %s", self.name, type(error).__name__, error)
