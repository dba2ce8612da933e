"""The operations of a step, against eager and compiled torch and SAELens's own module."""

from statistics import median

import ops
import pytest
from measure import PeakMemory, call_seconds, rounded


@pytest.mark.parametrize(("name", "dtype", "provider"), ops.cases())
def bench_op(request, report, rates, shape, device, name, dtype, provider):
    op = ops.build(name, shape, dtype, device)
    call = op.providers[provider]
    if call is None:
        pytest.skip(f"{provider} is not installed")
    op.check(provider)
    if request.config.getoption("--rounds") == 0:
        return
    memory = PeakMemory(device)
    call(0)
    about = {
        "kind": "op", "group": op.group, "stage": name, "trainer": provider,
        "peak_mib": memory.mib, **rates,
        "memory_bytes": op.bytes_moved, "gathered_bytes": op.gathered,
        "roofline_seconds": op.roofline_seconds(rates) if rates and provider == "fastsae" else None,
    }  # fmt: skip
    if device.startswith("cuda"):
        times, about["graph"] = call_seconds(call, ops.VARIANTS, device)
        warm, _ = call_seconds(call, ops.VARIANTS, device, cold=False)
        about["values"] = {"warm time": (median(warm), "s")}
    else:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = op.group
        benchmark.pedantic(call, args=(0,), rounds=5, warmup_rounds=1)
        times = benchmark.stats.stats.data
    report.add(seconds=rounded(times), **about)
