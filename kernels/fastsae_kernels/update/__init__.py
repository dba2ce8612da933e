"""From the residual to the updated weights in one pass over the dictionary.

Per latent ``f``, with ``(b, z)`` its actives (its CSC segment) and ``dY = dL/dx̂``:

    dz[b]    = <dY[b], W_dec[f]>
    dW_dec   = Σ z[b] · dY[b]           projected:  dW_dec - (<dW_dec, w> / ‖w‖²) · w,  w = W_dec[f]
    dW_enc   = Σ dz[b] · (x[b] - b_dec)
    db_enc   = Σ dz[b]
    Adam on W_dec[f], W_enc[f] and b_enc[f];  W_dec[f] /= ‖W_dec[f]‖
and then
    db_dec   = Σ_b dY[b] - Σ_f db_enc[f] · W_enc[f]  (W_enc before its update);  Adam on b_dec

Nested (Matryoshka), there is a ``dY`` for each prefix of the dictionary (:func:`..nested_gradient`), and a
latent takes that of the first prefix it is in; ``b_dec``, that of the first of all.

Of a transcoder (``tied=False``), whose ``x`` is centred already and whose ``dY`` is of another tensor,
``dW_enc = Σ dz[b] · x[b]`` and ``db_dec = Σ_b dY[b]``.

Aux-k's gradients of the dead rows are added to ``dW_dec``, ``dW_enc`` and ``db_enc``, and not to
``db_dec``: they move the latents they belong to and nothing that others share. Gradients are of the
master weights; those of a row exist only while it is updated, the dense ``[F, D]`` gradient never does.
A latent without actives still gets its Adam step, with a zero gradient.

Shapes: ``W_enc``, ``W_dec [F, D]`` (one latent, one row of each), the state as in :mod:`.state`;
``x``, ``dY [B, D]``, any float dtype (of a transcoder ``W_dec``, ``b_dec`` and ``dY`` may have another width); ``csr`` and ``csc`` of one selection. Everything is summed in
float32 (float64 on torch for float64 weights).

Deterministic: a segment's entries are added in token order; segments of more than 128 are summed in
chunks first (:mod:`..segments`), and ``db_dec`` over blocks of 8 latents, then over 32 blocks, or 32
tokens, then over those. No atomics, nothing autotuned, no synchronisation, ``lr``, step and clip factor read on the device: a CUDA
graph of it can be replayed for every step.

Bytes moved, for the 2·F·D parameters: 24 each with float32 moments, 12 with 8-bit ones, plus ``2·nnz·D·e`` gathered through L2.
"""

import torch
from torch import Tensor

from ..dispatch import implementation, register
from ..sparse import CSC, CSR
from . import torch_impl, triton_impl
from .state import Adam, AuxGradients, Batch, BiasState, MatrixState, Parameters


def _inputs(batch: list[Tensor], dY_scale: float, aux: list[Tensor], tied: bool) -> Batch:
    values, rows, positions, offsets, x, dY, *levels = batch
    csc, dead = CSC(rows, positions, offsets), AuxGradients(*aux) if aux else None
    return Batch(values, csc, x, dY, dY_scale, dead, levels[0] if levels else None, tied)


def _parts(state: MatrixState) -> tuple[list[Tensor], str]:
    """The tensors that there are, and their names: a list that is written to must not hold None."""
    parts = {name: tensor for name, tensor in state._asdict().items() if tensor is not None}
    return [*parts.values()], " ".join(parts)


@register(fake=lambda weights, remainders, b_dec, *_: b_dec.new_empty(()))
def _gradient_norm(
    weights: list[Tensor], remainders: list[Tensor | None], b_dec: Tensor,
    batch: list[Tensor], dY_scale: float, aux: list[Tensor], tied: bool = True,
) -> Tensor:  # fmt: skip
    # Moments are not read.
    W_enc, W_dec = (MatrixState(w, w, w, r) for w, r in zip(weights, remainders, strict=True))
    return (torch_impl if implementation(b_dec) == "torch" else triton_impl).gradient_norm(
        W_enc, W_dec, b_dec, _inputs(batch, dY_scale, aux, tied)
    )


