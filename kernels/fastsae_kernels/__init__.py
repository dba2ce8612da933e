"""Kernels of BatchTopK sparse autoencoders: torch and triton only, usable without ``fastsae``."""
