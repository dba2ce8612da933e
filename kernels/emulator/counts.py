"""How many instructions the kernels of a training step execute, at the recipe's width."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import torch

from .driver import Emulator

B, D, F, K = 64, 1536, 512, 1024
"""Tokens, width, latents and actives: as wide as the recipe, with as few programs as show what each does."""


def table() -> list[str]:
    """A step with bf16 operands and float32 moments, then one with 8-bit moments, as lines of Markdown."""
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
    for form, options in (("float32 moments", {"copy_dtype": torch.bfloat16}), ("8-bit moments", {"copy_dtype": torch.bfloat16, "quantized_moments": True})):  # fmt: skip
        emulator.counts.clear()
        W_enc, W_dec = (kernels.MatrixState.start(rows.clone(), **options) for _ in range(2))
        b_enc, b_dec = (kernels.BiasState.start(torch.zeros(n)) for n in (F, D))
        with dispatch.use("triton"):
            selection = kernels.encode_batch_topk(
                x, W_enc.compute().T, b_enc.weight, b_dec.weight, K
            )
            csr = selection.csr
            csc = kernels.csr_to_csc(csr, F)
            decoded = kernels.sparse_decode_loss(csr, W_dec.compute(), b_dec.weight, x)
            kernels.fused_update_(
                W_enc, b_enc, W_dec, b_dec, csr, csc, x.bfloat16(), decoded.residual.bfloat16(),
                lr, step,
            )  # fmt: skip
        found = emulator.table()
        if not lines:
            lines = found
        else:
            lines += [f"| {line[2:].replace(' |', f', {form} |', 1)}" for line in found if "coder_kernel" in line]  # fmt: skip
    return lines
