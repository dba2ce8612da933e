import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsae_kernels
from fastsae_kernels import dispatch

PACKAGE = Path(fastsae_kernels.__file__).parent

EVERY_OPERATION = """
import torch, fastsae_kernels as K
x, W = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8).T
pre, maxima = K.encode_with_group_max(x, W, torch.zeros(40), torch.zeros(8))
csr = K.batch_topk(pre, 20, maxima).csr
csr.values.sum().backward()
assert x.grad.abs().sum() > 0
assert K.csr_to_csc(csr, 40).counts().sum() == csr.offsets[-1]
assert K.topk(pre, 3).offsets[-1] <= 15
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    base = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "FASTSAE_KERNELS")}
    base["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), base.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=base | environment, capture_output=True, text=True
    )


def test_cpu_tensors_run_on_torch_unless_asked_otherwise():
    assert dispatch.implementation(torch.zeros(1)) == "torch"


@pytest.mark.gpu
def test_cuda_tensors_run_on_triton():
    assert dispatch.implementation(torch.zeros(1, device="cuda")) == "triton"
    assert dispatch.implementation(torch.zeros(1, device="cuda", dtype=torch.float64)) == "torch"
    with dispatch.use("torch"):
        assert dispatch.implementation(torch.zeros(1, device="cuda")) == "torch"


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_the_interpreter_runs_where_it_is_asked_for():
    with dispatch.use("triton"):
        assert dispatch.implementation(torch.zeros(1)) == "triton"
        with dispatch.use("torch"):
            assert dispatch.implementation(torch.zeros(1)) == "torch"
        assert dispatch.implementation(torch.zeros(1)) == "triton"


def test_the_choice_ends_with_its_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), dispatch.use("triton"):
        raise ZeroDivisionError
    assert dispatch.implementation(torch.zeros(1)) == "torch"


def test_triton_where_it_cannot_run_is_an_error():
    with dispatch.use("triton"), pytest.raises(RuntimeError, match="Triton was asked for"):
        dispatch.implementation(torch.zeros(1, dtype=torch.float64))


@pytest.mark.slow
def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="'auto', 'triton' or 'torch'"), dispatch.use("cuda"):
        pass
    result = run_python("import fastsae_kernels", FASTSAE_KERNELS="fast")
    assert "unknown implementation 'fast'" in result.stderr


def test_the_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "fastsae_kernels"):
        for _ in range(3):
            dispatch.implementation(torch.zeros(1))
    assert [r.getMessage() for r in caplog.records] == ["kernels on cpu tensors: torch"]


@pytest.mark.slow
def test_everything_runs_without_triton():
    block = "import sys; sys.modules['triton'] = None\n"
    tail = "from fastsae_kernels import dispatch; assert not dispatch.HAS_TRITON\n"
    result = run_python(block + EVERY_OPERATION + tail)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_triton_without_a_gpu_is_harmless():
    result = run_python(EVERY_OPERATION, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_the_package_imports_nothing_but_torch_and_triton():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, file.name


def test_kernels_are_launched_by_keyword():
    """Of a dozen pointers in a row nobody sees two that are swapped."""
    launches = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            if ast.unparse(node.func.value).split("_")[-1] == "kernel":
                launches += 1
                assert not node.args, f"{file.name}:{node.lineno}"
    assert launches >= 20


def test_no_float_atomics_and_no_waiting_in_launchers():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "reference.py":
            assert ".item()" not in file.read_text(encoding="utf-8"), file.name


def test_public_names_exist():
    assert set(fastsae_kernels.__all__) <= set(dir(fastsae_kernels))
