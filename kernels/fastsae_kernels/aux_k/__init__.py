"""Aux-k: the dead latents alone explain what the reconstruction left over.

With ``r = x - x̂ [B, D]``, not differentiated, and ``S`` the ``n`` dead latents (columns of ``Z``):

    Z     = (x - b_dec) @ W_enc[S]ᵀ + b_enc[S]              [B, n], of each row the k_aux largest
    A     = Z where selected and positive, else 0
    E     = A @ W_dec[S] - r
    aux   = s · Σ E² / B,   s = min(n / k_aux, 1) / denominator
    dE    = s · 2 E / B;    dA = (dE @ W_dec[S]ᵀ) where A > 0
    dW_dec[S] = Aᵀ dE,   dW_enc[S] = dAᵀ (x - b_dec),   db_enc[S] = Σ_b dA
    db_dec    = 0: of what latents share, b_dec is taken as given

The denominator is the mean over tokens of ``‖r - mean_B r‖²`` (``residual_variance``), that of ``x``
(``total_variance``), or 1 (``none``). Where it vanishes, or nothing is dead, all is zero.
Ties of ``Z`` go to the lower latent. Source: Gao et al. 2024 (arXiv:2406.04093), A.2.

Dense matrix products over the dead latents, compacted: a token selects ``k_aux`` (hundreds) of few
columns, and gathering them would be slower. On CUDA the number of columns is a bound that the caller
chooses, so nothing waits for the device; on a CPU the number of dead latents costs nothing to know.
Around the products are five kernels: they number the dead, keep each row's largest, take the error's
gradient in two, and add up ``dA`` while they round it.

Deterministic, given deterministic matrix products. Five products of ``2·B·n·D`` FLOP; bytes besides:
``4·n·D`` weights and gradients, about ``28·B·n`` for ``Z``, ``A`` and ``dA``, of operands of 2 bytes.

On a CPU where ``k_aux`` is a small part of ``n``, gathering at the selected entries beats the dense
product, if the tables it gathers from fit the cache: ``E = A @ W_dec[S]`` goes by narrow strips of
columns, the rest by blocks of latents. ``2·B·n·D`` FLOP for ``Z``, and four times ``2·B·k_aux·D``.
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..dispatch import implementation, register
from ..dtypes import accumulator
from ..reference import AuxNormalization
from ..update.state import AuxGradients
from . import torch_impl, triton_impl

# On a CPU, so many times k_aux dead latents make A sparse enough to gather.
SPARSE_FROM = 4


class AuxK(NamedTuple):
    loss: Tensor  # [] float32 (float64 for float64), before any coefficient
    gradients: AuxGradients  # of coefficient · loss


def _run(tensor: Tensor, entries: int):
    """What runs on the device of ``tensor``; where there are no ``entries``, torch."""
    return triton_impl if entries and implementation(tensor) == "triton" else torch_impl


def _divisor(normalization: str, residual: Tensor, target: Tensor) -> Tensor | None:
    return {"residual_variance": residual, "total_variance": target}.get(normalization)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in float32 (float64 for float64) and returned in it."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class ActiveDead(NamedTuple):
    """What ``n`` dead latents of a dictionary or of a part of it give on a batch, and what they gave it from."""

    A: Tensor  # [B, n], in the accumulator's dtype or already in the operands'
    centred: Tensor  # [B, D], what the encoder multiplied
    w_dec: Tensor  # [n, D]
    slots: Tensor  # [F] int32: the column of each latent, -1 for none
    n_dead: Tensor  # [], so many of the columns are in use

    def reconstruction(self) -> Tensor:
        """``A @ w_dec [B, D]``, in the accumulator's dtype."""
        return _mm(self.A.to(self.w_dec.dtype), self.w_dec)

    def gradients(self, dE: Tensor) -> AuxGradients:
        """From that of the reconstruction, ``dE [B, D]`` in the operands' dtype."""
        dA = _mm(dE, self.w_dec.T)
        dA, db_enc = _run(dA, dA.numel()).where_active(dA, self.A, dE.dtype)
        dW_enc = _mm(dA.T, self.centred)
        dW_dec = _mm(self.A.to(dE.dtype).T, dE)
        return AuxGradients(dW_enc, db_enc, dW_dec, self.slots)


def active_dead(
    tokens_since_active: Tensor, dead_after: int, n: int, x: Tensor,
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k_aux: int, dtype: torch.dtype,
) -> ActiveDead:  # fmt: skip
    """Of the dead latents, of more than ``n`` those that have been dead longest, each token's ``k_aux`` largest
    positive pre-activations, as precise as ``dtype`` or more."""
    work = accumulator(x.dtype)
    centred = (x.to(work) - b_dec).to(W_enc.dtype)
    run = _run(x, n * len(x))
    latents, slots, n_dead, bias = run.compact(tokens_since_active, dead_after, n, b_enc)
    Z = _mm(centred, W_enc.index_select(0, latents).T)
    A = run.keep_largest(Z, k_aux, bias, n_dead, dtype)
    return ActiveDead(A, centred, W_dec.index_select(0, latents), slots, n_dead)


