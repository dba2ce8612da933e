import ast
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.slow
def test_a_triton_that_is_too_old_is_as_none(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("def jit(function): return function\n")
    (tmp_path / "triton" / "language.py").write_text("")
    code = "import fastsae_kernels\nassert not fastsae_kernels.dispatch.HAS_TRITON"
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    result = run_python(code, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr


def test_the_versions_asked_for_are_those_that_hold_what_is_used():
    """Before Triton 3.4 there is no ``triton.knobs``, before torch 2.8 no product with a dtype of its own."""
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    least = dict(re.findall(r"(\w+)>=([\d.]+)", ",".join(project["dependencies"])))
    number = lambda version: tuple(map(int, version.split(".")))
    assert number(least["triton"]) >= (3, 4) and number(least["torch"]) >= (2, 8)


def test_an_operation_runs_with_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    current, seen = [], []

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Device)

    @dispatch.register(fake=lambda x: torch.empty_like(x))
    def _where_it_runs(x: torch.Tensor) -> torch.Tensor:
        seen.extend(current)
        return x.clone()

    @dispatch.register(fake=lambda *_: None, mutates_args=("state",))
    def _where_it_changes_(state: list[torch.Tensor], x: torch.Tensor) -> None:
        seen.extend(current)

    x, state = torch.zeros(2), torch.ones(1)
    _where_it_runs(x)
    _where_it_changes_([state], x)
    assert [t.data_ptr() for t in seen] == [x.data_ptr(), state.data_ptr()] and not current


@pytest.fixture
def through_library(monkeypatch) -> list[str]:
    """The operations that torch's library was asked for, in order."""
    asked, real = [], torch.library.CustomOpDef.__call__

    def call(self, *args):
        asked.append(self._name)
        return real(self, *args)

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", call)
    return asked


def test_operations_are_called_directly_where_nobody_looks(through_library):
    pre = torch.randn(4, 40)
    csr = fastsae_kernels.batch_topk(pre, 20).csr
    with torch.no_grad():
        again = fastsae_kernels.batch_topk(pre.clone().requires_grad_(), 20).csr
        fastsae_kernels.csr_to_csc(csr, 40)
    assert not through_library and again.values.equal(csr.values)


def test_what_looks_on_sees_operations(through_library):
    def select(pre):
        return fastsae_kernels.batch_topk(pre, 20).csr.values

    pre = torch.randn(4, 40)
    expected, asked = select(pre), ["group_max", "batch_topk"]

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name.removeprefix("fastsae::"))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    seen: list[str] = []
    with Seen():
        assert select(pre).equal(expected)
    assert [name for name in seen if name in asked] == asked
    with FakeTensorMode() as mode:
        assert select(mode.from_tensor(pre)).shape == (20,)
    select(pre.as_subclass(Subclass))
    with torch.autograd.forward_ad.dual_level():
        select(pre)
    assert torch.func.vmap(select)(pre[None])[0].equal(expected)
    select(pre.clone().requires_grad_()).sum().backward()
    # Maxima are taken of what is detached.
    assert through_library == [*asked * 5, "batch_topk"]

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    seen.clear()
    assert torch.compile(select, fullgraph=True, backend=backend)(pre).equal(expected)
    assert {"fastsae.group_max.default", "fastsae.batch_topk.default"} <= set(seen)
    graph = make_fx(select, tracing_mode="real")(pre).graph
    assert "fastsae.batch_topk.default" in {str(node.target) for node in graph.nodes}


def test_what_an_operation_called_directly_writes_is_known_to_autograd():
    W = torch.ones(3, 4, requires_grad=True)
    product = W * W
    with torch.no_grad():
        fastsae_kernels.normalize_rows_(W)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
