"""From the residual to the updated weights in one pass over the dictionary.

Per latent ``f``, with ``(b, z)`` its actives (its CSC segment) and ``dY = dL/dx̂``:

    dz[b]    = <dY[b], W_dec[f]>
    dW_dec   = Σ z[b] · dY[b]           projected:  dW_dec - (<dW_dec, w> / ‖w‖²) · w,  w = W_dec[f]
    dW_enc   = Σ dz[b] · (x[b] - b_dec)
    db_enc   = Σ dz[b]
    Adam on W_dec[f], W_enc[f] and b_enc[f];  W_dec[f] /= ‖W_dec[f]‖
and then
    db_dec   = Σ_b dY[b] - Σ_f db_enc[f] · W_enc[f]  (W_enc before its update);  Adam on b_dec

Aux-k's gradients of the dead rows are added to ``dW_dec``, ``dW_enc`` and ``db_enc``, and not to
``db_dec``: they move the latents they belong to and nothing that others share.

``W_enc`` and ``W_dec`` are both stored ``[F, D]``: one latent, one row of each. The gradients of a row
exist only while its program runs; the dense ``[F, D]`` gradient never does. A latent without actives
still gets its Adam step, with a zero gradient. Gradients are of the master weights.

Shapes: ``x``, ``dY [B, D]``, any float dtype; the state as in :mod:`.state`; ``csr`` and ``csc``
of one selection. Everything is summed in float32 (float64 on torch for float64 weights).

Deterministic: a segment's entries are added in token order; segments of more than 128 are summed in
chunks first (:mod:`..segments`), and ``db_dec`` over blocks of 8 latents, then over the blocks. No
atomics, nothing autotuned, no synchronisation, ``lr``, step and clip factor read on the device: a CUDA
graph of it can be replayed for every step.

Bytes moved, for the 2·F·D parameters: 24 each with float32 masters and moments (26 with a 16-bit copy,
24 split, 12 split with 8-bit moments), plus ``2·nnz·D·e`` gathered through L2.
"""

import torch
from torch import Tensor

from ..dispatch import implementation, register
from ..sparse import CSC, CSR
from . import torch_impl, triton_impl
from .state import AuxGradients, BiasState, GradientInputs, MatrixState

# --- operations ---------------------------------------------------------------------------------


def _aux(*gradients: Tensor | None) -> AuxGradients | None:
    W_enc, b_enc, W_dec, slots = gradients
    if W_enc is None or b_enc is None or W_dec is None or slots is None:
        return None
    # Without rows there is nothing to add, and no row to point at.
    return AuxGradients(W_enc, b_enc, W_dec, slots) if len(b_enc) else None


@register(
    fake=lambda W_enc, W_enc_remainder, W_dec, W_dec_remainder, b_dec, *_: b_dec.new_empty(())
)
def _gradient_norm(
    W_enc: Tensor, W_enc_remainder: Tensor | None, W_dec: Tensor, W_dec_remainder: Tensor | None,
    b_dec: Tensor, values: Tensor, rows: Tensor, positions: Tensor, offsets: Tensor,
    x: Tensor, dY: Tensor, dY_scale: float,
    aux_W_enc: Tensor | None, aux_b_enc: Tensor | None, aux_W_dec: Tensor | None,
    aux_slots: Tensor | None,
) -> Tensor:  # fmt: skip
    csc, aux = CSC(rows, positions, offsets), _aux(aux_W_enc, aux_b_enc, aux_W_dec, aux_slots)
    return (torch_impl if implementation(b_dec) == "torch" else triton_impl).gradient_norm(
        MatrixState(W_enc, W_enc, W_enc, W_enc_remainder),
        MatrixState(W_dec, W_dec, W_dec, W_dec_remainder),
        b_dec,
        GradientInputs(values, csc, x, dY, dY_scale, aux),
    )


_PARTS = ("", "_m", "_v", "_remainder", "_copy", "_m_scale", "_v_scale")
_STATE = tuple(
    [f"{name}{part}" for name in ("W_enc", "W_dec") for part in _PARTS]
    + [f"{name}{part}" for name in ("b_enc", "b_dec") for part in _PARTS[:3]]
)


