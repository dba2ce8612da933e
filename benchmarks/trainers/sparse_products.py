"""Matrix products without the terms that are zero, for training code that is written with dense ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DENSE = 1 / 20
"""From this share of entries other than zero on, a product is taken as it is."""
LEAST = 1 << 16
"""A factor of fewer entries is, too."""
KEPT = 64
"""More weights, at one moment each, than a step multiplies by."""


class SparseProducts(TorchDispatchMode):
    """Within it, a product with latents or their gradients multiplies the nonzero ones alone.

    On a CPU a dense trainer spends most of its step on latents that were not selected. What it computes
    stays the same to rounding, for the terms that are left out are zero. The gradient of the latents
    ``S`` after ``S @ W``, which is ``G @ Wᵀ``, is formed where some ``S`` that this ``W`` decoded is not
    zero: elsewhere TopK gives no gradient. A ``W`` that decoded anything with many entries gets it whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoded: dict[Any, tuple[Tensor, list[Tensor] | None]] = {}
        """By weight: where what it has decoded is not zero; None where that was taken as it is."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            return self.product(*args)
        return func(*args, **(kwargs or {}))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if (at := nonzero(a)) is not None:
            self.note(b, at)
            return csr(at, a[at[0], at[1]], a.shape) @ b
        if (at := nonzero(b)) is not None:  # (bᵀ aᵀ)ᵀ
            at = at.flip(0)[:, at[1].argsort(stable=True)]
            return (csr(at, b[at[1], at[0]], b.shape[::-1]) @ a.t()).t().contiguous()
        if torch._C._current_graph_task_id() < 0:  # not in a backward pass
            self.note(b, None)
            return torch.mm(a, b)
        _, places = self.decoded.get(key(b, transposed=True), (b, None))
        if not places or sum(at.shape[1] for at in places) >= DENSE * len(a) * b.shape[1]:
            return torch.mm(a, b)
        at = places[0]
        if len(places) > 1:
            flat = torch.cat([at[0] * b.shape[1] + at[1] for at in places]).unique()
            at = torch.stack((flat // b.shape[1], flat % b.shape[1]))
        where = csr(at, a.new_ones(at.shape[1]), (len(a), b.shape[1]))
        return torch.sparse.sampled_addmm(where, a, b, beta=0.0).to_dense()

    def note(self, W: Tensor, at: Tensor | None) -> None:
        """``W`` has decoded what is not zero ``at`` these places, or was multiplied as it is, by everything."""
        _, places = self.decoded.get(key(W), (W, []))
        # W is held: nothing else may get its address.
        self.decoded[key(W)] = (W, None if at is None or places is None else [*places, at])
        while len(self.decoded) > KEPT:
            del self.decoded[next(iter(self.decoded))]


def key(W: Tensor, transposed: bool = False) -> tuple[Any, ...]:
    """What is equal for a weight and its views for as long as its values are."""
    turn = -1 if transposed else 1
    return W.data_ptr(), W._version, W.shape[::turn], W.stride()[::turn]


def nonzero(x: Tensor) -> Tensor | None:
    """Rows and columns ``[2, n]`` of the entries other than zero, row by row, where these are few."""
    if x.numel() < LEAST or int(torch.count_nonzero(x)) > DENSE * x.numel():
        return None
    if not x.t().is_contiguous():
        return x.nonzero().t()
    columns, rows = x.t().nonzero().t()  # along the memory, which is three times as fast
    return torch.stack((rows, columns))[:, rows.argsort(stable=True)]


def csr(at: Tensor, values: Tensor, shape: Any) -> Tensor:
    """``values [n]`` at the places ``at [2, n]``, which go row by row."""
    ends = at[0].bincount(minlength=shape[0]).cumsum(0)
    begins = torch.cat((ends.new_zeros(1), ends))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # "is in beta state", "checks are disabled"
        return torch.sparse_csr_tensor(begins, at[1], values, shape, check_invariants=False)
