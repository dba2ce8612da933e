"""Kernels of BatchTopK sparse autoencoders: torch and triton only, usable without ``fastsae``."""

from .aux_k import AuxK, aux_k_gradients
from .decoder_norm import normalize_rows, normalize_rows_, project_gradient, project_gradient_
from .dispatch import use
from .encode_topk import encode_batch_topk
from .encoder import Encoded, encode_with_group_max
from .selection import GroupMax, Selection, batch_topk, group_max, topk
from .sharded_topk import select_across
from .sparse import CSC, CSR
from .sparse_decoder import (
    DecodeLoss,
    decode_part,
    nested_decode_loss,
    nested_gradient,
    sparse_decode,
    sparse_decode_loss,
)
from .transpose import csr_to_csc
from .update import clip_factor, fused_update_, fused_update_latents_, gradient_norm
from .update.state import AuxGradients, BiasState, MatrixState

__all__ = [
    "CSC",
    "CSR",
    "AuxGradients",
    "AuxK",
    "BiasState",
    "DecodeLoss",
    "Encoded",
    "GroupMax",
    "MatrixState",
    "Selection",
    "aux_k_gradients",
    "batch_topk",
    "clip_factor",
    "csr_to_csc",
    "decode_part",
    "encode_batch_topk",
    "encode_with_group_max",
    "fused_update_",
    "fused_update_latents_",
    "gradient_norm",
    "group_max",
    "nested_decode_loss",
    "nested_gradient",
    "normalize_rows",
    "normalize_rows_",
    "project_gradient",
    "project_gradient_",
    "select_across",
    "sparse_decode",
    "sparse_decode_loss",
    "topk",
    "use",
]
