"""The two sparse forms of a selection, with static capacity.

Both hold ``K`` slots whatever was selected: the first ``nnz = offsets[-1] <= K`` are entries, the rest
are zero. Shapes therefore never depend on data, and nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CSR(NamedTuple):
    """Selected latents by token: row ``b`` is ``[offsets[b], offsets[b + 1])``, latents ascending."""

    values: Tensor  # [K], the dtype of pre
    indices: Tensor  # [K] int32, latent of each entry
    offsets: Tensor  # [B + 1] int32

    def tokens(self) -> Tensor:
        """Token of each slot ``[K]`` int64; ``B`` in the slots beyond ``nnz``."""
        # shape[0] and not len(): only the former stays symbolic where a compiler traces a backward.
        slot = torch.arange(self.indices.shape[0], dtype=torch.int32, device=self.indices.device)
        return torch.searchsorted(self.offsets, slot, right=True) - 1

    def dense(self, latents: int) -> Tensor:
        """``z [B, F]``, differentiable in ``values``."""
        return scatter_values(self.values, self.indices, self.offsets, latents)


class CSC(NamedTuple):
    """The same entries by latent: ``f`` owns ``[offsets[f], offsets[f + 1])``, tokens ascending."""

    rows: Tensor  # [K] int32, token of each entry
    positions: Tensor  # [K] int32, the entry's slot in the CSR arrays
    offsets: Tensor  # [F + 1] int32

    def counts(self) -> Tensor:
        """How often each latent was selected, ``[F]`` int32."""
        return self.offsets.diff()


def scatter_values(values: Tensor, indices: Tensor, offsets: Tensor, latents: int) -> Tensor:
    """The dense ``[B, F]`` matrix with ``values`` at their places and zero elsewhere."""
    tokens = offsets.shape[0] - 1
    flat = CSR(values, indices, offsets).tokens() * latents + indices
    # Empty slots have token B, hence index B * F: one place more than the matrix takes them all.
    dense = values.new_zeros(tokens * latents + 1).scatter(0, flat, values)
    return dense[:-1].view(tokens, latents)
