"""An iterator that is kept a few items ahead by a thread of its own."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The items of ``items``, made in a background thread, at most ``depth`` of them in advance.

    What ``items`` raises is raised here in its turn. Nothing else may use ``items``, or what it reads,
    until ``close()`` has returned.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(items, self._queue, self._stop), name="fastsae-text", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # as any iterator: once ended, it stays so
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """Give up what was read ahead, and wait for the thread to let go of ``items``."""
        self._stop.set()
        self._thread.join()


def _fill(items: Iterator[T], results: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            result = (next(items), None)
        except BaseException as error:  # handed over to whoever waits for the item
            result = (None, error)
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                break
            except queue.Full:
                continue
        if result[1] is not None:
            return
