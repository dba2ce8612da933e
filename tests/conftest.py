"""What all tests share: where kernels run, and poisoned memory for the kernel tests."""

import os
import subprocess
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        variant = item.callspec.id.split("-") if hasattr(item, "callspec") else ()
        if "gpu" in item.keywords:
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif "slow_interpreted" in item.keywords and {"interpreter", "triton"} & {*variant}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source, built once."""
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, root]
    subprocess.run(build, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


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
    """Uninitialised memory holds NaN (the largest integer in integer tensors), so reading it shows;
    behind it stands a guard, so writing past the end shows too."""
    empty, guards = torch.empty, []

    def poisoned(allocate):
        def guarded(*args, **kwargs):
            plain = allocate(*args, **kwargs)
            if plain.is_meta or plain.dtype == torch.bool or not plain.is_contiguous():
                return plain
            floating = plain.is_floating_point()
            value = float("nan") if floating else torch.iinfo(plain.dtype).max
            memory = empty(plain.numel() + 64, dtype=plain.dtype, device=plain.device).fill_(value)
            guards.append(memory[plain.numel() :])
            return memory[: plain.numel()].view(plain.shape)

        return guarded

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield
    for guard in guards:
        whole = (
            guard.isnan() if guard.is_floating_point() else guard == torch.iinfo(guard.dtype).max
        )
        assert whole.all(), "a kernel wrote past the end of what it was given"
