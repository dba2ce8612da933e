"""From the residual to the updated weights in one pass over the dictionary.

Per latent ``f``, with ``(b, z)`` its actives (its CSC segment) and ``dY = dL/dx̂``:

    dz[b]    = <dY[b], W_dec[f]>
    dW_dec   = Σ z[b] · dY[b]           projected:  dW_dec - (<dW_dec, w> / ‖w‖²) · w,  w = W_dec[f]
    dW_enc   = Σ dz[b] · (x[b] - b_dec)
    db_enc   = Σ dz[b]
    Adam on W_dec[f], W_enc[f] and b_enc[f];  W_dec[f] /= ‖W_dec[f]‖
and then
    db_dec   = Σ_b dY[b] - Σ_f db_enc[f] · W_enc[f]  (W_enc before its update);  Adam on b_dec

Extra gradients of some rows (aux-k's) are added to ``dW_dec``, ``dW_enc`` and ``db_enc``, and not to
``db_dec``: they move the latents they belong to and nothing that others share.

``W_enc`` and ``W_dec`` are both stored ``[F, D]``: one latent, one row of each. The gradients of a row
exist only while its program runs; the dense ``[F, D]`` gradient never does. A latent without actives
still gets its Adam step, with a zero gradient. Gradients are of the master weights.

Shapes: ``x``, ``dY [B, D]``, any float dtype; the state as in :mod:`.adam_state`; ``csr`` and ``csc``
of one selection. Everything is summed in float32 (float64 on torch for float64 weights).

Deterministic: a segment's entries are added in token order; segments of more than 128 are summed in
chunks first (:mod:`.segments`), and ``db_dec`` over groups of 8 latents, then over the groups. No
atomics, nothing autotuned, no synchronisation, ``lr``, step and clip factor read on the device: a CUDA
graph of it can be replayed for every step.

Bytes moved, for the 2·F·D parameters: 24 each with float32 masters and moments (26 with a 16-bit copy,
24 split, 12 split with 8-bit moments), plus ``2·nnz·D·e`` gathered through L2.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .adam_state import (
    Rows,
    Vector,
    decode_moment,
    encode_moment_,
    join_master,
    load_master,
    load_moment,
    split_master,
    store_master,
    store_moment,
)
from .aot import WIDTHS, Case
from .decoder_norm import row_blocks, tangent, unit
from .dispatch import implementation, jit, register, tl, triton
from .segments import CHUNK, chunk_capacity, long_segments
from .sparse import CSC, CSR
from .sparse_decoder import column_block, launch_chunk_sums, weighted_sum
from .sparse_products import row_sums, sampled_products

# Entries of a segment taken together, and latents a program updates one after another.
BLOCK_T = 1
GROUP = 8
BLOCK_BIAS = 256
# Said aloud, or the assembler spills a few registers to reach the next step of occupancy.
MAX_REGISTERS = 128
# Latents the torch path updates together: both gradients of a block stay in the cache.
TORCH_BLOCK = 512


class ExtraGradient(NamedTuple):
    """Gradient terms of some latents, computed elsewhere (aux-k): ``n`` rows and a way to find them."""

    W_enc: Tensor  # [n, D] float32 (float64 on torch)
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, D]
    slots: Tensor  # [F] int32: the row of each latent, -1 for none


# --- kernels ------------------------------------------------------------------------------------
#
# Two kernels rather than one, the decoder's rows first: either holds half of the vectors, so twice
# as many latents are in flight, and all that passes between them is dz, one float an active.


@jit
def _decoder_segment(
    begin,
    end,
    rows_ptr,
    positions_ptr,
    values_ptr,
    dY_ptr,
    dz_ptr,
    w,
    columns,
    D,
    dY_scale,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dW_dec`` of the entries ``[begin, end)`` of one latent's segment; their ``dz`` is stored."""
    dW_dec = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_T):
        entry = first + tl.arange(0, BLOCK_T)
        inside = entry < end
        token = tl.load(rows_ptr + entry, mask=inside, other=0).to(tl.int64)
        position = tl.load(positions_ptr + entry, mask=inside, other=0)
        z = tl.load(values_ptr + position, mask=inside, other=0.0).to(tl.float32)
        dY = tl.load(  # [BLOCK_T, BLOCK_D]
            dY_ptr + token[:, None] * D + columns[None, :],
            mask=inside[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        tl.store(dz_ptr + entry, tl.sum(dY * w[None, :], 1) * dY_scale, mask=inside)
        dW_dec += tl.sum(z[:, None] * dY, 0)
    return dW_dec * dY_scale


@jit
def _decoder_chunks_kernel(
    W_dec_ptr,
    W_dec_remainder_ptr,
    values_ptr,
    rows_ptr,
    positions_ptr,
    offsets_ptr,
    dY_ptr,
    starts_ptr,
    owners_ptr,
    chunk_dW_dec_ptr,
    dz_ptr,
    F,
    D,
    dY_scale,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk of a long segment a program."""
    chunk = tl.program_id(0)
    if chunk < tl.load(starts_ptr + F):
        columns = tl.arange(0, BLOCK_D)
        inside = columns < D
        f = tl.load(owners_ptr + chunk)
        begin = tl.load(offsets_ptr + f) + (chunk - tl.load(starts_ptr + f)) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offsets_ptr + f + 1))
        w = load_master(W_dec_ptr, W_dec_remainder_ptr, f.to(tl.int64) * D + columns, inside)
        dW_dec = _decoder_segment(
            begin,
            end,
            rows_ptr,
            positions_ptr,
            values_ptr,
            dY_ptr,
            dz_ptr,
            w,
            columns,
            D,
            dY_scale,
            BLOCK_T,
            BLOCK_D,
        )
        tl.store(chunk_dW_dec_ptr + chunk.to(tl.int64) * D + columns, dW_dec, mask=inside)


@jit
def _step_scalars_kernel(
    lr_ptr, step_ptr, clip_ptr, scalars_ptr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr
):
    """``lr / (1 - β1^t)``, ``1 / sqrt(1 - β2^t)`` and the clip factor, from float64."""
    step = tl.load(step_ptr).to(tl.float64)
    correction1 = 1.0 - tl.exp(step * LOG_BETA1)
    correction2 = 1.0 - tl.exp(step * LOG_BETA2)
    tl.store(scalars_ptr, (tl.load(lr_ptr).to(tl.float64) / correction1).to(tl.float32))
    tl.store(scalars_ptr + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    if clip_ptr is not None:
        tl.store(scalars_ptr + 2, tl.load(clip_ptr).to(tl.float32))


@jit
def _adam(
    weight, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1: tl.constexpr, BETA2: tl.constexpr
):
    """``(weight, m, v)`` after one step of Adam."""
    if clip_ptr is not None:
        gradient *= tl.load(scalars_ptr + 2)
    m = BETA1 * m + (1 - BETA1) * gradient
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    root = tl.sqrt(v) * tl.load(scalars_ptr + 1)
    return weight - tl.load(scalars_ptr) * m / (root + eps), m, v


@jit
def _decoder_kernel(
    W_dec_ptr,
    W_dec_m_ptr,
    W_dec_v_ptr,
    W_dec_remainder_ptr,
    W_dec_copy_ptr,
    W_dec_m_scale_ptr,
    W_dec_v_scale_ptr,
    values_ptr,
    rows_ptr,
    positions_ptr,
    offsets_ptr,
    dY_ptr,
    starts_ptr,
    chunk_dW_dec_ptr,
    slots_ptr,
    extra_dW_dec_ptr,
    dz_ptr,
    squares_ptr,
    scalars_ptr,
    step_ptr,
    clip_ptr,
    D,
    dY_scale,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One latent a program. With ``squares_ptr`` only the projected gradient's norm is taken."""
    f = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    at = f * D + columns
    w = load_master(W_dec_ptr, W_dec_remainder_ptr, at, inside)

    begin = tl.load(offsets_ptr + f)
    end = tl.load(offsets_ptr + f + 1)
    end = tl.where(end - begin > CHUNK, begin, end)
    gradient = _decoder_segment(
        begin,
        end,
        rows_ptr,
        positions_ptr,
        values_ptr,
        dY_ptr,
        dz_ptr,
        w,
        columns,
        D,
        dY_scale,
        BLOCK_T,
        BLOCK_D,
    )
    for chunk in range(tl.load(starts_ptr + f), tl.load(starts_ptr + f + 1)):
        there = tl.cast(chunk, tl.int64) * D + columns
        gradient += tl.load(chunk_dW_dec_ptr + there, mask=inside, other=0.0)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + f).to(tl.int64)
        there = inside & (slot >= 0)
        gradient += tl.load(extra_dW_dec_ptr + slot * D + columns, mask=there, other=0.0)
    gradient = tangent(gradient, w)

    if squares_ptr is not None:
        tl.store(squares_ptr + f, tl.sum(gradient * gradient, 0))
    else:
        step = tl.load(step_ptr).to(tl.int32)
        m = load_moment(W_dec_m_ptr, W_dec_m_scale_ptr, f, at, inside, 127)
        v = load_moment(W_dec_v_ptr, W_dec_v_scale_ptr, f, at, inside, 255)
        w, m, v = _adam(w, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1, BETA2)
        store_master(W_dec_ptr, W_dec_remainder_ptr, W_dec_copy_ptr, at, inside, unit(w))
        store_moment(W_dec_m_ptr, W_dec_m_scale_ptr, f, at, columns, inside, m, step, 127)
        store_moment(W_dec_v_ptr, W_dec_v_scale_ptr, f, at, columns, inside, v, step, 255)


@jit
def _encoder_kernel(
    W_enc_ptr,
    W_enc_m_ptr,
    W_enc_v_ptr,
    W_enc_remainder_ptr,
    W_enc_copy_ptr,
    W_enc_m_scale_ptr,
    W_enc_v_scale_ptr,
    b_dec_ptr,
    rows_ptr,
    offsets_ptr,
    x_ptr,
    starts_ptr,
    chunk_dW_enc_ptr,
    slots_ptr,
    extra_dW_enc_ptr,
    extra_db_enc_ptr,
    dz_ptr,
    db_enc_ptr,
    group_db_dec_ptr,
    squares_ptr,
    scalars_ptr,
    step_ptr,
    clip_ptr,
    F,
    D,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``GROUP`` latents and a tile of columns a program: also ``db_enc``, and their part of ``db_dec``.

    Columns are independent here, but for the scale of 8-bit moments, which needs whole rows. With ``squares_ptr`` only the gradient's norm is taken, and nothing is updated.
    """
    group = tl.program_id(0)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    db_dec = tl.zeros((BLOCK_D,), tl.float32)
    for latent in range(group * GROUP, tl.minimum(group * GROUP + GROUP, F)):
        f = tl.cast(latent, tl.int64)
        begin = tl.load(offsets_ptr + f)
        end = tl.load(offsets_ptr + f + 1)
        db_enc = 0.0
        for first in range(begin, end, CHUNK):
            entry = first + tl.arange(0, CHUNK)
            db_enc += tl.sum(tl.load(dz_ptr + entry, mask=entry < end, other=0.0), 0)
        end = tl.where(end - begin > CHUNK, begin, end)
        gradient = weighted_sum(dz_ptr, rows_ptr, x_ptr, begin, end, columns, D, BLOCK_T, BLOCK_D)
        for chunk in range(tl.load(starts_ptr + f), tl.load(starts_ptr + f + 1)):
            there = tl.cast(chunk, tl.int64) * D + columns
            gradient += tl.load(chunk_dW_enc_ptr + there, mask=inside, other=0.0)
        # Σ dz·(x - b_dec), centred once: b_dec would occupy registers all through the loop.
        gradient -= db_enc * tl.load(b_dec_ptr + columns, mask=inside, other=0.0)
        at = f * D + columns
        w = load_master(W_enc_ptr, W_enc_remainder_ptr, at, inside)
        db_dec += db_enc * w
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + f).to(tl.int64)
            there = inside & (slot >= 0)
            gradient += tl.load(extra_dW_enc_ptr + slot * D + columns, mask=there, other=0.0)
            db_enc += tl.load(extra_db_enc_ptr + slot, mask=slot >= 0, other=0.0)

        tl.store(db_enc_ptr + f, db_enc, mask=tile == 0)
        if squares_ptr is not None:
            tl.store(squares_ptr + tile.to(tl.int64) * F + f, tl.sum(gradient * gradient, 0))
        else:
            step = tl.load(step_ptr).to(tl.int32)
            m = load_moment(W_enc_m_ptr, W_enc_m_scale_ptr, f, at, inside, 127)
            v = load_moment(W_enc_v_ptr, W_enc_v_scale_ptr, f, at, inside, 255)
            w, m, v = _adam(w, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1, BETA2)
            store_master(W_enc_ptr, W_enc_remainder_ptr, W_enc_copy_ptr, at, inside, w)
            store_moment(W_enc_m_ptr, W_enc_m_scale_ptr, f, at, columns, inside, m, step, 127)
            store_moment(W_enc_v_ptr, W_enc_v_scale_ptr, f, at, columns, inside, v, step, 255)
    tl.store(group_db_dec_ptr + group.to(tl.int64) * D + columns, db_dec, mask=inside)


@jit
def _bias_update_kernel(
    bias_ptr,
    m_ptr,
    v_ptr,
    gradient_ptr,
    scalars_ptr,
    clip_ptr,
    length,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    bias = tl.load(bias_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    bias, m, v = _adam(bias, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1, BETA2)
    tl.store(bias_ptr + at, bias, mask=inside)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)


# --- launchers ----------------------------------------------------------------------------------


def _launch(
    W_enc: Rows, W_dec: Rows, b_dec, values, csc, x, dY, dY_scale, extra, squares, **more
) -> tuple[Tensor, Tensor]:
    """Launch the kernels over all rows; returns ``db_enc [F]`` and ``db_dec [D]``.

    With ``squares`` (``[F]`` and ``[tiles, F]``) they take the gradients' norms, else they update.
    """
    latents, width = W_dec.weight.shape
    groups, capacity = triton.cdiv(latents, GROUP), chunk_capacity(len(csc.rows))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dz, chunk_sums = new(len(csc.rows)), new(capacity, width)
    db_enc, group_db_dec = new(latents), new(groups, width)
    long = long_segments(csc.offsets, len(csc.rows))
    tiles = encoder_blocks(width, W_enc.m_scale is not None)
    common = {
        "rows_ptr": csc.rows,
        "offsets_ptr": csc.offsets,
        "starts_ptr": long.starts,
        "dz_ptr": dz,
        "D": width,
        "CHUNK": CHUNK,
        "BLOCK_T": BLOCK_T,
        "maxnreg": MAX_REGISTERS,
    }
    decoder = {
        "values_ptr": values,
        "positions_ptr": csc.positions,
        "dY_ptr": dY,
        "chunk_dW_dec_ptr": chunk_sums,
        "dY_scale": dY_scale,
        **common,
        **row_blocks(width),
    }
    slots = {"slots_ptr": None if extra is None else extra.slots}
    if capacity:
        _decoder_chunks_kernel[(capacity,)](
            W_dec_ptr=_bits(W_dec.weight),
            W_dec_remainder_ptr=W_dec.remainder,
            owners_ptr=long.owners,
            F=latents,
            **decoder,
        )
    _decoder_kernel[(latents,)](
        **_row_pointers("W_dec", W_dec),
        extra_dW_dec_ptr=None if extra is None else extra.W_dec,
        squares_ptr=squares[0],
        **slots,
        **decoder,
        **more,
    )
    # The decoder's chunk sums have been read: the encoder's take their place.
    launch_chunk_sums(dz, csc.rows, csc.offsets, x, long, chunk_sums)
    _encoder_kernel[(groups, triton.cdiv(width, tiles["BLOCK_D"]))](
        **_row_pointers("W_enc", W_enc),
        b_dec_ptr=b_dec,
        x_ptr=x,
        chunk_dW_enc_ptr=chunk_sums,
        extra_dW_enc_ptr=None if extra is None else extra.W_enc,
        extra_db_enc_ptr=None if extra is None else extra.b_enc,
        db_enc_ptr=db_enc,
        group_db_dec_ptr=group_db_dec,
        F=latents,
        GROUP=GROUP,
        squares_ptr=squares[1],
        **slots,
        **common,
        **tiles,
        **more,
    )
    return db_enc, dY.sum(0, dtype=torch.float32) * dY_scale - group_db_dec.sum(0)


def encoder_blocks(width: int, quantized: bool) -> dict[str, int]:
    """Tiles of columns, four elements a thread; whole rows where a row has one scale."""
    if quantized:
        block = row_blocks(width)["BLOCK_D"]
        return {"BLOCK_D": block, "num_warps": min(16, max(4, block // 128))}
    block = column_block(width)
    return {"BLOCK_D": block, "num_warps": max(1, block // 128)}


def _bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def _row_pointers(name: str, rows: Rows) -> dict[str, Tensor | None]:
    rest = {f"{name}_{part}_ptr": getattr(rows, part) for part in Rows._fields[1:]}
    return {f"{name}_ptr": _bits(rows.weight), **rest}


def _gradient_norm_triton(W_enc, W_dec, b_dec, values, csc, x, dY, dY_scale, extra) -> Tensor:
    latents, width = W_dec.weight.shape
    tiles = triton.cdiv(width, encoder_blocks(width, False)["BLOCK_D"])
    squares = torch.empty(1 + tiles, latents, dtype=torch.float32, device=x.device)
    unused = dict.fromkeys(("scalars_ptr", "step_ptr", "clip_ptr"))
    db_enc, db_dec = _launch(
        W_enc,
        W_dec,
        b_dec,
        values,
        csc,
        x,
        dY,
        dY_scale,
        extra,
        (squares[0], squares[1:]),
        eps=0.0,
        BETA1=0.0,
        BETA2=0.0,
        **unused,
    )
    return (squares.sum() + db_enc.square().sum() + db_dec.square().sum()).sqrt()


def _fused_update_triton(
    W_enc, b_enc, W_dec, b_dec, values, csc, x, dY, lr, step, clip, dY_scale, extra, betas, eps
) -> None:
    scalars = torch.empty(3, dtype=torch.float32, device=x.device)
    _step_scalars_kernel[(1,)](
        lr, step, clip, scalars, LOG_BETA1=math.log(betas[0]), LOG_BETA2=math.log(betas[1])
    )
    adam = {
        "scalars_ptr": scalars,
        "clip_ptr": clip,
        "eps": eps,
        "BETA1": betas[0],
        "BETA2": betas[1],
    }
    gradients = _launch(
        W_enc,
        W_dec,
        b_dec.weight,
        values,
        csc,
        x,
        dY,
        dY_scale,
        extra,
        (None, None),
        step_ptr=step,
        **adam,
    )
    for bias, gradient in zip((b_enc, b_dec), gradients, strict=True):
        _bias_update_kernel[(triton.cdiv(len(gradient), BLOCK_BIAS),)](
            *bias, gradient, length=len(gradient), BLOCK=BLOCK_BIAS, **adam
        )


# --- torch --------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Some consecutive latents, their master rows and their gradients, the decoder's projected."""

    at: slice
    w_enc: Tensor
    w_dec: Tensor
    dW_enc: Tensor
    db_enc: Tensor
    dW_dec: Tensor
    db_dec: Tensor  # what these latents take from it


def _gradient_blocks(
    W_enc: Rows, W_dec: Rows, b_dec, values, csc, x, dY, dY_scale, extra
) -> Iterator[_Block]:
    """The gradients, ``TORCH_BLOCK`` latents at a time; ``w_enc`` and ``w_dec`` are masters to write."""
    work = b_dec.dtype
    centred, dY = x.to(work) - b_dec, dY.to(work) * dY_scale
    z = values[csc.positions].to(work)
    starts = [*csc.offsets[::TORCH_BLOCK].tolist(), int(csc.offsets[-1])]
    latents = len(W_dec.weight)
    for i, first in enumerate(range(0, latents, TORCH_BLOCK)):
        at = slice(first, min(first + TORCH_BLOCK, latents))
        entries = slice(starts[i], starts[i + 1])
        tokens = csc.rows[entries]
        offsets = csc.offsets[at.start : at.stop + 1] - starts[i]
        w_enc, w_dec = (
            p.weight[at] if p.remainder is None else join_master(p.weight[at], p.remainder[at])
            for p in (W_enc, W_dec)
        )
        dz = sampled_products(w_dec, dY, tokens, offsets)
        dW_dec = row_sums(z[entries], tokens, offsets, dY)
        dW_enc = row_sums(dz, tokens, offsets, centred)
        # <dW_dec, w> is the same sum over z·<dY, w>, so the gradient need not be read for it.
        ends = offsets.long()
        db_enc = torch.segment_reduce(dz, "sum", offsets=ends, initial=0)
        db_dec = w_enc.T @ db_enc
        along = torch.segment_reduce(dz * z[entries], "sum", offsets=ends, initial=0)
        if extra is not None:
            slots = extra.slots[at]
            here = (slots >= 0).nonzero().flatten()
            slots = slots[here].long()
            rows = extra.W_dec[slots]
            along[here] += (rows * w_dec[here]).sum(1)
            dW_dec.index_add_(0, here, rows)
            dW_enc.index_add_(0, here, extra.W_enc[slots])
            db_enc.index_add_(0, here, extra.b_enc[slots])
        norm2 = torch.linalg.vector_norm(w_dec, dim=1).square().clamp_min(torch.finfo(work).tiny)
        dW_dec.addcmul_(w_dec, (along / norm2)[:, None], value=-1)
        yield _Block(at, w_enc, w_dec, dW_enc, db_enc, dW_dec, db_dec)


def _gradient_norm_torch(W_enc, W_dec, b_dec, values, csc, x, dY, dY_scale, extra) -> Tensor:
    db_dec = dY.sum(0, dtype=b_dec.dtype) * dY_scale
    squares = b_dec.new_zeros(())
    for block in _gradient_blocks(W_enc, W_dec, b_dec, values, csc, x, dY, dY_scale, extra):
        for gradient in (block.dW_enc, block.db_enc, block.dW_dec):
            squares += torch.linalg.vector_norm(gradient).square()
        db_dec -= block.db_dec
    return (squares + db_dec.square().sum()).sqrt()


def _fused_update_torch(
    W_enc, b_enc, W_dec, b_dec, values, csc, x, dY, lr, step, clip, dY_scale, extra, betas, eps
) -> None:
    # An internal name, but the one that torch.optim.Adam(fused=True) calls: one pass over the memory.
    options = {
        "lr": float(lr),
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
    }
    t = step.to(torch.float32).reshape(())

    def adam(weights, gradients, m, v):
        if clip is not None:
            torch._foreach_mul_(gradients, clip.to(gradients[0].dtype))
        torch._fused_adam_(weights, gradients, m, v, [], [t] * len(weights), **options)

    db_dec = dY.sum(0, dtype=b_dec.weight.dtype) * dY_scale
    for block in _gradient_blocks(W_enc, W_dec, b_dec.weight, values, csc, x, dY, dY_scale, extra):
        at = block.at
        db_dec -= block.db_dec
        m, v = zip(_moment_block(W_enc, at), _moment_block(W_dec, at), strict=True)
        adam(
            [block.w_enc, block.w_dec, b_enc.weight[at]],
            [block.dW_enc, block.dW_dec, block.db_enc],
            [*m, b_enc.m[at]],
            [*v, b_enc.v[at]],
        )
        norm = torch.linalg.vector_norm(block.w_dec, dim=1, keepdim=True)
        block.w_dec.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        _store_block(W_enc, at, block.w_enc, m[0], v[0], step)
        _store_block(W_dec, at, block.w_dec, m[1], v[1], step)
    adam([b_dec.weight], [db_dec], [b_dec.m], [b_dec.v])


def _moment_block(state: Rows, at: slice) -> tuple[Tensor, Tensor]:
    """``m`` and ``v`` of some rows: views to write, or decoded copies."""
    if state.m_scale is None:
        return state.m[at], state.v[at]
    return (
        decode_moment(state.m[at], state.m_scale[at]),
        decode_moment(state.v[at], state.v_scale[at]),
    )


def _store_block(
    state: Rows, at: slice, master: Tensor, m: Tensor, v: Tensor, step: Tensor
) -> None:
    """Write back what is not a view of the state, and the copy."""
    if state.remainder is not None:
        state.weight[at], state.remainder[at] = split_master(master)
    if state.copy is not None:
        state.copy[at] = master.to(state.copy.dtype)
    if state.m_scale is not None:
        encode_moment_(state.m[at], state.m_scale[at], m, at.start, step)
        encode_moment_(state.v[at], state.v_scale[at], v, at.start, step)


# --- operations ---------------------------------------------------------------------------------


def _extra(W_enc, b_enc, W_dec, slots) -> ExtraGradient | None:
    # Without rows there is nothing to add, and no row to point at.
    return ExtraGradient(W_enc, b_enc, W_dec, slots) if slots is not None and len(b_enc) else None


@register(
    fake=lambda W_enc, W_enc_remainder, W_dec, W_dec_remainder, b_dec, *_: b_dec.new_empty(())
)
def _gradient_norm(
    W_enc: Tensor,
    W_enc_remainder: Tensor | None,
    W_dec: Tensor,
    W_dec_remainder: Tensor | None,
    b_dec: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    x: Tensor,
    dY: Tensor,
    dY_scale: float,
    extra_W_enc: Tensor | None,
    extra_b_enc: Tensor | None,
    extra_W_dec: Tensor | None,
    slots: Tensor | None,
) -> Tensor:
    run = _gradient_norm_torch if implementation(b_dec) == "torch" else _gradient_norm_triton
    return run(
        Rows(W_enc, W_enc, W_enc, W_enc_remainder),
        Rows(W_dec, W_dec, W_dec, W_dec_remainder),
        b_dec,
        values,
        CSC(rows, positions, offsets),
        x,
        dY,
        dY_scale,
        _extra(extra_W_enc, extra_b_enc, extra_W_dec, slots),
    )


_PARTS = ("", "_m", "_v", "_remainder", "_copy", "_m_scale", "_v_scale")
_STATE = tuple(
    [f"{name}{part}" for name in ("W_enc", "W_dec") for part in _PARTS]
    + [f"{name}{part}" for name in ("b_enc", "b_dec") for part in _PARTS[:3]]
)


@register(fake=lambda *_: None, mutates_args=_STATE)
def _fused_update_(
    W_enc: Tensor,
    W_enc_m: Tensor,
    W_enc_v: Tensor,
    W_enc_remainder: Tensor | None,
    W_enc_copy: Tensor | None,
    W_enc_m_scale: Tensor | None,
    W_enc_v_scale: Tensor | None,
    b_enc: Tensor,
    b_enc_m: Tensor,
    b_enc_v: Tensor,
    W_dec: Tensor,
    W_dec_m: Tensor,
    W_dec_v: Tensor,
    W_dec_remainder: Tensor | None,
    W_dec_copy: Tensor | None,
    W_dec_m_scale: Tensor | None,
    W_dec_v_scale: Tensor | None,
    b_dec: Tensor,
    b_dec_m: Tensor,
    b_dec_v: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    x: Tensor,
    dY: Tensor,
    lr: Tensor,
    step: Tensor,
    clip: Tensor | None,
    dY_scale: float,
    extra_W_enc: Tensor | None,
    extra_b_enc: Tensor | None,
    extra_W_dec: Tensor | None,
    slots: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    run = _fused_update_torch if implementation(b_dec) == "torch" else _fused_update_triton
    run(
        Rows(W_enc, W_enc_m, W_enc_v, W_enc_remainder, W_enc_copy, W_enc_m_scale, W_enc_v_scale),
        Vector(b_enc, b_enc_m, b_enc_v),
        Rows(W_dec, W_dec_m, W_dec_v, W_dec_remainder, W_dec_copy, W_dec_m_scale, W_dec_v_scale),
        Vector(b_dec, b_dec_m, b_dec_v),
        values,
        CSC(rows, positions, offsets),
        x,
        dY,
        lr,
        step,
        clip,
        dY_scale,
        _extra(extra_W_enc, extra_b_enc, extra_W_dec, slots),
        (beta1, beta2),
        eps,
    )


# --- public -------------------------------------------------------------------------------------


def _check(W_enc: Rows, W_dec: Rows, b_dec: Tensor, csr: CSR, csc: CSC, x, dY, extra) -> None:
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
    for name, rows in (("W_enc", W_enc), ("W_dec", W_dec)):
        for part, tensor in rows._asdict().items():
            if tensor is not None:
                shape = (latents,) if part.endswith("scale") else (latents, width)
                expected[f"{name}.{part}"] = (tensor, shape)
    if extra is not None:
        expected |= {
            "extra.W_enc": (extra.W_enc, (len(extra.b_enc), width)),
            "extra.W_dec": (extra.W_dec, (len(extra.b_enc), width)),
            "extra.slots": (extra.slots, (latents,)),
        }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    for name, rows in (("W_enc", W_enc), ("W_dec", W_dec)):
        stored = b_dec.dtype if rows.remainder is None else torch.bfloat16
        if rows.weight.dtype != stored:
            raise ValueError(
                f"{name}.weight: expected {stored} (b_dec's dtype, or bfloat16 beside a remainder), "
                f"got {rows.weight.dtype}"
            )
    if b_dec.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"b_dec: expected float32 or float64, got {b_dec.dtype}")


def gradient_norm(
    W_enc: Rows,
    W_dec: Rows,
    b_dec: Tensor,
    csr: CSR,
    csc: CSC,
    x: Tensor,
    dY: Tensor,
    *,
    dY_scale: float = 1.0,
    extra: ExtraGradient | None = None,
) -> Tensor:
    """The joint 2-norm ``[]`` of the four gradients, the decoder's projected, before any clipping.

    Exactly what :func:`fused_update_` is about to apply, computed once more: one pass over the
    weights' rows (``2·F·D`` masters read) and the gathers. The arguments are the same. Float32
    (float64 for float64 weights); bitwise reproducible; nothing waits for the device.
    """
    _check(W_enc, W_dec, b_dec, csr, csc, x, dY, extra)
    return _gradient_norm(
        W_enc.weight,
        W_enc.remainder,
        W_dec.weight,
        W_dec.remainder,
        b_dec,
        csr.values,
        *csc,
        x,
        dY,
        dY_scale,
        *(extra or (None,) * 4),
    )


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / norm)`` ``[]`` on the device of ``norm``: what ``clip`` takes."""
    return torch.where(norm > max_norm, max_norm / norm, 1.0)


def fused_update_(
    W_enc: Rows,
    b_enc: Vector,
    W_dec: Rows,
    b_dec: Vector,
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
    extra: ExtraGradient | None = None,
    clip: Tensor | None = None,
) -> None:
    """One optimizer step in place: gradients, projection, clipping, Adam, renormalisation.

    ``W_enc`` and ``W_dec`` are :class:`Rows` ``[F, D]``, ``b_enc [F]`` and ``b_dec [D]``
    :class:`Vector`. ``x [B, D]`` is the scaled input, ``dY_scale · dY [B, D]`` the loss's gradient at
    ``x̂``: the residual of :func:`sparse_decode_loss` with ``dY_scale = -2 / (B·D)``. ``lr []`` is a
    float tensor and ``step []`` an int64 tensor that counts from 1, both on the device, as is the
    ``clip []`` that multiplies every gradient after the projection (:func:`clip_factor`).

    All float tensors of the state are contiguous. Raises ValueError, before anything is written, on
    shapes, strides or dtypes that do not fit. Not differentiable. See the module for the mathematics,
    the determinism and the bytes moved.
    """
    _check(W_enc, W_dec, b_dec.weight, csr, csc, x, dY, extra)
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
        *W_enc,
        *b_enc,
        *W_dec,
        *b_dec,
        csr.values,
        *csc,
        x,
        dY,
        lr,
        step,
        clip,
        dY_scale,
        *(extra or (None,) * 4),
        *betas,
        eps,
    )


# --- ahead of time ------------------------------------------------------------------------------


def aot_cases() -> list[Case]:
    """Every kernel at every width, over the state's storage forms, with and without options."""
    types = {f"{name}_ptr": "*i32" for name in ["rows", "positions", "offsets", "starts", "owners"]}
    types |= {f"{name}_ptr": "*fp32" for name in ["b_dec", "bias", "m", "v", "gradient"]}
    types |= {f"{name}_ptr": "*fp32" for name in ["values", "dz", "chunk_dW_dec", "chunk_dW_enc"]}
    types |= {f"{name}_ptr": "*fp32" for name in ["group_db_dec", "db_enc", "scalars", "lr"]}
    types |= {"step_ptr": "*i64", "F": "i32", "D": "i32", "dY_scale": "fp32", "eps": "fp32"}
    options = {f"extra_{name}_ptr": "*fp32" for name in ("dW_dec", "dW_enc", "db_enc")}
    options |= {"slots_ptr": "*i32", "clip_ptr": "*fp32"}
    norm = {"squares_ptr": "*fp32"}
    blocks = {"CHUNK": CHUNK, "GROUP": GROUP, "BLOCK_T": BLOCK_T, "BETA1": 0.9, "BETA2": 0.999}
    blocks |= {"LOG_BETA1": math.log(0.9), "LOG_BETA2": math.log(0.999)}

    def case(label: str, kernel, types: dict[str, str], constants: dict, **more) -> Case:
        """``constants`` count where the kernel has them; an argument of neither kind is None."""
        names = getattr(kernel, "arg_names", ())
        signature = {name: types[name] for name in names if name in types}
        constexprs = {name: constants.get(name) for name in names if name not in types}
        return Case(label, kernel, signature, constexprs, ("F", "D"), **more)

    small = {"vector_loads": False, "representative": True}
    cases = [
        case("fused_update scalars", _step_scalars_kernel, types | options, blocks, **small),
        case(
            "fused_update biases",
            _bias_update_kernel,
            types | options | {"length": "i32"},
            blocks | {"BLOCK": BLOCK_BIAS},
            **small,
        ),
    ]
    forms = ("fp32", "bf16 copy", "bf16 split", "fp32 8-bit", "bf16 split 8-bit")
    for width, form in itertools.product(WIDTHS, forms):
        rows = row_blocks(width)
        sides = {
            "decoder": (_decoder_kernel, rows),
            "encoder": (_encoder_kernel, encoder_blocks(width, "8-bit" in form)),
        }
        chosen = {"representative": width == 1536 and "split" in form, "maxnreg": MAX_REGISTERS}
        low = "*bf16" if "bf16" in form else "*fp32"
        here = types | {"x_ptr": low, "dY_ptr": low}
        for name in ("W_enc", "W_dec"):
            here |= {f"{name}_{part}_ptr": "*fp32" for part in "mv"}
            here[f"{name}_ptr"] = "*fp32"
            if "split" in form:
                here |= {f"{name}_ptr": "*i16", f"{name}_remainder_ptr": "*i16"}
            if "copy" in form:
                here[f"{name}_copy_ptr"] = "*bf16"
            if "8-bit" in form:
                here |= {f"{name}_m_ptr": "*i8", f"{name}_v_ptr": "*u8"}
                here |= {f"{name}_{part}_scale_ptr": "*fp32" for part in "mv"}
        for side, (kernel, shape) in sides.items():
            constants, more = blocks | shape, chosen | {"num_warps": shape["num_warps"]}
            label = f"fused_update {side}, aux-k and clipping, D={width} {form}"
            cases.append(case(label, kernel, here | options, constants, **more))
            if "8-bit" not in form:
                label = f"fused_update {side}, D={width} {form}"
                cases.append(case(label, kernel, here, constants, **more))
                label = f"gradient_norm {side}, D={width} {form}"
                cases.append(case(label, kernel, here | options | norm, constants, **more))
        if "8-bit" not in form:
            label = f"fused_update decoder chunks, D={width} {form}"
            more = chosen | {"num_warps": rows["num_warps"]}
            cases.append(case(label, _decoder_chunks_kernel, here, blocks | rows, **more))
    return cases
