"""The model of a step on a GPU: what it counts, what it makes of that, and that all of it runs.

In processes of their own, where Triton compiles instead of interpreting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("numpy", minversion="2.0")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/gpu_model.json"


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


PLANTED = """
import json
import gpu_model
import torch, triton, triton.language as tl

@triton.jit
def copy_kernel(p, q, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q + i, tl.load(p + i, mask=i < n), mask=i < n)

@triton.jit
def sampled_kernel(p, q, n, D, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q + i, tl.load(p + i, mask=i < n), mask=i < n)

@triton.jit
def chain_kernel(p, n):
    x = 0
    for i in range(n):
        x += tl.load(p + x)
    tl.store(p, x)

gpu_model.SAMPLED = 1000
gpu_model.ASSUMED["tensors stay in L2 up to, bytes"] = 2**22
emulator = gpu_model.Sampler("normal")
emulator.install(assemble=True)
found = {}
n = 2**21
p, q = torch.arange(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
copy_kernel[(n // 4096,)](p, q, n, BLOCK=4096)
found["whole"] = vars(emulator.last)
assert q.equal(p)
q.zero_()
sampled_kernel[(n // 4096,)](p, q, n, 4, BLOCK=4096)
found["sampled"] = vars(emulator.last)
assert 0 < int((q > 0).sum()) < n // 2
chain_kernel[(1,)](torch.zeros(8, dtype=torch.int32), 5000)
found["chain"] = vars(emulator.last) | {"s": emulator.last.seconds("H100")}
full = gpu_model.Launch("full", 1056, 8, 1000, 1000, 64, hbm=3e9, l2=7e9, flops=0)
found["full"] = {"resident": full.resident, "s": full.seconds("H100"), "H200": full.seconds("H200")}
found["large"] = {"resident": gpu_model.Launch("", 1, 8, 1, 1, 255, shared=120_000).resident}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict:
    # In a file: kernels are compiled from their source.
    script = tmp_path_factory.mktemp("planted") / "planted.py"
    script.write_text(PLANTED, encoding="utf-8")
    return json.loads(run(str(script)))


@pytest.mark.slow
def test_bytes_are_those_a_kernel_moves(planted):
    """2^21 integers read and written, more than stays in the cache; a program moves 4,096 of them."""
    for name in ("whole", "sampled"):
        assert planted[name]["hbm"] == planted[name]["l2"] == 2 * 4 * 2**21
        assert planted[name]["programs"] == 2**9 and planted[name]["warps"] == 4
        assert 8 <= planted[name]["registers"] <= 128 and planted[name]["spilled"] == 0
    assert planted["whole"]["instructions"] == pytest.approx(
        planted["sampled"]["instructions"], 0.1
    )


@pytest.mark.slow
def test_what_bounds_a_kernel(planted):
    # 1,056 programs of 8 warps with 64 registers: 4 on each of 132 multiprocessors, in 2 waves.
    assert planted["full"]["resident"] == 4
    spent = planted["full"]["s"]
    assert spent["memory"] == pytest.approx(1e-3)
    assert planted["full"]["H200"]["memory"] == pytest.approx(3 / 4300)
    assert spent["L2"] == pytest.approx(1e-3)
    assert spent["issue"] == pytest.approx(1056 * 8 * 1000 / (132 * 1.75e9 * 2.6))
    assert spent["latency"] == pytest.approx(2 * 1000 * 5 / 1.75e9)
    # Registers leave room for one program, shared memory too.
    assert planted["large"]["resident"] == 1
    # One program in a chain has one multiprocessor, and waits for each of its instructions.
    chain = planted["chain"]
    assert chain["instructions"] > 5000
    assert chain["s"]["latency"] > chain["s"]["issue"] > 100 * chain["s"]["memory"]


@pytest.mark.slow
def test_a_step_is_modelled_kernel_by_kernel(tmp_path):
    path, committed = tmp_path / "model.json", json.loads(RESULTS.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"before": committed["before"]}))
    shape = ("--shape", "32,128,256,4", "--label", "after", "--write", "--out", str(path))
    text = run("benchmarks/gpu_model.py", *shape)
    assert "modelled" in text and "| bound |" in text
    results = json.loads(path.read_text())
    assert set(results) == {"assumed", "before", "after"}
    assert results["before"] == committed["before"]
    steps = results["after"]["steps"]
    assert set(steps) == {"plain", "quota", "38 % dead", "8-bit moments"}
    launched = {name: sum(row["launches"] for row in rows) for name, rows in steps.items()}
    assert (
        launched["plain"] == launched["8-bit moments"] < launched["quota"] < launched["38 % dead"]
    )
    names = {row["kernel"] for row in steps["plain"]}
    assert {"encode_descriptors_kernel", "decoder_kernel", "encoder_kernel"} <= names
    for row in steps["plain"]:
        assert row["H100 us"] >= row["H200 us"] > 0
        if not row["kernel"].startswith("torch "):
            assert row["instructions a warp"] > 0 and row["programs a multiprocessor"] > 0


@pytest.mark.slow
def test_the_page_shows_the_results():
    code = "import gpu_model as m, json; print(m.page(json.loads(m.RESULTS.read_text())))"
    page = (ROOT / "docs/emulator.md").read_text(encoding="utf-8")
    shown = page.split("<!-- model: begin -->\n")[1].split("\n<!-- model: end -->")[0]
    assert shown.strip() == run("-c", code).strip()
