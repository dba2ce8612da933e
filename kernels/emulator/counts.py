"""How many instructions the kernels of a training step execute, at the recipe's width."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

from .driver import Emulator

B, D, F, K = 64, 1536, 512, 1024
"""Tokens, width, latents and actives: as wide as the recipe, with as few programs as show what each does."""


FORMS: dict[str, dict[str, Any]] = {
    "float32 moments": {"split": True},
    "8-bit moments": {"split": True, "quantized_moments": True},
}


def table() -> list[str]:
    """A step of bf16 operands, and the update in its other form, as lines of Markdown."""
    emulator = Emulator("normal")
    emulator.install()
    import fastsae_kernels as kernels
    from fastsae_kernels import dispatch, encoder

    dispatch.INTERPRETED, encoder.INTERPRETED = True, False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=generator))
    lr, step = torch.tensor(1e-3), torch.tensor(1)
    lines: list[str] = []
    for form, options in FORMS.items():
        emulator.counts.clear()
        W_enc, W_dec = (kernels.MatrixState.start(rows.clone(), **options) for _ in range(2))
        b_enc, b_dec = (kernels.BiasState.start(torch.zeros(n)) for n in (F, D))
        W, low = W_enc.weight, torch.bfloat16
        with dispatch.use("triton"):
            csr = kernels.encode_batch_topk(x, W.T, b_enc.weight, b_dec.weight, K).csr
            csc = kernels.csr_to_csc(csr, F)
            residual = kernels.sparse_decode_loss(csr, W, b_dec.weight, x).residual
            kernels.fused_update_(
                W_enc, b_enc, W_dec, b_dec, csr, csc, x.to(low), residual.to(low), lr, step
            )
        # Of another form, what differs from the first.
        new = [line for line in emulator.table() if line not in lines]
        lines += [line.replace(" |", f", {form} |", 1) for line in new] if lines else new
    return lines
