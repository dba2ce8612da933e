"""Selections of drawn inputs against the definition. Apart from the other tests of the selections so that
those run where Hypothesis is not installed."""

import pytest
import torch
from selection_cases import assert_batch_topk, assert_select_across, assert_topk

from fastsae_kernels import batch_topk
from fastsae_kernels.selection.torch_impl import keep_largest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

QUOTAS = st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9, 1.0])


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 20),
    F=st.integers(1, 80),
    seed=st.integers(0, 2**31),
    quota=QUOTAS,
)
def test_exact_on_any_mixture_of_values(data, B, F, seed, quota):
    pool = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1e-38, 0.5, 0.5, 1.0, 3e38, torch.inf, -torch.inf])
    pool = torch.cat([pool, torch.tensor([torch.nan])])
    allowed = data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(seed)
    pre = pool[allowed][torch.randint(len(allowed), (B, F), generator=generator)]
    assert_batch_topk(pre, data.draw(st.integers(0, B * F + 1)), quota)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 20),
    F=st.integers(1, 80),
    seed=st.integers(0, 2**31),
    quota=QUOTAS,
)
def test_a_quota_uses_every_latent_and_no_place_more(data, B, F, seed, quota):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-6, 4, (B, F), generator=generator).float()
    pre[torch.rand(B, F, generator=generator) < 0.1] = torch.nan
    num_selected = data.draw(st.integers(0, B * F))
    plain = batch_topk(pre, num_selected)
    csr, threshold, _ = batch_topk(pre, num_selected, quota=quota)
    assert csr.offsets[-1] == plain.csr.offsets[-1]
    used = (csr.dense(F) > 0).any(0)
    usable = (pre > 0).any(0)
    most = int(quota * num_selected)
    assert int(used.sum()) >= min(int(usable.sum()), most)
    if usable.sum() <= most:
        assert torch.equal(used, usable)
    assert threshold >= plain.threshold  # what peaks displace are the smallest others
    if quota == 0:
        assert all(map(torch.equal, csr, plain.csr)) and torch.equal(threshold, plain.threshold)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 9),
    widths=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    seed=st.integers(0, 2**31),
    quota=QUOTAS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_shards_select_what_one_would(data, B, widths, seed, quota, dtype):
    pool = [-1.0, 0.0, 1e-45, 1e-38, 0.5, 0.5, 1.0, 1.0 + 2**-20, 3e38, torch.inf, torch.nan]
    allowed = torch.tensor(data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(seed)
    pre = allowed[torch.randint(len(allowed), (B, sum(widths)), generator=generator)].to(dtype)
    assert_select_across(pre, widths, data.draw(st.integers(0, pre.numel() + 1)), quota)


@settings(max_examples=25, deadline=None)
@given(B=st.integers(2, 8), F=st.integers(2, 70), seed=st.integers(0, 2**31), quota=QUOTAS)
def test_permuting_tokens_permutes_the_selection(B, F, seed, quota):
    generator = torch.Generator().manual_seed(seed)
    # Distinct values: with ties the order of the tokens decides, as it should.
    pre = torch.randperm(B * F, generator=generator).float().view(B, F)
    order = torch.randperm(B, generator=generator)
    num_selected = B * F // 3
    z = batch_topk(pre, num_selected, quota=quota).csr.dense(F)
    permuted = batch_topk(pre[order], num_selected, quota=quota).csr.dense(F)
    assert torch.equal(permuted, z[order])


@settings(max_examples=150, deadline=None)
@given(B=st.integers(1, 6), F=st.integers(1, 80), k=st.integers(0, 81), seed=st.integers(0, 2**31))
def test_topk_exact_on_ties(B, F, k, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_topk(torch.randint(-1, 4, (B, F), generator=generator).float(), k)


@settings(max_examples=150, deadline=None)
@given(F=st.integers(1, 40), k=st.integers(0, 41), seed=st.integers(0, 2**31))
def test_the_largest_are_kept_ties_to_the_lower_index(F, k, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 4, (3, F), generator=generator).float()
    first = rows.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, first, True)
    assert torch.equal(keep_largest(rows, k), expected)
    assert torch.equal(keep_largest(rows, k, positive=True), expected & (rows > 0))
