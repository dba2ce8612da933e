"""A trainer in a process of its own, told by lines of JSON what to do.

Its own process, so that one's settings, caches, threads and memory are not another's, and the peak of
its resident memory is its own. Used through :class:`Worker`; started as ``python worker.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers import Problem

HERE = Path(__file__).resolve().parent


class WorkerError(RuntimeError):
    """What the trainer raised, as text."""


class Worker:
    """A process that answers one request at a time; waits idle in between."""

    def __init__(self) -> None:
        paths = [HERE, HERE.parent, HERE.parent / "kernels", os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if os.environ.get("FASTSAE_BENCH_QUIET", "1") == "1" else None,
            env=environment,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """Raises WorkerError if the trainer fails, or its process ends."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError("the trainer's process has ended") from error
        line = self._process.stdout.readline()
        if not line:
            tail = self._process.stderr.read()[-500:] if self._process.stderr else ""
            raise WorkerError(f"the trainer's process ended: {tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Server:
    def __init__(self) -> None:
        self.runner = None

    def check(self, name: str, **problem: Any) -> dict[str, float]:
        from gates import check

        return check(name, problem_of(**problem))

    def build(self, name: str, **problem: Any) -> None:
        from measure import PeakMemory
        from trainers import RUNNERS

        self.device = problem["device"]
        made = problem_of(**problem)
        self.memory = PeakMemory(self.device)
        self.memory.__enter__()
        self.runner = RUNNERS[name](made)

    def end_to_end(self, name: str, tokens: int) -> tuple[float, float]:
        from loops import run

        return run(name, tokens)

    def run(self, steps: int) -> float:
        from measure import seconds

        assert self.runner is not None
        return seconds(lambda: self.runner.run(steps), self.device)

    def peak(self) -> int:
        return self.memory.update()


BATCHES = 4
"""Different batches that a trainer goes round."""


def problem_of(shape: list, device: str, precision: str, dead_share: float) -> Problem:
    import torch
    from measure import Shape, activations
    from trainers import Problem

    s, dead = Shape(*shape), None
    if dead_share:
        generator = torch.Generator().manual_seed(2)
        dead = torch.zeros(s.F, dtype=torch.bool)
        dead[torch.randperm(s.F, generator=generator)[: round(dead_share * s.F)]] = True
        dead = dead.to(device)
    return Problem(s, activations(s, BATCHES, device), device, precision, dead)


def main() -> None:
    # Answers have the real standard output to themselves: trainers print.
    answers, sys.stdout = sys.stdout, sys.stderr
    server = _Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = {"value": getattr(server, request.pop("do"))(**request)}
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    main()
