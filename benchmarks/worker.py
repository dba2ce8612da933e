"""A trainer in a process of its own: settings, caches, threads and peak memory are not another's.

``FASTSAE_BENCH_QUIET=0`` shows what it prints.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import gates
import torch
from measure import PeakMemory, Shape, seconds
from trainers import TRAINERS, Problem

from fastsae import TrainConfig
from fastsae_kernels import reference


class Worker:
    """A process that answers one request at a time; waits idle in between."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin)
        self._pool.submit(len, ())  # it begins at once, beside the others

    def ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        """Call the method ``what`` of :class:`Server`. Raises RuntimeError if it fails, or the process ends."""
        try:
            return self._pool.submit(_answer, what, arguments, options).result()
        except BrokenProcessPool as ended:
            raise RuntimeError("the trainer's process has ended") from ended

    def close(self) -> None:
        self._pool.shutdown()


class Server:
    """What the process does when asked; one trainer at a time."""

    def check(self, name: str, shape: Shape, **about: Any) -> dict[str, float]:
        """The gate; what it measured."""
        return gates.check(name, Problem.synthetic(shape, **about))

    def build(self, name: str, shape: Shape, **about: Any) -> None:
        """A trainer of steps on made-up batches."""
        problem = Problem.synthetic(shape, **about)
        self._device, self._memory = problem.device, PeakMemory(problem.device)
        self._trainer = TRAINERS[name](problem)

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` more steps."""
        return seconds(lambda: self._trainer.run(steps), self._device)

    def open(self, name: str, config: TrainConfig) -> None:
        """A trainer of whole runs; nothing is loaded yet."""
        self._pipeline, self._config = TRAINERS[name].pipeline, config
        self._memory = PeakMemory("cpu")

    def train(self, tokens: int) -> dict[str, float]:
        """Seconds of a run of ``tokens`` from text to SAE, by stage."""
        self._trained = self._pipeline(replace(self._config, tokens=tokens))
        return self._trained.seconds

    def explained_variance(self) -> float:
        """Of the SAE that the last run gave, on activations that fastsae holds out."""
        from trainers.text import held_out

        x = held_out(self._config)
        with torch.no_grad():
            found = torch.cat([self._trained.reconstruct(part) for part in x.split(1024)])
        return float(reference.explained_variance(x, found))

    def peak_mib(self) -> float:
        """The most memory that was needed since ``build`` or ``open``."""
        return self._memory.mib


_server = Server()


def _answer(what: str, arguments: tuple, options: dict) -> Any:
    try:
        return getattr(_server, what)(*arguments, **options)
    except Exception as error:  # which may not come through as it is
        raise RuntimeError(f"{type(error).__name__}: {str(error)[:500]}") from None


def _begin() -> None:
    if os.environ.get("FASTSAE_BENCH_QUIET", "1") == "1":
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
