"""The operations of a step one by one: ours, eager torch, compiled torch, and a peer's where it is one.

Each has its reference result; a provider whose result differs is not timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gates import RELATIVE, require_close
from measure import Shape
from torch import Tensor
from trainers import Problem, Weights, missing

import fastsae_kernels as kernels
from fastsae.training.graphs import LaggedCounts
from fastsae_kernels import CSR, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = 2  # sets of inputs that a measurement goes round: none finds its own in a cache
Provider = Callable[[int], Any]  # called with the number of a set of inputs


class Inputs:
    """What the operations of one size share, a list over the sets; operands are in ``dtype``."""

    def __init__(self, shape: Shape, dtype: str, device: str, skew: str | None = None) -> None:
        self.shape, self.name, self.dtype, self.device = shape, dtype, DTYPES[dtype], device
        self.skew = skew
        problem = Problem.synthetic(shape, device)
        weights = Weights(problem)
        self.x = [x.to(self.dtype) for x in problem.batches[:VARIANTS]]  # [B, D]
        self.W = weights.W_dec.to(self.dtype)  # [F, D], both encoder's and decoder's
        self.b_enc, self.b_dec = weights.b_enc, weights.b_dec

    @functools.cached_property
    def pre(self) -> list[Tensor]:
        """``[B, F]`` float32."""
        W_enc = self.W.float().T
        return [reference.pre_activations(x.float(), W_enc, self.b_enc, self.b_dec) for x in self.x]

    @functools.cached_property
    def csr(self) -> list[CSR]:
        if self.skew is None:
            return [kernels.batch_topk(pre, self.shape.K).csr for pre in self.pre]
        found = (skewed(self.shape, self.skew, seed) for seed in range(VARIANTS))
        return [CSR(*(t.to(self.device) for t in csr)) for csr in found]

    @functools.cached_property
    def z(self) -> list[Tensor]:
        """The selected latents ``[B, F]``, dense."""
        return [csr.dense(self.shape.F).to(self.dtype) for csr in self.csr]

    def require_close(self, what: str, found: Tensor, expected: Tensor) -> None:
        require_close(what, found, expected, RELATIVE[self.name])


@dataclass
class Op:
    """One operation at one size: what each provider calls, and how its result is judged."""

    providers: dict[str, Provider | None]  # the first is ours; None: not installed
    judge: Callable[[Any], None]  # of the result for the first inputs; raises AssertionError
    bytes_moved: int  # from and to memory, the fewest that ours moves
    flops: int = 0
    gathered: int = 0  # bytes of rows at random places, most of them from the cache
    gather: str = "gather"  # of the ceilings, the rate of those
    group: str = ""
    dtype: str = ""

    def check(self, provider: str) -> None:
        self.judge(self.providers[provider](0))

    def roofline_seconds(self, rates: dict[str, float]) -> float:
        """The least time at the machine's rates, where moving and multiplying overlap."""
        multiplying = self.flops / rates[f"flops_{self.dtype}"]
        gathering = self.gathered / rates[self.gather]
        return max(multiplying, gathering, self.bytes_moved / rates["bytes"])


def in_torch(dense: Callable, *arguments: list) -> dict[str, Provider | None]:
    """``dense`` as it is and compiled; of each of ``arguments``, it gets the set's."""
    compiled = torch.compile(dense)
    return {
        "torch, eager": lambda i: dense(*(a[i] for a in arguments)),
        "torch, compiled": lambda i: compiled(*(a[i] for a in arguments)),
    }


def require_equal(what: str, found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), f"not the reference's {what}"


def places(csr: CSR, F: int) -> Tensor:
    """Flat indices ``token * F + latent`` of the selected entries."""
    return (csr.tokens().long() * F + csr.indices)[: int(csr.offsets[-1])].long()


def maxima_of(pre: Tensor) -> Tensor:
    return pre.unflatten(1, (-1, 32)).amax(-1).clamp_min(0)


# --- selections as trained autoencoders have them, and worse ---


def zipf(shape: Shape) -> tuple[Tensor, Tensor]:
    """Latent f is chosen as if in proportion to 1 / (f + 1)."""
    return -torch.arange(1.0, shape.F + 1).log(), torch.full((shape.B,), round(shape.k))


def few(shape: Shape) -> tuple[Tensor, Tensor]:
    """Five latents are in more than a quarter of the tokens, the others in equally many."""
    weights = torch.zeros(shape.F)
    weights[: min(5, shape.F)] = math.log(0.4 * shape.F / shape.k)
    return weights, torch.full((shape.B,), round(shape.k))