@register(fake=lambda *_: None, mutates_args=_STATE)
def _fused_update_(
    W_enc: Tensor, W_enc_m: Tensor, W_enc_v: Tensor, W_enc_remainder: Tensor | None,
    W_enc_copy: Tensor | None, W_enc_m_scale: Tensor | None, W_enc_v_scale: Tensor | None,
    b_enc: Tensor, b_enc_m: Tensor, b_enc_v: Tensor,
    W_dec: Tensor, W_dec_m: Tensor, W_dec_v: Tensor, W_dec_remainder: Tensor | None,
    W_dec_copy: Tensor | None, W_dec_m_scale: Tensor | None, W_dec_v_scale: Tensor | None,
    b_dec: Tensor, b_dec_m: Tensor, b_dec_v: Tensor,
    values: Tensor, rows: Tensor, positions: Tensor, offsets: Tensor,
    x: Tensor, dY: Tensor, dY_scale: float,
    aux_W_enc: Tensor | None, aux_b_enc: Tensor | None, aux_W_dec: Tensor | None,
    aux_slots: Tensor | None,
    lr: Tensor, step: Tensor, clip: Tensor | None, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    csc, aux = CSC(rows, positions, offsets), _aux(aux_W_enc, aux_b_enc, aux_W_dec, aux_slots)
    (torch_impl if implementation(b_dec) == "torch" else triton_impl).fused_update(
        MatrixState(
            W_enc, W_enc_m, W_enc_v, W_enc_remainder, W_enc_copy, W_enc_m_scale, W_enc_v_scale
        ),
        BiasState(b_enc, b_enc_m, b_enc_v),
        MatrixState(
            W_dec, W_dec_m, W_dec_v, W_dec_remainder, W_dec_copy, W_dec_m_scale, W_dec_v_scale
        ),
        BiasState(b_dec, b_dec_m, b_dec_v),
        GradientInputs(values, csc, x, dY, dY_scale, aux),
        lr, step, clip, (beta1, beta2), eps,
    )  # fmt: skip


# --- public -------------------------------------------------------------------------------------


def _check(
    W_enc: MatrixState,
    W_dec: MatrixState,
    b_dec: Tensor,
    csr: CSR,
    csc: CSC,
    x: Tensor,
    dY: Tensor,
    aux: AuxGradients | None,
) -> None:
    latents, width = W_dec.weight.shape
    expected = {
        "W_enc.weight": (W_enc.weight, (latents, width)),
        "b_dec": (b_dec, (width,)),
        "csc.rows": (csc.rows, csr.values.shape),
        "csc.positions": (csc.positions, csr.values.shape),
        "csc.offsets": (csc.offsets, (latents + 1,)),
        "x": (x, (len(csr.offsets) - 1, width)),
        "dY": (dY, (len(csr.offsets) - 1, width)),
    }
    for name, state in (("W_enc", W_enc), ("W_dec", W_dec)):
        for part, tensor in state._asdict().items():
            if tensor is not None:
                shape = (latents,) if part.endswith("scale") else (latents, width)
                expected[f"{name}.{part}"] = (tensor, shape)
    if aux is not None:
        expected |= {
            "aux_gradients.W_enc": (aux.W_enc, (len(aux.b_enc), width)),
            "aux_gradients.W_dec": (aux.W_dec, (len(aux.b_enc), width)),
            "aux_gradients.slots": (aux.slots, (latents,)),
        }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    for name, state in (("W_enc", W_enc), ("W_dec", W_dec)):
        stored = b_dec.dtype if state.remainder is None else torch.bfloat16
        if state.weight.dtype != stored:
            raise ValueError(
                f"{name}.weight: expected {stored} (b_dec's dtype, or bfloat16 beside a remainder), "
                f"got {state.weight.dtype}"
            )
    if b_dec.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"b_dec: expected float32 or float64, got {b_dec.dtype}")


def gradient_norm(
    W_enc: MatrixState,
    W_dec: MatrixState,
    b_dec: Tensor,
    csr: CSR,
    csc: CSC,
    x: Tensor,
    dY: Tensor,
    *,
    dY_scale: float = 1.0,
    aux_gradients: AuxGradients | None = None,
) -> Tensor:
    """The joint 2-norm ``[]`` of the four gradients, the decoder's projected, before any clipping.

    Exactly what :func:`fused_update_` is about to apply, computed once more: one pass over the
    weights' rows (``2·F·D`` masters read) and the gathers. The arguments are the same. Float32
    (float64 for float64 weights); bitwise reproducible; nothing waits for the device.
    """
    _check(W_enc, W_dec, b_dec, csr, csc, x, dY, aux_gradients)
    return _gradient_norm(
        W_enc.weight, W_enc.remainder, W_dec.weight, W_dec.remainder,
        b_dec, csr.values, *csc,
        x, dY, dY_scale,
        *(aux_gradients or (None,) * 4),
    )  # fmt: skip


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / norm)`` ``[]`` on the device of ``norm``: what ``clip`` takes."""
    return torch.where(norm > max_norm, max_norm / norm, 1.0)


def fused_update_(
    W_enc: MatrixState,
    b_enc: BiasState,
    W_dec: MatrixState,
    b_dec: BiasState,
    csr: CSR,
    csc: CSC,
    x: Tensor,
    dY: Tensor,
    lr: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    dY_scale: float = 1.0,
    aux_gradients: AuxGradients | None = None,
    clip: Tensor | None = None,
) -> None:
    """One optimizer step in place: gradients, projection, clipping, Adam, renormalisation.

    ``W_enc`` and ``W_dec`` are :class:`MatrixState` ``[F, D]``, ``b_enc [F]`` and ``b_dec [D]``
    :class:`BiasState`. ``x [B, D]`` is the scaled input, ``dY_scale · dY [B, D]`` the loss's gradient at
    ``x̂``: the residual of :func:`sparse_decode_loss` with ``dY_scale = -2 / (B·D)``. ``lr []`` is a
    float tensor and ``step []`` an int64 tensor that counts from 1, both on the device, as is the
    ``clip []`` that multiplies every gradient after the projection (:func:`clip_factor`).

    All float tensors of the state are contiguous. Raises ValueError, before anything is written, on
    shapes, strides or dtypes that do not fit. Not differentiable. See the module for the mathematics,
    the determinism and the bytes moved.
    """
    _check(W_enc, W_dec, b_dec.weight, csr, csc, x, dY, aux_gradients)
    for name, vector, length in (("b_enc", b_enc, len(W_enc.weight)), ("b_dec", b_dec, x.shape[1])):
        for part, tensor in vector._asdict().items():
            if tensor.shape != (length,) or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}.{part}: expected a contiguous tensor of shape [{length}], got shape "
                    f"{list(tensor.shape)}, strides {tensor.stride()}"
                )
    if lr.numel() != 1 or step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(
            "lr and step: expected one-element tensors, step int64, got "
            f"{list(lr.shape)} and {list(step.shape)} {step.dtype}"
        )
    _fused_update_(
        *W_enc, *b_enc, *W_dec, *b_dec,
        csr.values, *csc,
        x, dY, dY_scale,
        *(aux_gradients or (None,) * 4),
        lr, step, clip, *betas, eps,
    )  # fmt: skip
