"""A step as CUDA graphs: their replay, and the few sizes of buffers that they are captured for."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Graphs:
    """A function of one batch, replayed as a CUDA graph for each combination of its other arguments.

    The first calls of a combination run eagerly (kernels compile, libraries make their plans); then it
    is captured, and from there on a call replays. All of them on a copy of the batch: what is captured
    has run before on the very same memory. Results stand until the next call. Graphs share one pool of
    memory: they run one after another. Where a capture fails, that is told once, and nothing else is captured.
    """

    EAGER_CALLS = 3
    CALLS_APART = 10
    """Between two captures: each waits for the device and empties torch's cache of its memory. Not many: on
    an H200 a capture costs 3 ms beside its call, and a call that is not replayed 2 to 3 ms more than one that is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._batches: dict[Any, Tensor] = {}
        self._calls: Counter[Any] = Counter()
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None
        self._wait = 0  # calls until the next capture

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        kind = x.shape, x.dtype
        if kind not in self._batches:
            self._batches[kind] = torch.empty_like(x)
        x, key = self._batches[kind].copy_(x), (*kind, *arguments)
        self._calls[key] += 1
        self._wait -= 1
        if key not in self._captured and self._calls[key] > self.EAGER_CALLS and self._wait < 0:
            self._capture(key, x, arguments)
        if key not in self._captured:
            return self._function(x, *arguments)
        graph, result = self._captured[key]
        graph.replay()
        return result

    def _capture(self, key: Any, x: Tensor, arguments: tuple[Any, ...]) -> None:
        graph, self._wait = torch.cuda.CUDAGraph(), self.CALLS_APART
        try:
            # Where the end of a capture fails, torch leaves the current stream at the capture's. Other threads of
            # the program may use the device meanwhile: a loader pins memory.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                result = self._function(x, *arguments)
        except Exception as error:
            self._wait, cause = math.inf, error.__context__ or error  # beside what follows from it
            log.warning(
                "a step could not be captured as a CUDA graph, and training goes on without: %s: %s",
                type(cause).__name__, cause,
            )  # fmt: skip
        else:
            self._pool = graph.pool()
            self._captured[key] = graph, result


class LaggedCounts:
    """Room for as many latents as were dead ``lag`` steps ago, without waiting for the device.

    For one number ``[]``, or one for each shard ``[S]``. With ``lag = 0`` there is room for just today's: on a
    CPU there is nothing to wait for.

    Room is ``LEAST``, or at most ``SPARE`` times as much as is needed, so that few sizes ever occur (24 up to 24,576
    latents) and each is a multiple of ``TILE``, as products like it. It stays until it is too small or too large.
    """

    LEAST: ClassVar = 1280
    SPARE: ClassVar = 1.15
    TILE: ClassVar = 64

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._pending: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._room: list[int] = []

    def update(self, counts: Tensor) -> list[int]:
        """Note today's ``counts``; returns capacities for those of ``lag`` steps ago."""
        if self._lag == 0:
            return counts.flatten().tolist()
        host, event = counts, None
        if counts.is_cuda:
            host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            host.copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((host, event))
        self._room = self._room or [0] * counts.numel()
        if len(self._pending) <= self._lag:
            return self._room
        old, arrived = self._pending.pop(0)
        if arrived is not None:
            arrived.synchronize()  # recorded steps ago: it has long arrived
        self._room = [*map(self._roomy, old.flatten().tolist(), self._room)]
        return self._room

    def _roomy(self, n: int, before: int) -> int:
        if n <= before <= self.SPARE * n:
            return before
        room = self.LEAST if n else 0
        while room < n:
            room = max(room + self.TILE, int(self.SPARE * room) // self.TILE * self.TILE)
        return room

    def state(self) -> Tensor:
        """The last capacities and the counts on their way, oldest first ``[1 + n]`` or ``[1 + n, S]`` int64."""
        if not self._pending:
            return torch.zeros(0, dtype=torch.int64)
        for _, arrived in self._pending:
            if arrived is not None:
                arrived.synchronize()
        counts = [counts for counts, _ in self._pending]
        return torch.stack([torch.tensor(self._room).view(counts[0].shape), *counts])

    def fill(self, counts: Tensor) -> None:
        """Let it be as if ``counts`` had been dead all along."""
        self.restore(torch.stack([torch.zeros_like(counts), *[counts] * self._lag]))

    def restore(self, state: Tensor) -> None:
        """Go on from what :meth:`state` gave."""
        state = state.cpu()
        self._room = state[:1].flatten().tolist()
        self._pending = [(counts, None) for counts in state[1:]]
