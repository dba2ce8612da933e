"""Keeping decoder rows on the unit sphere: the tangent gradient and the renormalisation.

    P(W, G)[f] = G[f] - (<G[f], W[f]> / ‖W[f]‖²) · W[f]
    N(W)[f]    = W[f] / ‖W[f]‖

Shapes: ``W_dec [F, D]``, ``gradient [F, D]``; float64, float32, bfloat16 or float16. A zero row projects
nothing and stays zero. Computed in float32 (float64 for float64) and rounded once. One program a row,
one fixed order of summation: bitwise reproducible.

Bytes moved, ``e`` an element: projection ``3·F·D·e``, normalisation ``2·F·D·e``. The training step
moves none of them: :mod:`.update` does both while it holds the row.
"""

import torch
from torch import Tensor

from .dispatch import implementation, jit, power_of_2, register, save_inputs, tl
from .dtypes import TINY, rounded, upcast


@jit
def tangent(gradient, w):
    """``gradient`` less its component along the row ``w``, both ``[BLOCK_D]``, zero where masked."""
    along = tl.sum(gradient * w, 0) / tl.maximum(tl.sum(w * w, 0), TINY)
    return gradient - along * w


@jit
def unit(w):
    """``w`` of norm 1, or zero."""
    return w * (1.0 / tl.maximum(tl.sqrt(tl.sum(w * w, 0)), TINY))


@jit
def project_gradient_kernel(W_dec_ptr, gradient_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * D + columns
    w = tl.load(W_dec_ptr + at, mask=columns < D, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + at, mask=columns < D, other=0.0).to(tl.float32)
    projected = rounded(tangent(gradient, w), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, projected, mask=columns < D)


@jit
def normalize_rows_kernel(W_dec_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * D + columns
    w = tl.load(W_dec_ptr + at, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(unit(w), out_ptr.dtype.element_ty), mask=columns < D)


def row_blocks(width: int) -> dict[str, int]:
    """A whole row a program: the power of two above it, eight elements a thread."""
    block = max(16, power_of_2(width))
    return {"BLOCK_D": block, "num_warps": min(16, max(4, block // 256))}


def _launch(kernel, out: Tensor, **tensors: Tensor) -> Tensor:
    if out.numel():
        width = out.shape[1]
        kernel[(len(out),)](**tensors, out_ptr=out, D=width, **row_blocks(width))
    return out


def _along(w: Tensor, rows: Tensor) -> Tensor:
    """``<rows[f], w[f]> / ‖w[f]‖²`` as ``[F, 1]``."""
    norm2 = torch.linalg.vecdot(w, w).clamp_min(torch.finfo(w.dtype).tiny)
    return (torch.linalg.vecdot(rows, w) / norm2)[:, None]


def _tangent_torch(W_dec: Tensor, gradient: Tensor) -> Tensor:
    w, g = upcast(W_dec), upcast(gradient)
    return torch.addcmul(g, _along(w, g), w, value=-1).to(gradient.dtype)


def _norms(w: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return norm.clamp_min(torch.finfo(w.dtype).tiny)


def _unit_torch(W_dec: Tensor) -> Tensor:
    w = upcast(W_dec)
    return (w / _norms(w)).to(W_dec.dtype)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _project_gradient_backward(ctx, dP):
    W_dec, gradient = ctx.saved_tensors
    # The projection is symmetric: its own transpose.
    dgradient = project_gradient(W_dec, dP) if ctx.needs_input_grad[1] else None
    dW_dec = None
    if ctx.needs_input_grad[0]:
        w, g, d = (upcast(t) for t in (W_dec, gradient, dP))
        along = _along(w, g)
        dW_dec = (-along * d - _along(w, d) * (g - 2 * along * w)).to(W_dec.dtype)
    return dW_dec, dgradient


@register(
    fake=lambda W_dec, gradient: _contiguous_like(gradient),
    setup_context=save_inputs,
    backward=_project_gradient_backward,
)
def _project_gradient(W_dec: Tensor, gradient: Tensor) -> Tensor:
    W_dec, gradient = W_dec.contiguous(), gradient.contiguous()
    if implementation(W_dec) == "torch":
        return _tangent_torch(W_dec, gradient)
    out = _contiguous_like(gradient)
    return _launch(project_gradient_kernel, out, W_dec_ptr=W_dec, gradient_ptr=gradient)


def _normalize_rows_backward(ctx, dN):
    (W_dec,) = ctx.saved_tensors
    w = upcast(W_dec)
    return (_tangent_torch(w, upcast(dN)) / _norms(w)).to(W_dec.dtype)


@register(fake=_contiguous_like, setup_context=save_inputs, backward=_normalize_rows_backward)
def _normalize_rows(W_dec: Tensor) -> Tensor:
    W_dec = W_dec.contiguous()
    if implementation(W_dec) == "torch":
        return _unit_torch(W_dec)
    return _launch(normalize_rows_kernel, _contiguous_like(W_dec), W_dec_ptr=W_dec)


@register(fake=lambda W_dec, gradient: None, mutates_args=("gradient",))
def _project_gradient_(W_dec: Tensor, gradient: Tensor) -> None:
    if implementation(W_dec) == "torch":
        gradient.copy_(_tangent_torch(W_dec, gradient))
    else:
        W_dec = W_dec.contiguous()
        _launch(project_gradient_kernel, gradient, W_dec_ptr=W_dec, gradient_ptr=gradient)


@register(fake=lambda W_dec: None, mutates_args=("W_dec",))
def _normalize_rows_(W_dec: Tensor) -> None:
    if implementation(W_dec) == "torch":
        W_dec.copy_(_unit_torch(W_dec))
    else:
        _launch(normalize_rows_kernel, W_dec, W_dec_ptr=W_dec)


def _check_rows(name: str, tensor: Tensor, *, in_place: bool = False) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected [F, D], got {list(tensor.shape)}")
    if in_place and not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor to update in place, got strides {tensor.stride()}; "
            "use the form without the underscore"
        )


def _check_pair(W_dec: Tensor, gradient: Tensor, *, in_place: bool = False) -> None:
    _check_rows("gradient", gradient, in_place=in_place)
    if W_dec.shape != gradient.shape:
        raise ValueError(
            f"gradient: expected the shape of W_dec, {list(W_dec.shape)}, got {list(gradient.shape)}"
        )


def project_gradient(W_dec: Tensor, gradient: Tensor) -> Tensor:
    """``gradient [F, D]`` with the component along each row of ``W_dec [F, D]`` removed.

    Returns a new tensor of ``gradient``'s dtype, orthogonal to ``W_dec`` row by row. Differentiable
    in both, not twice. Raises ValueError if the shapes differ.
    """
    _check_pair(W_dec, gradient)
    return _project_gradient(W_dec, gradient)


def project_gradient_(W_dec: Tensor, gradient: Tensor) -> Tensor:
    """:func:`project_gradient` in place, on a contiguous ``gradient``, which it returns."""
    _check_pair(W_dec, gradient, in_place=True)
    _project_gradient_(W_dec, gradient)
    return gradient


def normalize_rows(W_dec: Tensor) -> Tensor:
    """``W_dec [F, D]`` with rows of norm 1, as a new tensor; differentiable, not twice.

    Raises ValueError on anything but a matrix.
    """
    _check_rows("W_dec", W_dec)
    return _normalize_rows(W_dec)


def normalize_rows_(W_dec: Tensor) -> Tensor:
    """:func:`normalize_rows` in place, on a contiguous ``W_dec``, which it returns."""
    _check_rows("W_dec", W_dec, in_place=True)
    _normalize_rows_(W_dec)
    return W_dec