def loss_and_error_gradient(
    E: Tensor, residual: Tensor, target: Tensor, n_dead: Tensor, k_aux: int, normalization: str,
    coefficient: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``aux []`` and ``coefficient · dE [B, D]`` in ``dtype``, from ``E = A @ W_dec[S] - r``, which is overwritten.

    The coefficient first: with it the gradient is as large as the loss's own, and float16 holds it.
    """
    divisor = _divisor(normalization, residual, target)
    return _run(E, E.numel()).loss_and_error_gradient(E, divisor, n_dead, k_aux, coefficient, dtype)


def _fake_gradients(x, residual, W_enc, b_enc, W_dec, b_dec, since, dead_after, max_dead, *_):
    new = lambda *shape: x.new_empty(shape, dtype=accumulator(x.dtype))
    slots = torch.empty_like(since, dtype=torch.int32)
    rows = (new(max_dead, weights.shape[1]) for weights in (W_enc, W_dec))
    return new(), next(rows), new(max_dead), next(rows), slots


@register(fake=_fake_gradients)
def _aux_k_gradients(
    x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    tokens_since_active: Tensor, dead_after: int, max_dead: int,
    k_aux: int, normalization: str, coefficient: float, target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = max_dead
    if implementation(x) == "torch":
        # A CPU knows how many there are without waiting, and multiplies by no more than those.
        n = min(n, int((tokens_since_active >= dead_after).sum()))
    gather = not x.is_cuda and implementation(x) == "torch" and 0 < SPARSE_FROM * k_aux < n
    target = x if target is None else target
    weights = W_enc, b_enc, W_dec, b_dec
    if gather:
        loss, slots, *gradients = torch_impl.gathered_gradients(
            tokens_since_active, dead_after, n, x, residual, *weights,
            _divisor(normalization, residual, target), k_aux, coefficient,
        )  # fmt: skip
    else:
        dtype = W_dec.dtype
        active = active_dead(tokens_since_active, dead_after, n, x, *weights, k_aux, dtype)
        E = active.reconstruction().sub_(residual)
        loss, dE = loss_and_error_gradient(
            E, residual, target, active.n_dead, k_aux, normalization, coefficient, dtype
        )
        *gradients, slots = active.gradients(dE)
    if n < max_dead:
        spare = (0, max_dead - n)
        fill = lambda t: torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + spare)
        gradients = [fill(gradient) for gradient in gradients]
    dW_enc, db_enc, dW_dec = gradients
    return loss, dW_enc, db_enc, dW_dec, slots


def aux_k_gradients(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    tokens_since_active: Tensor,
    *,
    dead_after: int,
    max_dead: int,
    k_aux: int,
    normalization: AuxNormalization = "residual_variance",
    coefficient: float = 1.0,
    target: Tensor | None = None,
) -> AuxK:
    """Aux-k's loss and the gradients of ``coefficient · loss``, as :func:`fused_update_` takes them.

    ``x``, ``residual [B, D]``; ``W_enc``, ``W_dec [F, D]`` (both one latent a row, both of one dtype:
    what the forward pass multiplied by), ``b_enc [F]``, ``b_dec [D]``; ``tokens_since_active [F]``
    int64: a latent is dead from ``dead_after`` on. ``max_dead`` bounds how many dead latents take
    part, and is the number of rows of the buffers; beyond it the longest dead take part (the lower
    latent of equals), as if the others were alive. Nothing waits for the device.

    Of a transcoder, ``x`` and ``W_enc`` may have another width than ``residual`` and ``W_dec``, ``b_dec`` is a zero
    of the former's (``x`` is centred already), and ``target [B, D]`` is what ``total_variance`` is of.

    Sums are float32 (float64 for float64). Raises ValueError on an unknown normalization, on negative
    sizes and on shapes that do not fit. Not differentiable.
    """
    known = get_args(AuxNormalization)
    if normalization not in known:
        raise ValueError(f"normalization: expected one of {known}, got {normalization!r}")
    for name, size in (("k_aux", k_aux), ("max_dead", max_dead)):
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {size}")
    if len(W_enc) != len(W_dec) or W_enc.dtype != W_dec.dtype:
        raise ValueError(
            "W_enc and W_dec: expected two [F, D] tensors of one dtype, got "
            f"{list(W_enc.shape)} {W_enc.dtype} and {list(W_dec.shape)} {W_dec.dtype}"
        )
    if (x.shape[1:], *residual.shape) != (W_enc.shape[1:], len(x), W_dec.shape[1]):
        raise ValueError(
            f"x and residual: expected [B, {W_enc.shape[1]}] and [B, {W_dec.shape[1]}], got "
            f"{list(x.shape)} and {list(residual.shape)}"
        )
    if tokens_since_active.shape != W_dec.shape[:1]:
        raise ValueError(
            f"tokens_since_active: expected [{len(W_dec)}], got {list(tokens_since_active.shape)}"
        )
    loss, *gradients = _aux_k_gradients(
        x, residual, W_enc, b_enc, W_dec, b_dec,
        tokens_since_active, dead_after, min(max_dead, len(W_dec)),
        k_aux, normalization, coefficient, target,
    )  # fmt: skip
    return AuxK(loss, AuxGradients(*gradients))
