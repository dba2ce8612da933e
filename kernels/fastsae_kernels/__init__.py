"""Kernels of BatchTopK sparse autoencoders: torch and triton only, usable without ``fastsae``."""

from .adam_state import Rows, Vector
from .aux_k import AuxK, aux_k, aux_k_gradients
from .batch_topk import Selection, batch_topk, csr_to_csc
from .decoder_norm import normalize_rows, normalize_rows_, project_gradient, project_gradient_
from .dispatch import use
from .encode_topk import encode_batch_topk
from .encoder import Encoded, encode_with_group_max
from .fused_update import ExtraGradient, clip_factor, fused_update_, gradient_norm
from .groups import GroupMax, group_max
from .sparse import CSC, CSR
from .sparse_decoder import DecodeLoss, sparse_decode, sparse_decode_loss
from .topk import topk

__all__ = [
    "CSC",
    "CSR",
    "AuxK",
    "DecodeLoss",
    "Encoded",
    "ExtraGradient",
    "GroupMax",
    "Rows",
    "Selection",
    "Vector",
    "aux_k",
    "aux_k_gradients",
    "batch_topk",
    "clip_factor",
    "csr_to_csc",
    "encode_batch_topk",
    "encode_with_group_max",
    "fused_update_",
    "gradient_norm",
    "group_max",
    "normalize_rows",
    "normalize_rows_",
    "project_gradient",
    "project_gradient_",
    "sparse_decode",
    "sparse_decode_loss",
    "topk",
    "use",
]
