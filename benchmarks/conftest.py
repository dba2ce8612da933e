"""``pytest benchmarks``: sizes for this machine, gates, and memory beside time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import (
    SCALES,
    PeakMemory,
    Shape,
    environment,
    product_flops,
    scale_for,
    seconds,
    synchronize,
)
from ops import DTYPES, Op


def pytest_addoption(parser):
    group = parser.getgroup("fastsae")
    group.addoption(
        "--scale", choices=[*SCALES, "auto"], default="auto", help="sizes [auto: what fits]"
    )
    group.addoption("--rounds", type=int, default=3, help="rounds of whole training steps [3]")
    group.addoption(
        "--steps-apart", type=int, default=2, help="steps by which the two run lengths differ [2]"
    )
    group.addoption(
        "--gate",
        choices=["full", "narrow"],
        default="full",
        help="check whole steps at the timed size, or at its F and k with few tokens of small width",
    )
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config):
    device = config.getoption("--device")
    name = config.getoption("--scale")
    config.fastsae_scale = scale_for(device) if name == "auto" else name


def pytest_report_header(config):
    about, name = environment(config.getoption("--device")), config.fastsae_scale
    return f"scale: {name} ({SCALES[name]}) on {about['hardware']}, {about['threads']} threads"


def pytest_benchmark_update_machine_info(config, machine_info):
    # Only what a figure needs: nothing that names a machine.
    machine_info.clear()
    device = config.getoption("--device")
    machine_info.update(environment(device) | {"scale": config.fastsae_scale, "device": device})


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in ("author_time", "branch", "project"):
        commit_info.pop(name, None)


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def shape(request) -> Shape:
    return SCALES[request.config.fastsae_scale]


@pytest.fixture(scope="session")
def ceilings(device, shape) -> dict[str, float]:
    """What the machine can do: FLOP/s of products by dtype, bytes/s of a copy (reads and writes)."""
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(7))
    sizes = ((2048, 2048, 2048), (shape.B, shape.D, shape.F))
    products = {
        f"flops_{name}": product_flops(device, *sizes, dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    return {"bytes": 2 * source.nbytes / copy, **products}


@pytest.fixture
def compare(benchmark, device, ceilings) -> Callable[[Op, str], None]:
    """Time one provider of an operation, if its result is right; with its peak memory and the roofline."""

    def run(op: Op, provider: str) -> None:
        call = op.providers[provider]
        if call is None:
            pytest.skip(f"{provider} is not installed or cannot do this")
        op.check(provider)
        with PeakMemory(device) as memory:
            call()
            synchronize(device)
        benchmark.group = op.group
        roof = max(op.flops / ceilings[f"flops_{op.dtype}"], op.bytes_moved / ceilings["bytes"])
        benchmark.extra_info.update(
            kind="op", stage=op.stage, trainer=provider, peak_mib=round(memory.peak / 2**20, 1),
            roofline_seconds=roof, **ceilings,
        )  # fmt: skip

        def timed() -> None:
            call()
            synchronize(device)

        benchmark.pedantic(timed, rounds=5, warmup_rounds=1)

    return run
