"""What all tests share: where kernels run, and poisoned memory for the kernel tests."""

import os
import sys
from pathlib import Path

import torch

# Triton reads this when a kernel is decorated, so it is set before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# Test modules share tolerances.py and selection_cases.py.
sys.path.insert(0, str(Path(__file__).parent))

# The tensors are small: a second thread only waits for the first.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton"])
def impl(request, device) -> str:
    """Each implementation in turn, in force while the test runs; CPU kernels are interpreted."""
    dispatch = pytest.importorskip("fastsae_kernels.dispatch")
    if request.param == "triton" and not dispatch.HAS_TRITON:
        pytest.skip("triton is not installed")
    if request.param == "triton" and device.type == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("kernels run on CPU tensors under TRITON_INTERPRET=1 alone")
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds NaN (the largest integer in integer tensors), so reading it shows."""

    def fill(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    def poisoned(allocate):
        return lambda *args, **kwargs: fill(allocate(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
