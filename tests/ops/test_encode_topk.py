"""Encoding and selecting block by block against selecting from all pre-activations at once."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae_kernels import batch_topk, encode_topk, reference
from fastsae_kernels.encode_topk import _encode_batch_topk, encode_batch_topk
from fastsae_kernels.encoder import encode_with_group_max

B, D, F = 37, 5, 70


def whole_numbers(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, W_enc, b_enc, b_dec of small whole numbers: products are exact in any order, and ties abound."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-3, 4, shape, generator=g).float()
    return draw(B, D), draw(F, D).T, draw(F), draw(D)


def equal(a, b) -> bool:
    return all(torch.equal(s, t) for s, t in zip((*a.csr, *a[1:]), (*b.csr, *b[1:]), strict=True))


@pytest.mark.parametrize("quota", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 36, 37, 256])
@pytest.mark.parametrize("num_selected", [0, 1, 50, 500, B * F])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_select_what_the_whole_selects(monkeypatch, tokens, num_selected, dtype, quota):
    monkeypatch.setattr(encode_topk, "TOKENS_PER_PRODUCT", tokens)
    for seed in range(3):
        x, W_enc, b_enc, b_dec = (t.to(dtype) for t in whole_numbers(seed))
        pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec, with_peaks=True)
        assert equal(
            encode_batch_topk(x, W_enc, b_enc, b_dec, num_selected, quota),
            batch_topk(pre, num_selected, maxima, quota),
        )


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("quota", [0.0, 0.3, 1.0])
def test_the_kernels_select_the_same(impl, device, quota):
    operands = [tensor.to(device) for tensor in whole_numbers()]
    pre = reference.pre_activations(*operands)
    mask = reference.batch_topk_mask(pre, 90, quota)
    selection = encode_batch_topk(*operands, 90, quota)
    assert torch.equal(selection.csr.dense(F), pre * mask)
    others = pre[mask & ~reference.peaks(pre, int(90 * quota))]
    assert selection.threshold == others.min()


@pytest.mark.parametrize("quota", [0.0, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 20, 36])
def test_numbers_that_are_not_finite(monkeypatch, bad, row, quota):
    monkeypatch.setattr(encode_topk, "TOKENS_PER_PRODUCT", 8)
    x, W_enc, b_enc, b_dec = whole_numbers()
    x[row, 2] = bad
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    got = encode_batch_topk(x, W_enc, b_enc, b_dec, 60, quota)
    assert got.nonfinite
    assert equal(got, batch_topk(pre, 60, maxima, quota))


@pytest.mark.parametrize("quota", [0.0, 0.5])
def test_fewer_positive_entries_than_are_selected(monkeypatch, quota):
    monkeypatch.setattr(encode_topk, "TOKENS_PER_PRODUCT", 8)
    x, W_enc, b_enc, b_dec = whole_numbers()
    some = encode_batch_topk(x, W_enc, b_enc - 20, b_dec, 400, quota)
    assert 0 < int(some.csr.offsets[-1]) < 400
    pre = reference.pre_activations(x, W_enc, b_enc - 20, b_dec)
    assert equal(some, batch_topk(pre, 400, quota=quota))
    none = encode_batch_topk(x, W_enc, b_enc - 1000, b_dec, 400, quota)
    assert none.csr.offsets[-1] == 0 and none.threshold == torch.inf
    assert encode_batch_topk(x[:0], W_enc, b_enc, b_dec, 4, quota).csr.offsets.tolist() == [0]


@pytest.mark.parametrize("most_peaks", [0, 20])
def test_pre_activations_never_exist_as_a_whole(monkeypatch, most_peaks):
    monkeypatch.setattr(encode_topk, "TOKENS_PER_PRODUCT", 8)
    x, W_enc, b_enc, _ = whole_numbers()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t._base is None:
                    sizes.append(t.numel())
            return out

    with Sizes():
        encode_topk._select_blocks(x, W_enc.T, b_enc, 40, most_peaks)
    # A block, padded to whole groups of 32; with peaks, the places of TOKENS_TOGETHER tokens.
    assert sizes and max(sizes) <= (16 if most_peaks else 8) * 96 < B * F


PEAK = """
import torch, fastsae
from fastsae.training.update import FusedUpdate
torch.set_num_threads(1)
B, D, F = 8192, 32, 4096  # 128 MiB of pre-activations
step = FusedUpdate(fastsae.SAE(D, F, 4), fastsae.TrainConfig(d_sae=F, k=4, latent_quota=0.5, normalize="none", device="cpu"))
step(torch.randn(256, D))
x = torch.randn(B, D)
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
before = peak()
step(x)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.slow
def test_a_training_step_needs_less_than_the_pre_activations():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64


@pytest.mark.parametrize(("num_selected", "quota"), [(0, 0.0), (60, 0.0), (60, 0.5)])
def test_opcheck(num_selected, quota):
    x, W_enc, b_enc, _ = whole_numbers()
    arguments = (x, W_enc.T.contiguous(), b_enc, num_selected, quota)
    torch.library.opcheck(_encode_batch_topk, arguments)


def test_refusals():
    x, W_enc, b_enc, b_dec = whole_numbers()
    with pytest.raises(ValueError, match=r"expected x \[B, D\], W_enc \[D, F\]"):
        encode_batch_topk(x, W_enc.T, b_enc, b_dec, 4)
