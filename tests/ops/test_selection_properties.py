"""Selections of drawn inputs against the definition. Apart from the other tests of the selections so that
those run where Hypothesis is not installed."""

import pytest
import torch
from selection_cases import assert_batch_topk, assert_topk

from fastsae_kernels import batch_topk
from fastsae_kernels.selection.torch_impl import keep_largest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=150, deadline=None)
@given(data=st.data(), B=st.integers(1, 6), F=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_exact_on_any_mixture_of_values(data, B, F, seed):
    pool = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1e-38, 0.5, 0.5, 1.0, 3e38, torch.inf, -torch.inf])
    pool = torch.cat([pool, torch.tensor([torch.nan])])
    allowed = data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(seed)
    pre = pool[allowed][torch.randint(len(allowed), (B, F), generator=generator)]
    assert_batch_topk(pre, data.draw(st.integers(0, B * F + 1)))


@settings(max_examples=25, deadline=None)
@given(B=st.integers(2, 8), F=st.integers(2, 70), seed=st.integers(0, 2**31))
def test_permuting_tokens_permutes_the_selection(B, F, seed):
    generator = torch.Generator().manual_seed(seed)
    # Distinct values: with ties the order of the tokens decides, as it should.
    pre = torch.randperm(B * F, generator=generator).float().view(B, F)
    order = torch.randperm(B, generator=generator)
    num_selected = B * F // 3
    z = batch_topk(pre, num_selected).csr.dense(F)
    permuted = batch_topk(pre[order], num_selected).csr.dense(F)
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
