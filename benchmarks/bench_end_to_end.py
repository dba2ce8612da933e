"""Tokens per second with the language model in the loop: runs of two lengths by everybody's own pipeline."""

import functools

import pytest
from bench_step import CLOCK
from loops import LOOPS, SETTING
from measure import two_lengths
from trainers import OURS, missing
from worker import Worker

SHORT, LONG = 20_480, 81_920
AT_LEAST = 0.5
"""Of our explained variance: what an SAE must explain after the longer run for its speed to count."""


@functools.cache
def trained(name: str, rounds: int) -> tuple[list[float], float]:
    """Seconds per token of each round, and explained variance after the longer run."""
    quality = 0.0

    def run(worker, tokens):
        nonlocal quality
        spent, quality = worker.ask(do="end_to_end", name=name, tokens=tokens)
        return spent

    with Worker() as worker:
        run(worker, 8192)  # imports, and whatever happens once
        seconds = [
            two_lengths(lambda n: run(worker, n), SHORT, LONG, timed=lambda call, device: call())
            for _ in range(rounds)
        ]
    return seconds, quality


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", LOOPS)
def bench_tokens(benchmark, request, device, name):
    if device != "cpu":
        pytest.skip(
            "the demo's language model is for CPUs; on a GPU, benchmarks/gpu.py --part stream"
        )
    if (package := missing(name)) is not None:
        pytest.skip(f"{package} is not installed")
    rounds = max(1, request.config.getoption("--rounds") - 1)
    seconds, quality = trained(name, rounds)
    ours = trained(OURS, rounds)[1]
    assert quality >= AT_LEAST * ours, f"explained variance {quality:.3f}, ours {ours:.3f}"
    benchmark.group = "seconds per token, language model in the loop"
    benchmark.extra_info.update(
        kind="end to end", trainer=name, setting=SETTING, explained_variance=round(quality, 4)
    )
    durations = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.pass_(next(durations)), rounds=len(seconds))
