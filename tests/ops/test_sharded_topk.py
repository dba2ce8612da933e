"""The selection across shards of latents is that of one device, on any number of processes."""

from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_stand_in import Device
from selection_cases import assert_select_across, cases
from torch import Tensor

from fastsae.team import ALONE, Team, added_bytes
from fastsae_kernels import CSR, batch_topk, select_across
from tests.processes import run_together


def hard_cases() -> dict[str, Tensor]:
    """Those of every selection, and what only goes wrong between shards."""
    made = cases()
    normal = made["random"]
    B, F = normal.shape
    half = F // 2
    made["twin_latents"] = torch.cat([normal[:, :half], normal[:, :half]], dim=1)
    made["repeated_tokens"] = normal[:1].repeat(B, 1)
    made["twins_and_repeated"] = made["twin_latents"][:1].repeat(B, 1)
    made["low_precision"] = normal.bfloat16().float()
    made["hot_shard"] = normal + 20 * (torch.arange(F) >= F - F // 4)
    made["hot_and_tied"] = torch.where(torch.arange(F) % 7 == 3, 7.0, normal)
    return made


CASES = hard_cases()
QUOTAS = (0.0, 0.15, 0.4, 1.0)


def even(latents: int, shards: int) -> list[int]:
    ends = [part * latents // shards for part in range(shards + 1)]
    return [end - start for start, end in pairwise(ends)]


@pytest.mark.parametrize("name", CASES)
def test_what_shards_select_is_what_one_selects(name, device, poison):
    pre = CASES[name].to(device)
    B, F = pre.shape
    positives = int((pre > 0).sum())
    sizes = {-1, 0, 1, F, positives - 1, positives, positives + 1, B * F // 3, B * F, 10**6}
    cuts = [*(even(F, shards) for shards in (1, 2, 4, 9)), [0, F // 3, 0, F - F // 3, 0]]
    # Each size with each quota, in another cut each time.
    for widths, (num_selected, quota) in zip(cycle(cuts), product(sizes, QUOTAS), strict=False):
        assert_select_across(pre, widths, num_selected, quota)


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["random", "few_values", "denormal", "infinite", "wide_range"])
def test_every_dtype(name, dtype, quota, device):
    pre = CASES[name].to(device, dtype)
    for num_selected in (60, pre.numel() // 3):
        assert_select_across(pre, [30, 0, 25, 20], num_selected, quota)


@pytest.mark.parametrize("shards", range(1, 10))
def test_more_shards_than_latents(shards):
    pre = CASES["few_values"][:, :5].contiguous()
    for num_selected in range(1, 21):
        assert_select_across(pre, even(5, shards), num_selected, 0.3)
    assert_select_across(pre[:, :0], [0] * shards, 4, 0.3)
    assert_select_across(pre[:0], even(5, shards), 4, 0.3)


def across(pre: Tensor, widths: list[int], budget: int, quota: float = 0) -> tuple[Tensor, float]:
    """All shards' selected entries side by side, and the threshold."""
    selections = [batch_topk(part, budget, quota=quota).csr for part in pre.split(widths, dim=1)]
    parts, threshold = select_across(
        selections, range(len(widths)), widths, budget, quota,
        tokens=len(pre), dtype=pre.dtype, device=pre.device,
    )  # fmt: skip
    dense = [part.dense(width) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(dense, dim=1), float(threshold)


def test_ties_fall_by_token_then_by_shard():
    selected, threshold = across(torch.full((3, 4), 2.0), [2, 2], 7)
    assert selected.tolist() == [[2, 2, 2, 2], [2, 2, 2, 0], [0, 0, 0, 0]]
    assert threshold == 2


def test_peaks_are_counted_over_all_shards():
    pre = torch.tensor([[9.0, 8, 2, 1], [7, 6, 0, 0]])
    # One peak comes first: 9, not 9 and, in the other shard, 2.
    assert across(pre, [2, 2], 3, 0.5)[0].tolist() == [[9, 8, 0, 0], [7, 0, 0, 0]]
    # Three peaks come first, and the largest other.
    selected, threshold = across(pre, [2, 2], 4, 0.75)
    assert selected.tolist() == [[9, 8, 2, 0], [7, 0, 0, 0]]
    assert threshold == 7
    selected, threshold = across(pre, [2, 2], 4, 1)
    assert selected.tolist() == [[9, 8, 2, 1], [0, 0, 0, 0]]
    assert threshold == torch.inf
    # Half of the four entries there are, not of the budget.
    assert across(pre[:1], [2, 2], 100, 0.5)[1] == 1


def test_what_is_refused():
    sizes: dict[str, Any] = dict(tokens=2**16, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="quota is a share"):
        select_across([], range(0), [4], 8, 1.5, **sizes)
    with pytest.raises(ValueError, match="do not fit 32-bit places"):
        select_across([], range(0), [2**14] * 4, 2**30, **sizes)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        select_across([], range(1), [4], 8, **sizes)


@pytest.mark.parametrize("quota", [0.0, 0.2, 1.0])
def test_it_never_waits_for_the_device(quota):
    pytest.importorskip("triton")
    pre, widths = CASES["hot_and_tied"], [30, 45]
    selections = [batch_topk(part, 90, quota=quota).csr for part in pre.split(widths, dim=1)]
    expected = across(pre, widths, 90, quota)
    device = Device()
    with device.installed() as log:
        moved = [CSR(*(t.to(device.place) for t in csr)) for csr in selections]
        log.clear()
        parts, threshold = select_across(
            moved, range(2), widths, 90, quota,
            tokens=len(pre), dtype=pre.dtype, device=device.place,
        )  # fmt: skip
        assert not log.waits and not log.faults
        parts = [CSR(*(t.cpu() for t in part)) for part in parts]
        threshold = float(threshold)
    dense = [part.dense(width) for part, width in zip(parts, widths, strict=True)]
    assert torch.equal(torch.cat(dense, dim=1), expected[0])
    assert threshold == expected[1]


# --- several processes ---

SETTINGS = [
    (dtype, shards, num_selected, quota)
    for dtype, shards in ((torch.float32, 2), (torch.float32, 5), (torch.float64, 3))
    for num_selected, quota in ((50, 0.0), (101, 0.4), (190, 0.9), (300, 1.0))
]
NAMES = ("random", "all_equal", "few_values", "twins_and_repeated", "hot_shard")
RUNS = [
    (CASES[name].to(dtype), even(CASES[name].shape[1], shards), num_selected, quota)
    for name, (dtype, shards, num_selected, quota) in zip(cycle(NAMES), SETTINGS * 2, strict=False)
]


def hosted_parts(team: Team) -> tuple[list[list[CSR]], list[Tensor], int]:
    """What this process hosts of every run, the thresholds, and the bytes that came."""
    found, thresholds = [], []
    for pre, widths, num_selected, quota in RUNS:
        hosted = team.hosted(len(widths))
        shards = pre.split(widths, dim=1)
        parts, threshold = select_across(
            [batch_topk(shards[shard], num_selected, quota=quota).csr for shard in hosted],
            hosted, widths, num_selected, quota,
            tokens=len(pre), dtype=pre.dtype, device=pre.device,
            add=lambda counts: team.add_integers_(counts, "selection"),
        )  # fmt: skip
        found.append(parts)
        thresholds.append(threshold)
    return found, thresholds, team.received["selection"]


def test_processes_select_what_one_selects(tmp_path: Path) -> None:
    size = 3
    found, thresholds, none = hosted_parts(ALONE)
    everyone = run_together(size, hosted_parts, folder=tmp_path)
    for run, parts in enumerate(found):
        together = [part for each in everyone for part in each[0][run]]
        assert len(together) == len(parts)
        for part, expected in zip(together, parts, strict=True):
            assert all(map(torch.equal, part, expected))
        assert all(torch.equal(each[1][run], thresholds[run]) for each in everyone)
    expected = 0
    for pre, widths, num_selected, quota in RUNS:
        tokens, latents = pre.shape
        digits = [2**15, *[2**16] * (3 if pre.dtype == torch.float64 else 1)]
        once = sum(added_bytes(4 * n, size) for n in (*digits, tokens + 1, len(widths)))
        peaks = int(quota * num_selected)
        first = 0 if peaks == 0 else once if peaks < latents else added_bytes(8, size)
        expected += once + first
    assert none == 0
    assert all(each[2] == expected for each in everyone)
