"""Kernels of BatchTopK sparse autoencoders: torch and triton only, usable without ``fastsae``."""

from .dispatch import use
from .sparse import CSC, CSR

__all__ = ["CSC", "CSR", "use"]