@register(fake=lambda *_: None, mutates_args=("W_enc", "b_enc", "W_dec", "b_dec", "db_dec", "step"))
def _fused_update_(
    W_enc: list[Tensor], W_enc_parts: str, b_enc: list[Tensor],
    W_dec: list[Tensor], W_dec_parts: str, b_dec: list[Tensor], db_dec: Tensor | None,
    batch: list[Tensor], dY_scale: float, aux: list[Tensor],
    lr: Tensor, step: Tensor, clip: Tensor | None, beta1: float, beta2: float, eps: float,
    decoder_lr_ratio: float = 1.0, tied: bool = True, first_row: int = 0,
) -> None:  # fmt: skip
    (torch_impl if implementation(b_dec[0]) == "torch" else triton_impl).fused_update(
        Parameters(
            MatrixState(**dict(zip(W_enc_parts.split(), W_enc, strict=True))),
            BiasState(*b_enc),
            MatrixState(**dict(zip(W_dec_parts.split(), W_dec, strict=True))),
            b_dec[0],
            tuple(b_dec[1:]),
            first_row,
        ),
        db_dec,
        _inputs(batch, dY_scale, aux, tied),
        Adam(lr, step, clip, beta1, beta2, eps, decoder_lr_ratio),
    )


def _checked(
    W_enc: MatrixState, W_dec: MatrixState, b_dec: Tensor, biases: dict[str, Tensor],
    csr: CSR, csc: CSC, x: Tensor, dY: Tensor, aux: AuxGradients | None, levels: Tensor | None,
    tied: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The tensors of the batch and of aux-k, after all that the kernels take for granted is checked."""
    latents, width = W_dec.weight.shape
    read = width if tied else W_enc.weight.shape[1]
    slots, tokens = csr.values.shape, len(csr.offsets) - 1
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    expected |= {"csc.rows": (csc.rows, slots), "csc.positions": (csc.positions, slots)}
    expected |= {"csc.offsets": (csc.offsets, (latents + 1,))}
    nested = () if levels is None else (len(levels),)
    expected |= {"x": (x, (tokens, read)), "dY": (dY, (*nested, tokens, width))}
    for name, tensor in biases.items():
        expected[name] = (tensor, (width if name.startswith("b_dec") else latents,))
    for name, state in (("W_enc", W_enc), ("W_dec", W_dec)):
        for part, tensor in state._asdict().items():
            if tensor is not None:
                row = read if name == "W_enc" else width
                shape = (latents,) if part.endswith("scale") else (latents, row)
                expected[f"{name}.{part}"] = (tensor, shape)
    if aux is not None:
        rows = len(aux.b_enc)
        expected |= {"aux_gradients.W_enc": (aux.W_enc, (rows, read))}
        expected |= {"aux_gradients.W_dec": (aux.W_dec, (rows, width))}
        expected |= {"aux_gradients.slots": (aux.slots, (latents,))}
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
    # Without rows there is nothing to add, and no row to point at.
    several = [] if levels is None or len(levels) == 1 else [levels]
    batch = [csr.values, *csc, x, dY if nested else dY[None], *several]
    return batch, [] if aux is None or not len(aux.b_enc) else [*aux]


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
    levels: Tensor | None = None,
    tied: bool = True,
) -> Tensor:
    """The joint 2-norm ``[]`` of the four gradients, the decoder's projected, before any clipping.

    Exactly what :func:`fused_update_` is about to apply, computed once more: one pass over the
    weights' rows (``2·F·D`` masters read) and the gathers. The arguments are the same. Float32
    (float64 for float64 weights); bitwise reproducible; nothing waits for the device.
    """
    batch, aux = _checked(
        W_enc, W_dec, b_dec, {"b_dec": b_dec}, csr, csc, x, dY, aux_gradients, levels, tied
    )
    weights, remainders = [W_enc.weight, W_dec.weight], [W_enc.remainder, W_dec.remainder]
    return _gradient_norm(weights, remainders, b_dec, batch, dY_scale, aux, tied)


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
    decoder_lr_ratio: float = 1.0,
    dY_scale: float = 1.0,
    aux_gradients: AuxGradients | None = None,
    clip: Tensor | None = None,
    levels: Tensor | None = None,
    tied: bool = True,
) -> None:
    """One optimizer step in place: gradients, projection, clipping, Adam, renormalisation.

    ``W_enc`` and ``W_dec`` are :class:`MatrixState` ``[F, D]``, ``b_enc [F]`` and ``b_dec [D]``
    :class:`BiasState`. ``x [B, D]`` is the scaled input, ``dY_scale · dY [B, D]`` the loss's gradient at
    ``x̂``: the residual of :func:`sparse_decode_loss` with ``dY_scale = -2 / (B·D)``. ``lr []`` is a
    float tensor, ``decoder_lr_ratio`` times which is ``W_dec``'s learning rate, and ``step []`` an int64 tensor
    that counts the updates, 0 before the first: this one adds 1. Both are on the device, as is the ``clip []``
    that multiplies every gradient after the projection (:func:`clip_factor`).
    With ``levels [L]`` (int32), as :func:`nested_decode_loss` takes them, ``dY`` is ``[L, B, D]``. With ``tied``,
    ``b_dec`` is what ``x`` is centred by too; without, it is the bias of the output alone, which may have another
    width.

    All float tensors of the state are contiguous. Raises ValueError, before anything is written, on
    shapes, strides or dtypes that do not fit. Not differentiable. See the module for the mathematics,
    the determinism and the bytes moved.
    """
    adam = (lr, step, clip, *betas, eps, decoder_lr_ratio)
    parts = (W_enc, b_enc, W_dec, [*b_dec]), (csr, csc, x, dY), adam
    _update(*parts, None, dY_scale, aux_gradients, levels, tied, 0)


def fused_update_latents_(
    W_enc: MatrixState,
    b_enc: BiasState,
    W_dec: MatrixState,
    b_dec: Tensor,
    csr: CSR,
    csc: CSC,
    x: Tensor,
    dY: Tensor,
    lr: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decoder_lr_ratio: float = 1.0,
    dY_scale: float = 1.0,
    aux_gradients: AuxGradients | None = None,
    first_row: int = 0,
) -> Tensor:
    """:func:`fused_update_` of some consecutive latents of a dictionary, ``first_row`` and those after it.

    The state, ``csr`` and ``csc`` hold these latents alone. ``b_dec [D]`` is only read, and so is ``step []``,
    the number of this update, from 1. Returns what they add to ``b_dec``'s gradient ``[D]``,
    ``-Σ_f db_enc[f] · W_enc[f]``, beside the ``Σ_b dY[b]`` of no latent. Their rows, 8-bit moments too,
    become what they become in an update of the whole dictionary.
    """
    part = torch.empty_like(b_dec)
    adam = (lr, step, None, *betas, eps, decoder_lr_ratio)
    parts = (W_enc, b_enc, W_dec, [b_dec]), (csr, csc, x, dY), adam
    _update(*parts, part, dY_scale, aux_gradients, None, True, first_row)
    return part


def _update(
    state: tuple[MatrixState, BiasState, MatrixState, list[Tensor]],
    inputs: tuple[CSR, CSC, Tensor, Tensor],
    adam: tuple[Tensor, Tensor, Tensor | None, float, float, float, float],
    db_dec: Tensor | None,
    dY_scale: float, aux_gradients: AuxGradients | None, levels: Tensor | None, tied: bool,
    first_row: int,
) -> None:  # fmt: skip
    """Check, then update; of some latents ``db_dec`` takes what they add to its gradient."""
    W_enc, b_enc, W_dec, b_dec = state
    biases = {f"b_enc.{part}": tensor for part, tensor in b_enc._asdict().items()}
    biases |= {f"b_dec.{i}": tensor for i, tensor in zip(BiasState._fields, b_dec, strict=False)}
    batch, aux = _checked(W_enc, W_dec, b_dec[0], biases, *inputs, aux_gradients, levels, tied)
    lr, step, *_ = adam
    if lr.numel() != 1 or step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(
            "lr and step: expected one-element tensors, step int64, got "
            f"{list(lr.shape)} and {list(step.shape)} {step.dtype}"
        )
    parameters = (*_parts(W_enc), [*b_enc], *_parts(W_dec), b_dec, db_dec)
    _fused_update_(*parameters, batch, dY_scale, aux, *adam, tied, first_row)
