"""The kernels of the fused update; :mod:`fastsae_kernels.update` has the mathematics.

Two kernels rather than one, the decoder's rows first: either holds half of the vectors, so twice as
many latents are in flight, and all that passes between them is dz, one float an active.
"""

import math

import torch
from torch import Tensor

from ..decoder_norm import row_blocks, tangent, unit
from ..dispatch import jit, tl, triton
from ..segments import CHUNK, chunk_capacity, long_segments
from ..sparse_decoder import column_block, launch_chunk_sums, weighted_sum
from .state import (
    Adam,
    Batch,
    BiasState,
    MatrixState,
    Parameters,
    load_master,
    load_moment,
    store_master,
    store_moment,
)

# Entries of a segment taken together, and latents a program of the encoder updates one after another.
BLOCK_T = 1
LATENTS_PER_PROGRAM = 8
BLOCK_BIAS = 256
# An explicit cap: without it ptxas spills a few registers to reach the next step of occupancy.
MAX_REGISTERS = 128


@jit
def _level_of(f, levels_ptr, LEVELS: tl.constexpr):
    """The first level that latent ``f`` is in."""
    level = f * 0
    if LEVELS > 1:
        for i in range(LEVELS - 1):
            level += (f >= tl.load(levels_ptr + i)).to(tl.int64)
    return level


