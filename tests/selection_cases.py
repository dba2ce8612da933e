"""Pre-activations on which a selection goes wrong if it can, and what makes one right."""

from collections.abc import Sequence

import torch

from fastsae_kernels import batch_topk, csr_to_csc, reference, select_across, topk


def cases(B: int = 4, F: int = 75) -> dict[str, torch.Tensor]:
    """Float32 matrices ``[B, F]`` by name; ``F`` is no multiple of the group size."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(B, F, generator=generator)
    ramp = torch.arange(B * F, dtype=torch.float32).view(B, F) - B * F / 4
    made = {
        "random": normal,
        "all_equal": torch.full((B, F), 1.5),
        "two_values": (normal > 0).float() + 1,
        "few_values": torch.randint(-2, 3, (B, F), generator=generator).float(),
        "all_negative": -normal.abs() - 1,
        "all_zero": torch.zeros(B, F),
        "one_positive": -normal.abs(),
        "hot_token": normal.clone(),
        "hot_latent": normal.clone(),
        "ascending": ramp,
        "descending": ramp.flip(0, 1),
        "denormal": normal * 1e-40,
        "signed_zero": torch.where(normal > 0, 0.0, -0.0),
        "infinite": normal.clone(),
        "nan": normal.clone(),
        "all_nan": torch.full((B, F), torch.nan),
        "nan_and_ties": torch.randint(-1, 2, (B, F), generator=generator).float(),
        "wide_range": torch.exp(30 * normal) * normal.sign(),
    }
    made["one_positive"][B // 2, F - 1] = 3.0
    made["hot_token"][B // 2] += 100
    made["hot_latent"][:, F // 2] += 100
    made["infinite"].view(-1)[:: F // 4] = torch.inf
    made["infinite"].view(-1)[1 :: F // 4] = -torch.inf
    made["nan"].view(-1)[::5] = torch.nan
    made["nan_and_ties"].view(-1)[::3] = torch.nan
    return made


def assert_batch_topk(pre: torch.Tensor, num_selected: int, quota: float = 0.0) -> None:
    """Set, order, offsets, threshold and flag of the selection, and its CSC form, against the oracle."""
    selection = batch_topk(pre, num_selected, quota=quota)
    csc = csr_to_csc(selection.csr, pre.shape[1])
    pre = pre.detach().cpu()
    num_selected = min(max(num_selected, 0), pre.numel())
    mask = reference.batch_topk_mask(pre, num_selected, quota)
    expected, expected_csc = reference.to_csr(pre, mask), reference.to_csc(mask)
    nnz, capacity = len(expected.values), num_selected
    values, indices, offsets = (t.cpu() for t in selection.csr)

    assert indices.dtype == offsets.dtype == torch.int32 and values.dtype == pre.dtype
    assert len(values) == len(indices) == capacity
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(indices[:nnz], expected.indices)
    assert torch.equal(values[:nnz], expected.values)
    assert not values[nnz:].any() and not indices[nnz:].any()
    others = pre[mask & ~reference.peaks(pre, int(quota * num_selected))].float()
    threshold = others.min() if len(others) else torch.tensor(torch.inf)
    assert selection.threshold.dtype == torch.float32
    assert torch.equal(selection.threshold.cpu(), threshold)
    assert bool(selection.nonfinite) == (not pre.isfinite().all())

    rows, positions, offsets = (t.cpu() for t in csc)
    assert rows.dtype == positions.dtype == offsets.dtype == torch.int32
    assert torch.equal(offsets, expected_csc.offsets)
    assert torch.equal(rows[:nnz], expected_csc.rows)
    assert torch.equal(positions[:nnz], expected_csc.positions)
    assert not rows[nnz:].any() and not positions[nnz:].any()
    assert torch.equal(csc.counts().cpu(), mask.sum(0))


def assert_select_across(
    pre: torch.Tensor, widths: Sequence[int], num_selected: int, quota: float = 0.0
) -> None:
    """The parts of shards of ``widths`` latents against the oracle and the selection from all at once."""
    selections = [
        batch_topk(part, num_selected, quota=quota).csr for part in pre.split(list(widths), dim=1)
    ]
    parts, threshold = select_across(
        selections, range(len(widths)), widths, num_selected, quota,
        tokens=len(pre), dtype=pre.dtype, device=pre.device,
    )  # fmt: skip
    assert torch.equal(threshold, batch_topk(pre, num_selected, quota=quota).threshold)
    assert threshold.dtype == torch.float32 and threshold.shape == ()
    pre = pre.cpu()
    mask = reference.batch_topk_mask(pre, min(max(num_selected, 0), pre.numel()), quota)
    slices = zip(pre.split(list(widths), dim=1), mask.split(list(widths), dim=1), strict=True)
    for part, given, of_shard in zip(parts, selections, slices, strict=True):
        expected, nnz = reference.to_csr(*of_shard), int(of_shard[1].sum())
        values, indices, offsets = (t.cpu() for t in part)
        assert indices.dtype == offsets.dtype == torch.int32 and values.dtype == pre.dtype
        assert len(values) == len(indices) == len(given.values)
        assert torch.equal(offsets, expected.offsets)
        assert torch.equal(indices[:nnz], expected.indices)
        assert torch.equal(values[:nnz], expected.values)
        assert not values[nnz:].any() and not indices[nnz:].any()


def assert_topk(pre: torch.Tensor, k: int) -> None:
    """Set, order and offsets of the selection against the oracle."""
    values, indices, offsets = (t.cpu() for t in topk(pre, k))
    pre, k = pre.detach().cpu(), min(max(k, 0), pre.shape[1])
    expected = reference.to_csr(pre, reference.topk_mask(pre, k))
    nnz = len(expected.values)
    assert indices.dtype == offsets.dtype == torch.int32 and values.dtype == pre.dtype
    assert len(values) == len(indices) == len(pre) * k
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(indices[:nnz], expected.indices)
    assert torch.equal(values[:nnz], expected.values)
    assert not values[nnz:].any() and not indices[nnz:].any()
