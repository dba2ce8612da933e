"""Products without zero terms against autograd's dense ones, in float64."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tolerances import FOLDED_FLOAT64
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
B, D, F, K = 256, 24, 512, 1024


@pytest.fixture
def products(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "trainers"))
    yield importlib.import_module("sparse_products")
    del sys.modules["sparse_products"]


def train(steps: int, aux: str) -> list[torch.Tensor]:
    """A BatchTopK autoencoder as the dense trainers write it; ``aux``: with more decoded selections, the last of
    "few" entries, or of so "many" that it is multiplied as it is, first or last."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    W_enc, W_dec, b = (nn.Parameter(random(*s) / D**0.5) for s in ((D, F), (F, D), (D,)))
    optimizer = torch.optim.SGD((W_enc, W_dec, b), lr=0.1)

    def selected(pre: torch.Tensor, k: int) -> torch.Tensor:
        flat = pre.relu().flatten()
        top = flat.topk(k)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)

    for x in random(steps, B, D):
        pre = (x - b) @ W_enc
        more = lambda k, x=x, pre=pre: (selected(-pre, k) @ W_dec - x).square().mean()
        loss = more(B * F // 10) if aux == "many, first" else 0
        loss = loss + (selected(pre, K) @ W_dec + b - x).square().sum(1).mean()
        if aux:
            loss = loss + (selected(pre[:, F // 2 :], K // 2) @ W_dec[F // 2 :] - x).square().mean()
        if aux in ("few", "many"):
            loss = loss + more(K // 2 if aux == "few" else B * F // 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [W_enc.detach(), W_dec.detach(), b.detach()]


@pytest.mark.parametrize("aux", ["", "few", "many", "many, first"])
@pytest.mark.parametrize("steps", [1, 5])
def test_training_is_the_same(products, monkeypatch, steps, aux):
    taken = []
    for name in ("csr", "nonzero"):
        own = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, own=own, n=name: taken.append(n) or own(*a))
    expected = train(steps, aux)
    assert not taken
    with products.SparseProducts():
        found = train(steps, aux)
    # Per step: of each selection decoding and its two gradients; two gradients of the encoder. Beside one of
    # many entries, another of the same weight is spared in its decoding and the gradient of the decoder.
    assert taken.count("csr") == steps * {"": 5, "few": 11}.get(aux, 5)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() < FOLDED_FLOAT64 * theirs.abs().max()


def test_tied_weights_are_whole_in_the_forward_pass(products):
    W, x = torch.randn(F, D), torch.randn(B, D)
    sparse = torch.zeros(B, F)
    sparse[:, 0] = 1
    with products.SparseProducts():
        sparse @ W
        pre = x @ W.T
    torch.testing.assert_close(pre, x @ W.T, rtol=0, atol=0)
