"""The operations of a step one by one: ours, eager torch, compiled torch, and a peer's where it is one.

Each has its reference result; a provider whose result differs is not timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gates import RELATIVE, require_close
from measure import Shape, activations
from torch import Tensor

from fastsae_kernels import (
    CSR,
    BiasState,
    MatrixState,
    batch_topk,
    csr_to_csc,
    encode_with_group_max,
    fused_update_,
    normalize_rows,
    reference,
    sparse_decode,
    topk,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Op:
    """One operation at one size: what each provider calls, and how its result is judged."""

    stage: str
    shape: Shape
    dtype: str
    providers: dict[str, Callable[[], Any] | None]
    judge: Callable[[Any], None]  # raises AssertionError
    bytes_moved: int  # the fewest that ours moves
    flops: int = 0

    @property
    def group(self) -> str:
        return f"{self.stage} | {self.shape} {self.dtype}"

    def check(self, provider: str) -> None:
        call = self.providers[provider]
        assert call is not None
        self.judge(call())


def _start(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [B, D]`` and unit rows ``W [F, D]`` in ``dtype``, both biases in float32."""
    x = activations(shape, 1, device)[0]
    generator = torch.Generator().manual_seed(1)
    W = reference.normalize_rows(torch.randn(shape.F, shape.D, generator=generator)).to(device)
    b_enc, b_dec = torch.zeros(shape.F, device=device), x.mean(0)
    return x.to(DTYPES[dtype]), W.to(DTYPES[dtype]), b_enc, b_dec


def _pre(shape: Shape, device: str) -> Tensor:
    x, W, b_enc, b_dec = _start(shape, "fp32", device)
    return reference.pre_activations(x, W.T, b_enc, b_dec)


def _flat(csr: CSR, F: int) -> Tensor:
    n = int(csr.offsets[-1])
    return (csr.tokens() * F + csr.indices)[:n]


def encode(shape: Shape, dtype: str, device: str) -> Op:
    x, W, b_enc, b_dec = _start(shape, dtype, device)

    def eager(x=x):
        return (x - b_dec.to(x.dtype)) @ W.T + b_enc.to(x.dtype)

    expected = reference.pre_activations(x.float(), W.float().T, b_enc, b_dec)
    compiled = torch.compile(eager)
    size = W.element_size()
    return Op(
        "encode",
        shape,
        dtype,
        {
            "fastsae": lambda: encode_with_group_max(x, W.T, b_enc, b_dec).pre,
            "torch, eager": eager,
            "torch, compiled": lambda: compiled(x),
        },
        lambda pre: require_close("pre-activations", pre, expected, RELATIVE[dtype]),
        (x.numel() + W.numel()) * size + 4 * shape.B * shape.F,
        2 * shape.B * shape.D * shape.F,
    )


def selection(shape: Shape, dtype: str, device: str) -> Op:
    """The K largest of the batch. Theirs gives the set, or a dense matrix: what they then multiply."""
    pre, K = _pre(shape, device), shape.K
    maxima = encode_with_group_max(*_encoder_inputs(shape, device)).maxima
    expected = reference.batch_topk_mask(pre, K).flatten().nonzero().flatten()

    def eager(pre=pre):
        active = torch.relu(pre).flatten()
        top = active.topk(K, sorted=False)
        return torch.zeros_like(active).scatter(0, top.indices, top.values).view_as(pre)

    compiled, peer = torch.compile(eager), None
    if importlib.util.find_spec("sae_lens"):
        from sae_lens.saes.batchtopk_sae import BatchTopK

        module = BatchTopK(shape.k)
        peer = lambda: module(pre)

    def judge(found):
        places = (
            _flat(found, shape.F) if isinstance(found, CSR) else found.flatten().nonzero().flatten()
        )
        assert torch.equal(places.long(), expected), "selection: not the reference's set"

    return Op(
        "selection",
        shape,
        dtype,
        {
            "fastsae": lambda: batch_topk(pre, K, maxima).csr,
            "fastsae, without group maxima": lambda: batch_topk(pre, K).csr,
            "torch, eager": eager,
            "torch, compiled": lambda: compiled(pre),
            "SAELens": peer,
        },
        judge,
        shape.B * shape.F // 32 * 4 * 6 + K * 128 * 6 + K * 8,
    )


def _encoder_inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, W, b_enc, b_dec = _start(shape, "fp32", device)
    return x, W.T, b_enc, b_dec


