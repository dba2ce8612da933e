"""The matrix product of a CPU, whichever library runs it."""

import pytest
import torch
from tolerances import summation_bound

from fastsae_kernels import products
from fastsae_kernels.products import linear


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 20, 7), (130, 300, 257), (0, 20, 7), (1, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_is_exact_to_its_rounding(monkeypatch, shape, bias):
    monkeypatch.setattr(products, "MIN_ONEDNN_PRODUCTS", 1)
    m, k, n = shape
    torch.manual_seed(0)
    x, weight, b = torch.randn(m, k), torch.randn(n, k), torch.randn(n) if bias else None
    exact = x.double() @ weight.double().T + (b.double() if bias else 0)
    magnitudes = x.double().abs() @ weight.double().abs().T + (b.double().abs() if bias else 0)
    assert (linear(x, weight, b) - exact).abs().le(summation_bound(k) * magnitudes).all()


def test_float64_stays_float64():
    x, weight = torch.randn(40, 50).double(), torch.randn(60, 50).double()
    torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2])
def test_runs_on_equally_many_threads_are_bitwise_equal(threads, count):
    threads(count)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(256, 96), torch.randn(1024, 96), torch.randn(1024)
    assert x.numel() * len(weight) >= products.MIN_ONEDNN_PRODUCTS
    first = linear(x, weight, bias)
    assert all(torch.equal(first, linear(x, weight, bias)) for _ in range(5))