@jit
def _decoder_segment(
    begin, end,
    rows_ptr, positions_ptr, values_ptr, dY_ptr, dz_ptr,
    w, columns, D, dY_scale,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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
def decoder_chunks_kernel(
    W_dec_ptr, W_dec_remainder_ptr,
    values_ptr, rows_ptr, positions_ptr, offsets_ptr, dY_ptr,
    starts_ptr, owners_ptr, chunk_dW_dec_ptr, dz_ptr, levels_ptr,
    F, D, level_stride, dY_scale,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of a long segment a program."""
    chunk = tl.program_id(0)
    if chunk < tl.load(starts_ptr + F):
        columns = tl.arange(0, BLOCK_D)
        inside = columns < D
        f = tl.load(owners_ptr + chunk)
        begin = tl.load(offsets_ptr + f) + (chunk - tl.load(starts_ptr + f)) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offsets_ptr + f + 1))
        w = load_master(W_dec_ptr, W_dec_remainder_ptr, f.to(tl.int64) * D + columns, inside)
        dY_ptr += _level_of(f.to(tl.int64), levels_ptr, LEVELS) * level_stride
        dW_dec = _decoder_segment(
            begin, end,
            rows_ptr, positions_ptr, values_ptr, dY_ptr, dz_ptr,
            w, columns, D, dY_scale,
            BLOCK_T, BLOCK_D,
        )  # fmt: skip
        tl.store(chunk_dW_dec_ptr + chunk.to(tl.int64) * D + columns, dW_dec, mask=inside)


@jit
def step_scalars_kernel(
    lr_ptr, step_ptr, clip_ptr, scalars_ptr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
):  # fmt: skip
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
    weight, gradient, m, v,
    scalars_ptr, clip_ptr,
    eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """``(weight, m, v)`` after one step of Adam."""
    if clip_ptr is not None:
        gradient *= tl.load(scalars_ptr + 2)
    m = BETA1 * m + (1 - BETA1) * gradient
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    root = tl.sqrt(v) * tl.load(scalars_ptr + 1)
    return weight - tl.load(scalars_ptr) * m / (root + eps), m, v


@jit
def decoder_kernel(
    W_dec_ptr, W_dec_m_ptr, W_dec_v_ptr,
    W_dec_remainder_ptr, W_dec_copy_ptr, W_dec_m_scale_ptr, W_dec_v_scale_ptr,
    values_ptr, rows_ptr, positions_ptr, offsets_ptr, dY_ptr,
    starts_ptr, chunk_dW_dec_ptr, aux_slots_ptr, aux_dW_dec_ptr,
    dz_ptr, squares_ptr, scalars_ptr, step_ptr, clip_ptr, levels_ptr,
    first_row, D, level_stride, dY_scale, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent a program. With ``squares_ptr`` only the projected gradient's norm is taken."""
    f = tl.program_id(0).to(tl.int64)
    dY_ptr += _level_of(f, levels_ptr, LEVELS) * level_stride
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    at = f * D + columns
    w = load_master(W_dec_ptr, W_dec_remainder_ptr, at, inside)

    begin = tl.load(offsets_ptr + f)
    end = tl.load(offsets_ptr + f + 1)
    end = tl.where(end - begin > CHUNK, begin, end)
    gradient = _decoder_segment(
        begin, end,
        rows_ptr, positions_ptr, values_ptr, dY_ptr, dz_ptr,
        w, columns, D, dY_scale,
        BLOCK_T, BLOCK_D,
    )  # fmt: skip
    for chunk in range(tl.load(starts_ptr + f), tl.load(starts_ptr + f + 1)):
        there = tl.cast(chunk, tl.int64) * D + columns
        gradient += tl.load(chunk_dW_dec_ptr + there, mask=inside, other=0.0)
    if aux_slots_ptr is not None:
        slot = tl.load(aux_slots_ptr + f).to(tl.int64)
        there = inside & (slot >= 0)
        gradient += tl.load(aux_dW_dec_ptr + slot * D + columns, mask=there, other=0.0)
    gradient = tangent(gradient, w)

    if squares_ptr is not None:
        tl.store(squares_ptr + f, tl.sum(gradient * gradient, 0))
    else:
        step = tl.load(step_ptr).to(tl.int32)
        m = load_moment(W_dec_m_ptr, W_dec_m_scale_ptr, f, at, inside, 127)
        v = load_moment(W_dec_v_ptr, W_dec_v_scale_ptr, f, at, inside, 255)
        w, m, v = _adam(w, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1, BETA2)
        store_master(W_dec_ptr, W_dec_remainder_ptr, W_dec_copy_ptr, at, inside, unit(w))
        store_moment(
            W_dec_m_ptr, W_dec_m_scale_ptr, f, first_row, at, columns, inside, m, step, 127
        )
        store_moment(
            W_dec_v_ptr, W_dec_v_scale_ptr, f, first_row, at, columns, inside, v, step, 255
        )


@jit
def encoder_kernel(
    W_enc_ptr, W_enc_m_ptr, W_enc_v_ptr,
    W_enc_remainder_ptr, W_enc_copy_ptr, W_enc_m_scale_ptr, W_enc_v_scale_ptr,
    b_dec_ptr, rows_ptr, offsets_ptr, x_ptr,
    starts_ptr, chunk_dW_enc_ptr, aux_slots_ptr, aux_dW_enc_ptr, aux_db_enc_ptr,
    dz_ptr, db_enc_ptr, block_db_dec_ptr, squares_ptr, scalars_ptr, step_ptr, clip_ptr,
    F, first_row, D, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    CHUNK: tl.constexpr, LATENTS_PER_PROGRAM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of latents and a tile of columns a program: also ``db_enc``, and their part of ``db_dec``.

    Columns are independent here, but for the scale of 8-bit moments, which needs whole rows. With
    ``squares_ptr`` only the gradient's norm is taken, and nothing is updated.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    db_dec = tl.zeros((BLOCK_D,), tl.float32)
    first_latent = block * LATENTS_PER_PROGRAM
    for latent in range(first_latent, tl.minimum(first_latent + LATENTS_PER_PROGRAM, F)):
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
        if b_dec_ptr is not None:
            # Σ dz·(x - b_dec), centred once: b_dec would occupy registers all through the loop.
            gradient -= db_enc * tl.load(b_dec_ptr + columns, mask=inside, other=0.0)
        at = f * D + columns
        w = load_master(W_enc_ptr, W_enc_remainder_ptr, at, inside)
        db_dec += db_enc * w
        if aux_slots_ptr is not None:
            slot = tl.load(aux_slots_ptr + f).to(tl.int64)
            there = inside & (slot >= 0)
            gradient += tl.load(aux_dW_enc_ptr + slot * D + columns, mask=there, other=0.0)
            db_enc += tl.load(aux_db_enc_ptr + slot, mask=slot >= 0, other=0.0)

        tl.store(db_enc_ptr + f, db_enc, mask=tile == 0)
        if squares_ptr is not None:
            tl.store(squares_ptr + tile.to(tl.int64) * F + f, tl.sum(gradient * gradient, 0))
        else:
            step = tl.load(step_ptr).to(tl.int32)
            m = load_moment(W_enc_m_ptr, W_enc_m_scale_ptr, f, at, inside, 127)
            v = load_moment(W_enc_v_ptr, W_enc_v_scale_ptr, f, at, inside, 255)
            w, m, v = _adam(w, gradient, m, v, scalars_ptr, clip_ptr, eps, BETA1, BETA2)
            store_master(W_enc_ptr, W_enc_remainder_ptr, W_enc_copy_ptr, at, inside, w)
            store_moment(
                W_enc_m_ptr, W_enc_m_scale_ptr, f, first_row, at, columns, inside, m, step, 127
            )
            store_moment(
                W_enc_v_ptr, W_enc_v_scale_ptr, f, first_row, at, columns, inside, v, step, 255
            )
    if b_dec_ptr is not None:
        tl.store(block_db_dec_ptr + block.to(tl.int64) * D + columns, db_dec, mask=inside)


@jit
def bias_update_kernel(
    bias_ptr, m_ptr, v_ptr, gradient_ptr, scalars_ptr, clip_ptr,
    length, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


def encoder_blocks(width: int, quantized: bool) -> dict[str, int]:
    """Tiles of columns, four elements a thread; whole rows where a row has one scale."""
    if quantized:
        block = row_blocks(width)["BLOCK_D"]
        return {"BLOCK_D": block, "num_warps": min(16, max(4, block // 128))}
    block = column_block(width)
    return {"BLOCK_D": block, "num_warps": max(1, block // 128)}


def _bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def _row_pointers(name: str, state: MatrixState) -> dict[str, Tensor | None]:
    rest = {f"{name}_{part}_ptr": getattr(state, part) for part in MatrixState._fields[1:]}
    return {f"{name}_ptr": _bits(state.weight), **rest}


def _launch(
    W_enc: MatrixState,
    W_dec: MatrixState,
    b_dec: Tensor,
    inputs: Batch,
    squares: tuple[Tensor, Tensor] | tuple[None, None],
    db_dec: Tensor,
    **adam,
) -> Tensor:
    """Launch the kernels over all rows; returns ``db_enc [F]``, and takes their part from ``db_dec [D]``.

    With ``squares`` (``[F]`` and ``[tiles, F]``) they take the gradients' norms, else they update.
    """
    values, csc, x, dY, dY_scale, aux, levels, tied = inputs
    latents, width = W_dec.weight.shape
    read = x.shape[1]
    blocks, chunks = triton.cdiv(latents, LATENTS_PER_PROGRAM), chunk_capacity(len(csc.rows))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dz, chunk_sums = new(len(csc.rows)), new(chunks, width)
    db_enc, block_db_dec = new(latents), new(blocks if tied else 0, width)
    long = long_segments(csc.offsets, len(csc.rows))
    tiles = encoder_blocks(read, W_enc.m_scale is not None)
    common = {
        "rows_ptr": csc.rows, "offsets_ptr": csc.offsets, "starts_ptr": long.starts, "dz_ptr": dz,
        "CHUNK": CHUNK, "BLOCK_T": BLOCK_T, "maxnreg": MAX_REGISTERS,
    }  # fmt: skip
    decoder = {
        "values_ptr": values, "positions_ptr": csc.positions, "dY_ptr": dY,
        "chunk_dW_dec_ptr": chunk_sums, "levels_ptr": levels,
        "dY_scale": dY_scale, "level_stride": len(x) * width, "LEVELS": len(dY),
        "D": width,
        **common, **row_blocks(width),
    }  # fmt: skip
    if chunks:
        decoder_chunks_kernel[(chunks,)](
            W_dec_ptr=_bits(W_dec.weight), W_dec_remainder_ptr=W_dec.remainder,
            owners_ptr=long.owners,
            F=latents,
            **decoder,
        )  # fmt: skip
    decoder_kernel[(latents,)](
        **_row_pointers("W_dec", W_dec),
        aux_slots_ptr=aux and aux.slots, aux_dW_dec_ptr=aux and aux.W_dec, squares_ptr=squares[0],
        **decoder, **adam,
    )  # fmt: skip
    # The decoder's chunk sums have been read: the encoder's take their place, if they fit.
    chunk_sums = chunk_sums if read == width else new(chunks, read)
    launch_chunk_sums(dz, csc.rows, csc.offsets, x, long, chunk_sums)
    encoder_kernel[(blocks, triton.cdiv(read, tiles["BLOCK_D"]))](
        **_row_pointers("W_enc", W_enc),
        b_dec_ptr=b_dec if tied else None, x_ptr=x, chunk_dW_enc_ptr=chunk_sums,
        aux_slots_ptr=aux and aux.slots,
        aux_dW_enc_ptr=aux and aux.W_enc, aux_db_enc_ptr=aux and aux.b_enc,
        db_enc_ptr=db_enc, block_db_dec_ptr=block_db_dec, squares_ptr=squares[1],
        F=latents, D=read,
        LATENTS_PER_PROGRAM=LATENTS_PER_PROGRAM,
        **common, **tiles, **adam,
    )  # fmt: skip
    db_dec -= block_db_dec.sum(0)
    return db_enc


def gradient_norm(W_enc: MatrixState, W_dec: MatrixState, b_dec: Tensor, inputs: Batch) -> Tensor:
    latents, width = W_enc.weight.shape
    tiles = triton.cdiv(width, encoder_blocks(width, False)["BLOCK_D"])
    squares = torch.empty(1 + tiles, latents, dtype=torch.float32, device=b_dec.device)
    unused = dict.fromkeys(("scalars_ptr", "step_ptr", "clip_ptr"))
    unused |= dict.fromkeys(("eps", "BETA1", "BETA2"), 0.0) | {"first_row": 0}
    db_dec = inputs.output_gradient(torch.float32)
    both = squares[0], squares[1:]
    db_enc = _launch(W_enc, W_dec, b_dec, inputs, both, db_dec, **unused)
    return (squares.sum() + db_enc.square().sum() + db_dec.square().sum()).sqrt()


def fused_update(parameters: Parameters, db_dec: Tensor, inputs: Batch, adam: Adam) -> None:
    W_enc, b_enc, W_dec, b_dec, moments, first_row = parameters
    lr, step, clip, beta1, beta2, eps = adam
    scalars = torch.empty(3, dtype=torch.float32, device=lr.device)
    step_scalars_kernel[(1,)](
        lr_ptr=lr, step_ptr=step, clip_ptr=clip, scalars_ptr=scalars,
        LOG_BETA1=math.log(beta1), LOG_BETA2=math.log(beta2),
    )  # fmt: skip
    shared = {"scalars_ptr": scalars, "clip_ptr": clip, "eps": eps, "BETA1": beta1, "BETA2": beta2}
    own = {"step_ptr": step, "first_row": first_row}
    db_enc = _launch(W_enc, W_dec, b_dec, inputs, (None, None), db_dec, **own, **shared)
    biases = [(b_enc, db_enc)] + ([(BiasState(b_dec, *moments), db_dec)] if moments else [])
    for bias, gradient in biases:
        bias_update_kernel[(triton.cdiv(len(gradient), BLOCK_BIAS),)](
            bias_ptr=bias.weight, m_ptr=bias.m, v_ptr=bias.v, gradient_ptr=gradient,
            length=len(gradient),
            BLOCK=BLOCK_BIAS,
            **shared,
        )  # fmt: skip