def per_token_selection(shape: Shape, dtype: str, device: str) -> Op:
    """The k largest of each token, as sparsify selects."""
    pre, k = _pre(shape, device), int(shape.k)
    expected = reference.topk_mask(pre, k).flatten().nonzero().flatten()

    def eager(pre=pre):
        return torch.relu(pre).topk(k, dim=-1, sorted=False)

    compiled = torch.compile(eager)

    def judge(found):
        if isinstance(found, CSR):
            places = _flat(found, shape.F).long()
        else:
            row = torch.arange(shape.B, device=device)[:, None] * shape.F
            places = (found.indices + row).flatten()[found.values.flatten() > 0].sort().values
        assert torch.equal(places, expected), "selection: not the reference's set"

    return Op(
        "selection per token",
        shape,
        dtype,
        {
            "fastsae": lambda: topk(pre, k),
            "torch, eager": eager,
            "torch, compiled": lambda: compiled(pre),
        },
        judge,
        4 * shape.B * shape.F,
    )


def decode(shape: Shape, dtype: str, device: str) -> Op:
    """``x̂`` of a selection: sparse, or dense where the selection is a dense matrix."""
    _, W, _, b_dec = _start(shape, dtype, device)
    pre = _pre(shape, device)
    csr = batch_topk(pre, shape.K).csr
    z = csr.dense(shape.F).to(W.dtype)
    bias = b_dec.to(W.dtype)
    expected = reference.decode(z.float(), W.float(), b_dec)

    def eager(z=z):
        return z @ W + bias

    def bag():
        return (
            torch.nn.functional.embedding_bag(
                csr.indices,
                W,
                csr.offsets[:-1],
                per_sample_weights=csr.values.to(W.dtype),
                mode="sum",
            )
            + bias
        )

    compiled = torch.compile(eager)
    return Op(
        "decode",
        shape,
        dtype,
        {
            "fastsae": lambda: sparse_decode(csr, W, b_dec),
            "torch, eager": eager,
            "torch, compiled": lambda: compiled(z),
            "torch, embedding_bag (sparsify's on a CPU)": bag,
        },
        lambda x_hat: require_close("decode", x_hat, expected, RELATIVE[dtype]),
        shape.K * (shape.D * W.element_size() + 8) + 4 * shape.B * shape.D,
        2 * shape.K * shape.D,
    )


def update(shape: Shape, dtype: str, device: str) -> Op:
    """From the residual's gradient to updated weights: both gradients, projection, Adam, renormalisation."""
    x, W, _, b_dec = _start(shape, dtype, device)
    W = normalize_rows(W.float())
    pre = _pre(shape, device)
    csr = batch_topk(pre, shape.K).csr
    csc = csr_to_csc(csr, shape.F)
    z = csr.dense(shape.F).to(x.dtype)
    dY = ((z.float() @ W + b_dec - x.float()) * (2 / x.numel())).to(x.dtype)
    lr, step = torch.tensor(3e-4, device=device), torch.ones((), dtype=torch.int64, device=device)
    copy_dtype = None if dtype == "fp32" else DTYPES[dtype]
    rows = [MatrixState.start(W.clone(), copy_dtype=copy_dtype) for _ in range(2)]
    vectors = [BiasState.start(torch.zeros(shape.F, device=device)), BiasState.start(b_dec.clone())]

    def ours():
        fused_update_(rows[0], vectors[0], rows[1], vectors[1], csr, csc, x, dY, lr, step)
        return rows[0].m, rows[1].m

    def dense_gradients(z, dY, W_dec):
        dz = (dY @ W_dec.to(dY.dtype).T) * (z > 0)
        W_enc_gradient = dz.T.float() @ (x.float() - b_dec)
        gradient = (z.T @ dY).float()
        return W_enc_gradient, gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec

    def dense(gradients):
        parameters = [W.clone().requires_grad_() for _ in range(2)]
        adam = torch.optim.Adam(parameters, lr=3e-4, fused=True)

        def call():
            with torch.no_grad():
                w = parameters[1].detach()
                for p, g in zip(parameters, gradients(z, dY, w), strict=True):
                    p.grad = g
                adam.step()
                w /= w.norm(dim=1, keepdim=True)
            return tuple(adam.state[p]["exp_avg"] for p in parameters)

        return call

    expected = dense_gradients(z.float(), dY.float(), W)

    def judge(moments):
        for name, found, gradient in zip(("W_enc", "W_dec"), moments, expected, strict=True):
            require_close(f"first moment of {name}", found, 0.1 * gradient, RELATIVE[dtype])

    per_weight = 24 if copy_dtype is None else 26
    return Op(
        "update",
        shape,
        dtype,
        {
            "fastsae": ours,
            "torch, eager": dense(dense_gradients),
            "torch, compiled": dense(torch.compile(dense_gradients)),
        },
        judge,
        2 * shape.D * shape.F * per_weight + shape.K * shape.D * 4,
        8 * shape.K * shape.D,
    )