def ragged(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tokens have from 1 to 1,000 actives, of every order of magnitude equally many."""
    most = min(1000, shape.F)
    return torch.zeros(shape.F), torch.logspace(0, math.log10(most), shape.B).round().int()


SKEWS = {"Zipf": zipf, "few latents": few, "tokens": ragged}
DEAD = (1000, 9339, 24576)


def skewed(shape: Shape, skew: str, seed: int) -> CSR:
    """A selection of random values: ``SKEWS`` tell the logarithm of each latent's weight, and how many each
    token has."""
    generator = torch.Generator().manual_seed(seed)
    weights, counts = SKEWS[skew](shape)
    counts = counts[torch.randperm(shape.B, generator=generator)]
    # Drawn without replacement: the largest of weights with Gumbel noise.
    noise = -torch.empty(shape.B, shape.F).exponential_(generator=generator).log()
    order = (weights + noise).topk(int(counts.max())).indices
    chosen = torch.zeros(shape.B, shape.F, dtype=torch.bool)
    chosen.scatter_(1, order, torch.arange(order.shape[1]) < counts[:, None])
    values = torch.rand(int(counts.sum()), generator=generator) + 0.5
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return CSR(values, chosen.nonzero()[:, 1].int(), offsets.int())


# --- the operations ---


def encode(inputs: Inputs) -> Op:
    """Pre-activations and their group maxima; torch without the maxima."""
    s, x, W, b_enc, b_dec = inputs.shape, inputs.x, inputs.W, inputs.b_enc, inputs.b_dec
    low = inputs.dtype
    centred = [each - b_dec.to(low) for each in x]

    def dense(x):
        return (x - b_dec.to(low)) @ W.T + b_enc.to(low)

    def in_two(i):
        as_float = {"out_dtype": torch.float32} if x[i].is_cuda and low != torch.float32 else {}
        pre = torch.mm(x[i] - b_dec.to(low), W.T, **as_float).float().add_(b_enc)
        return pre, kernels.group_max(pre)

    def judge(found):
        pre, maxima = found if isinstance(found, tuple) else (found, None)
        inputs.require_close("pre-activations", pre, inputs.pre[0])
        if maxima is not None:
            require_equal("maxima", maxima.values, maxima_of(pre))

    return Op(
        {
            "fastsae": lambda i: kernels.encode_with_group_max(x[i], W.T, b_enc, b_dec),
            "the library's product, then group maxima": in_two,
            **in_torch(dense, x),
            "torch, the product alone": lambda i: centred[i] @ W.T,
        },
        judge,
        bytes_moved=(s.B * s.D + s.F * s.D) * W.element_size() + 4 * s.B * s.F,
        flops=2 * s.B * s.D * s.F,
    )


def group_maxima(inputs: Inputs) -> Op:
    s, pre = inputs.shape, inputs.pre
    return Op(
        {"fastsae": lambda i: kernels.group_max(pre[i]).values, **in_torch(maxima_of, pre)},
        lambda found: require_equal("group maxima", found, maxima_of(pre[0])),
        bytes_moved=s.B * s.F * 4 + s.B * s.F // 8,
    )


def selection(inputs: Inputs) -> Op:
    """The K largest of the batch. Theirs gives the set, or a dense matrix: what they then multiply."""
    s, pre, K = inputs.shape, inputs.pre, inputs.shape.K
    maxima = [kernels.group_max(each) for each in pre]
    expected = reference.batch_topk_mask(pre[0], K).flatten().nonzero().flatten()

    @functools.cache
    def peer():
        from sae_lens.saes.batchtopk_sae import BatchTopK

        return BatchTopK(s.k)

    def dense(pre):
        active = torch.relu(pre).flatten()
        top = active.topk(K, sorted=False)
        return torch.zeros_like(active).scatter(0, top.indices, top.values).view_as(pre)

    def judge(found):
        if isinstance(found, CSR):
            chosen = places(found, s.F)
        else:
            chosen = found.flatten().nonzero().flatten() if found.ndim == 2 else found.sort().values
        require_equal("set", chosen, expected)

    return Op(
        {
            "fastsae": lambda i: kernels.batch_topk(pre[i], K, maxima[i]).csr,
            "fastsae, without group maxima": lambda i: kernels.batch_topk(pre[i], K).csr,
            **in_torch(dense, pre),
            "torch, topk alone": lambda i: pre[i].flatten().topk(K, sorted=False).indices,
            "SAELens": None if missing("SAELens") else lambda i: peer()(pre[i]),
        },
        judge,
        bytes_moved=s.B * s.F // 32 * 4 * 6 + K * 128 * 6 + K * 8,
    )


def per_token_selection(inputs: Inputs) -> Op:
    """The k largest of each token, as sparsify selects."""
    s, pre, k = inputs.shape, inputs.pre, int(inputs.shape.k)
    expected = reference.topk_mask(pre[0], k).flatten().nonzero().flatten()

    def judge(found):
        if isinstance(found, CSR):
            chosen = places(found, s.F)
        else:
            row = torch.arange(s.B, device=inputs.device)[:, None] * s.F
            chosen = (found.indices + row)[found.values > 0].sort().values
        require_equal("set", chosen, expected)

    return Op(
        {
            "fastsae": lambda i: kernels.topk(pre[i], k),
            **in_torch(lambda pre: torch.relu(pre).topk(k, dim=-1, sorted=False), pre),
        },
        judge,
        bytes_moved=4 * s.B * s.F + s.B * k * (128 * 5 + 8),
    )


def transpose(inputs: Inputs) -> Op:
    """The selected entries by latent, in the order of tokens."""
    csr, F = inputs.csr, inputs.shape.F
    in_order = lambda i: csr[i].indices.sort(stable=True).indices
    return Op(
        {"fastsae": lambda i: kernels.csr_to_csc(csr[i], F).positions, "torch, sort": in_order},
        lambda found: require_equal("order", found.long(), in_order(0)),
        bytes_moved=inputs.shape.K * 4 * 10,
    )


def decode(inputs: Inputs) -> Op:
    """``x̂`` of a selection: sparse, or dense where the selection is a dense matrix."""
    s, W, b_dec, csr = inputs.shape, inputs.W, inputs.b_dec, inputs.csr
    bias, entries = b_dec.to(W.dtype), int(csr[0].offsets[-1])
    expected = reference.decode(inputs.z[0].float(), W.float(), b_dec)

    def bag(i):
        weights = csr[i].values.to(W.dtype)
        return bias + torch.nn.functional.embedding_bag(
            csr[i].indices, W, csr[i].offsets[:-1], per_sample_weights=weights, mode="sum"
        )

    return Op(
        {
            "fastsae": lambda i: kernels.sparse_decode(csr[i], W, b_dec),
            **in_torch(lambda z: z @ W + bias, inputs.z),
            "torch, embedding_bag (sparsify's on a CPU)": bag,
        },
        lambda found: inputs.require_close("decode", found, expected),
        bytes_moved=(min(s.F, entries) * s.D + s.B * s.D) * W.element_size() + entries * 8,
        flops=2 * entries * s.D,
        gathered=entries * s.D * W.element_size(),
    )


def update(inputs: Inputs) -> Op:
    """From the residual's gradient to updated weights: both gradients, projection, Adam, renormalisation."""
    s, x, b_dec, csr, z = inputs.shape, inputs.x, inputs.b_dec, inputs.csr, inputs.z
    entries = int(csr[0].offsets[-1])
    W, low, device = reference.normalize_rows(inputs.W.float()), inputs.dtype, inputs.device
    csc = [kernels.csr_to_csc(each, s.F) for each in csr]
    error = [z.float() @ W + b_dec - x.float() for z, x in zip(z, x, strict=True)]
    dY = [(each * (2 / each.numel())).to(low) for each in error]
    lr, step = torch.tensor(3e-4, device=device), torch.ones((), dtype=torch.int64, device=device)
    rows = [kernels.MatrixState.start(W.clone(), split=low == torch.bfloat16) for _ in range(2)]
    vectors = [kernels.BiasState.start(b.clone()) for b in (inputs.b_enc, b_dec)]

    def ours(i):
        kernels.fused_update_(
            rows[0], vectors[0], rows[1], vectors[1], csr[i], csc[i], x[i], dY[i], lr, step
        )
        return rows[0].m, rows[1].m

    def dense_gradients(z, x, dY, W_dec):
        dz = (dY @ W_dec.to(dY.dtype).T) * (z > 0)
        W_enc_gradient = dz.T.float() @ (x.float() - b_dec)
        gradient = (z.T @ dY).float()
        return W_enc_gradient, gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec

    def dense(gradients):
        parameters = [W.clone().requires_grad_() for _ in range(2)]
        on_gpu = device.startswith("cuda")
        adam = torch.optim.Adam(parameters, lr=3e-4, fused=True, capturable=on_gpu)

        def call(i):
            with torch.no_grad():
                w = parameters[1].detach()
                for p, g in zip(parameters, gradients(z[i], x[i], dY[i], w), strict=True):
                    p.grad = g
                adam.step()
                w /= w.norm(dim=1, keepdim=True)
            return tuple(adam.state[p]["exp_avg"] for p in parameters)

        return call

    expected = dense_gradients(z[0].float(), x[0], dY[0].float(), W)

    def judge(moments):
        for name, found, gradient in zip(("W_enc", "W_dec"), moments, expected, strict=True):
            inputs.require_close(f"first moment of {name}", found, 0.1 * gradient)

    return Op(
        {
            "fastsae": ours,
            "torch, eager": dense(dense_gradients),
            "torch, compiled": dense(torch.compile(dense_gradients)),
        },
        judge,
        bytes_moved=2 * s.D * s.F * 24,
        flops=8 * entries * s.D,
        gathered=2 * entries * s.D * x[0].element_size(),
        gather="gather_l2",
    )


def aux_k(inputs: Inputs, n_dead: int | None = None) -> Op:
    """Aux-k's loss and gradients with ``n_dead`` latents dead, or a twelfth; D / 2 of those a token. Buffers are
    as large as a step makes them."""
    s, x, W, b_enc, b_dec = inputs.shape, inputs.x, inputs.W, inputs.b_enc, inputs.b_dec
    since = torch.zeros(s.F, dtype=torch.int64, device=inputs.device)
    count = len(since[::12]) if n_dead is None else min(n_dead, s.F)
    since[torch.arange(count, device=inputs.device) * s.F // count] = 1
    dead, k_aux = since > 0, max(1, s.D // 2)
    lagged = LaggedCounts(lag=1)
    lagged.fill(torch.tensor(count))
    capacity = min(*lagged.update(torch.tensor(count)), s.F)
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(VARIANTS, s.B, s.D, generator=generator).to(inputs.device)

    def ours(i):
        return kernels.aux_k_gradients(
            x[i].float(), residual[i], W, b_enc, W, b_dec, since,
            dead_after=1, max_dead=capacity, k_aux=k_aux,
        ).loss  # fmt: skip

    def dense(i):
        low = torch.autocast(x[i].device.type, torch.bfloat16, enabled=inputs.name == "bf16")
        W_enc, W_dec = (W.float().requires_grad_() for _ in range(2))
        with torch.enable_grad(), low:
            pre = (x[i].float() - b_dec) @ W_enc.T + b_enc
            loss = reference.aux_k_loss(pre, residual[i], W_dec, dead, k_aux)
            loss.backward()
        return loss.detach()

    expected = reference.aux_k_loss(inputs.pre[0], residual[0], W.float(), dead, k_aux)
    return Op(
        {"fastsae": ours, "torch, eager": dense},
        lambda loss: inputs.require_close("aux-k's loss", loss, expected),
        bytes_moved=4 * count * s.D * W.element_size() + 4 * s.B * (count + 2 * s.D),
        flops=5 * 2 * s.B * s.D * count,
    )


OPS: dict[str, tuple[Callable[[Inputs], Op], tuple[str, ...]]] = {
    "encode": (encode, ("fp32", "bf16")),
    "group maxima": (group_maxima, ("fp32",)),
    "selection": (selection, ("fp32",)),
    "selection per token": (per_token_selection, ("fp32",)),
    "transpose": (transpose, ("fp32",)),
    "decode": (decode, ("fp32", "bf16")),
    "update": (update, ("fp32", "bf16")),
    "aux-k": (aux_k, ("fp32", "bf16")),
}
"""Each operation, and the types of operands at which it is timed."""


def build(name: str, shape: Shape, dtype: str, device: str) -> Op:
    """Operation ``name`` of ``OPS`` at one size."""
    base, _, skew = name.partition(", skewed: ")
    base, _, dead = base.partition(", dead: ")
    inputs = Inputs(shape, dtype, device, skew or None)
    op = aux_k(inputs, int(dead)) if dead else OPS[base][0](inputs)
    op.group, op.dtype = f"{name} | {shape} {dtype}", dtype
    return op


def cases() -> list[tuple[str, str, str]]:
    """Operation, dtype and provider of everything there is to time."""
    small = Shape(8, 32, 64, 2)
    others = [f"{name}, skewed: {skew}" for name in ("decode", "update") for skew in SKEWS]
    others += [f"aux-k, dead: {count}" for count in DEAD]
    return [
        (name, "bf16", provider) for name in others for provider in ("fastsae", "torch, eager")
    ] + [
        (name, dtype, provider)
        for name, (_, dtypes) in OPS.items()
        for dtype in dtypes
        for provider in build(name, small, dtype, "cpu").providers
    ]
