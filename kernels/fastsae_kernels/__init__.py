"""Kernels of BatchTopK sparse autoencoders: torch and triton only, usable without ``fastsae``."""

from .batch_topk import Selection, batch_topk, csr_to_csc
from .dispatch import use
from .encoder import Encoded, encode_with_group_max
from .groups import GroupMax, group_max
from .sparse import CSC, CSR
from .topk import topk

__all__ = [
    "CSC",
    "CSR",
    "Encoded",
    "GroupMax",
    "Selection",
    "batch_topk",
    "csr_to_csc",
    "encode_with_group_max",
    "group_max",
    "topk",
    "use",
]
