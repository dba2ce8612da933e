"""How fast rows at random places can be read: a ceiling for what gathers, not an operation of ours."""

import itertools

import torch
from measure import call_seconds
from torch import Tensor

from fastsae_kernels.dispatch import jit, tl


@jit
def gather_kernel(
    table_ptr, index_ptr, out_ptr, entries, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """``ROWS`` rows at a time are in flight; a program adds up one row of ``index``, a tile of columns."""
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, entries, ROWS):
        index = tl.load(index_ptr + segment * entries + first + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(table_ptr + index[:, None] * D + columns[None, :]).to(tl.float32)
    tl.store(out_ptr + segment.to(tl.int64) * D + columns, tl.sum(total, 0))


def gather_sums(table: Tensor, index: Tensor, rows: int, block: int, warps: int) -> Tensor:
    """``[n, D]`` float32: of ``table [F, D]`` the rows that ``index [n, entries]`` (int32) names, added up.
    ``rows`` divides the entries and ``block`` the width."""
    out = torch.empty(len(index), table.shape[1], device=table.device)
    gather_kernel[(len(index), table.shape[1] // block)](
        table_ptr=table, index_ptr=index, out_ptr=out, entries=index.shape[1], D=table.shape[1],
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def gather_rate(table: Tensor, index: Tensor) -> float:
    """Bytes per second of the fastest of some ways."""
    ways = itertools.product((4, 8, 16), (256, 512), (2, 4, 8))
    spent = (
        min(
            call_seconds(lambda _, way=way: gather_sums(table, index, *way), 1, "cuda", cold=False)[
                0
            ]
        )
        for way in ways
    )
    return index.numel() * table[0].nbytes / min(spent)
