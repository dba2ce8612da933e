"""Kernels compile for GPUs that are not here. In processes of their own: compiling needs kernels that
were not decorated for the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_representative_slice():
    result = run("kernels/aot/compile.py", "--slice")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 with faults" in result.stdout


@pytest.mark.slow
def test_every_kernel_has_a_case():
    code = """
import ast, sys
from pathlib import Path
sys.path[:0] = ["kernels/aot", "kernels"]
from cases import all_cases
defined = {
    node.name
    for file in Path("kernels/fastsae_kernels").rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}
covered = {case.kernel.__name__ for case in all_cases()}
assert covered == {case.kernel.__name__ for case in all_cases() if case.representative}
assert len({case.label for case in all_cases()}) == len(all_cases())
assert defined == covered, defined ^ covered
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_faults_are_found():
    code = """
import sys
from dataclasses import replace
sys.path[:0] = ["kernels/aot", "kernels"]
import compile as aot
by_label = {case.label: case for case in aot.all_cases()}
def faults(case, capability=80):
    return "; ".join(aot.check(case, capability).faults)
plain = by_label["group max fp32"]
assert faults(plain) == "", faults(plain)
assert "no 128-bit load" in faults(replace(plain, divisible=()))
assert "no mma.sync" in faults(replace(plain, matrix=True))
assert "does not compile" in faults(replace(plain, constexprs=dict(plain.constexprs) | {"GROUP": 31}))
gemm = by_label["encode descriptors bf16"]
deep = faults(replace(gemm, num_stages=8), 90)
assert "shared memory" in deep, deep
narrow = by_label["batch emit fp32"]
crowded = faults(replace(narrow, num_warps=1, constexprs=dict(narrow.constexprs) | {"BLOCK": 128}))
assert "spills" in crowded, crowded
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_interpreted_kernels_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "kernels/aot/compile.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "unset it" in result.stderr


@pytest.mark.slow
def test_places_in_large_tensors_are_64_bit():
    """No offset is a 32-bit product with a tensor's width: B * F passes 2^31 at 87,382 tokens.

    Read from Triton's own intermediate code. Products with G, the groups of a row, number groups;
    those of 2^31 entries are 2^26.
    """
    code = """
import re, sys
sys.path[:0] = ["kernels/aot", "kernels"]
import compile as aot

def narrow_products(ttir):
    head = re.search(r"tt\\.func public @\\w+\\((.*?)\\) attributes", ttir, re.S)[1]
    sizes = set(re.findall(r"(%\\w+): i32", head)) - {"%G"}
    splats = re.findall(r"(%\\w+) = tt\\.splat (%\\w+) : i32", ttir)
    sizes |= {name for name, of in splats if of in sizes}
    product = r"= arith\\.muli (%\\w+), (%\\w+)[^:]*: (?:i32|tensor<[^>]*xi32>)"
    return [m[0] for m in re.finditer(product, ttir) if sizes & {m[1], m[2]}]

kernels = {}
for case in aot.all_cases():
    if case.kernel.__name__ not in kernels:
        kernels[case.kernel.__name__] = narrow_products(aot.compile_case(case, 80).asm["ttir"])
narrow = {name: products for name, products in kernels.items() if products}
assert not narrow, narrow
assert len(kernels) >= 20, sorted(kernels)
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
