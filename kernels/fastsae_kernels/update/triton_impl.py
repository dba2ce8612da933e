"""The kernels of the fused update; :mod:`fastsae_kernels.update` has the mathematics.

Two kernels rather than one, the decoder's rows first: either holds half of the vectors, so twice as
many latents are in flight, and all that passes between them is dz, one float an active.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder_norm import tangent, unit
from ..dispatch import cdiv, jit, power_of_2, tl
from ..segments import CHUNK, chunk_capacity, long_segments
from ..sparse_decoder import column_block, launch_chunk_sums, weighted_sum
from .state import (
    Adam,
    Batch,
    MatrixState,
    Parameters,
    decoded_moment,
    load_master,
    load_moment,
    store_master,
    store_moment,
)

# A tile of a bias's gradient, a thread to each column: rows are added, columns are not.
BIAS_ROWS, BIAS_COLUMNS = 32, 128


@dataclass
class Tuning:
    """Measured on an H200, but for ``stages``: no segment was long there. Read at each launch: to measure another value,
    set it on :data:`TUNING`."""

    entries: int = 1  # of a segment, taken together
    decoder_elements: int = 16  # of a row, a thread
    encoder_elements: int = 8
    encoder_latents: int = 8  # a program, one after another
    registers: int = 96  # a thread, at most: the fewer, the more rows are in flight
    registers_8bit: int = 80
    stages: int = 3  # of the gather, where segments are long


TUNING = Tuning()


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
    STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dW_dec`` of the entries ``[begin, end)`` of one latent's segment; their ``dz`` is stored."""
    dW_dec = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
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
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
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
            STAGES, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        tl.store(chunk_dW_dec_ptr + chunk.to(tl.int64) * D + columns, dW_dec, mask=inside)


@jit
def step_scalars_kernel(
    lr_ptr, step_ptr, scalars_ptr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, DECODER_LR_RATIO: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """``lr / (1 - β1^t)``, ``1 / sqrt(1 - β2^t)``, and the former for the decoder's rows, from float64;
    t counts up first."""
    count = tl.load(step_ptr)
    if COUNT:
        count += 1
        tl.store(step_ptr, count)
    step = count.to(tl.float64)
    correction1 = 1.0 - tl.exp(step * LOG_BETA1)
    correction2 = 1.0 - tl.exp(step * LOG_BETA2)
    lr = tl.load(lr_ptr).to(tl.float64) / correction1
    tl.store(scalars_ptr, lr.to(tl.float32))
    tl.store(scalars_ptr + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(scalars_ptr + 2, (lr * DECODER_LR_RATIO).to(tl.float32))


@jit
def _load_if(ptr, at, otherwise):
    """What a tensor has at a place, where there is a tensor."""
    if ptr is None:
        return otherwise
    else:
        return tl.load(ptr + at)


@jit
def _adam(
    weight, gradient, m, v, lr, correction, clip, clip_ptr, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """``(weight, m, v)`` after one step of Adam."""
    if clip_ptr is not None:
        gradient *= clip.to(tl.float32)
    m = BETA1 * m + (1 - BETA1) * gradient
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    return weight - lr * m / (tl.sqrt(v) * correction + eps), m, v


@jit
def decoder_kernel(
    W_dec_ptr, W_dec_m_ptr, W_dec_v_ptr,
    W_dec_remainder_ptr, W_dec_m_scale_ptr, W_dec_v_scale_ptr,
    values_ptr, rows_ptr, positions_ptr, offsets_ptr, dY_ptr,
    starts_ptr, chunk_dW_dec_ptr, aux_slots_ptr, aux_dW_dec_ptr,
    dz_ptr, squares_ptr, scalars_ptr, step_ptr, clip_ptr, levels_ptr,
    first_row, D, level_stride, dY_scale, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent a program. With ``squares_ptr`` only the projected gradient's norm is taken."""
    f = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    at = f * D + columns
    # All that is read once is asked for before the gather, which is long.
    begin = tl.load(offsets_ptr + f)
    end = tl.load(offsets_ptr + f + 1)
    first_chunk = tl.load(starts_ptr + f)
    last_chunk = tl.load(starts_ptr + f + 1)
    w = load_master(W_dec_ptr, W_dec_remainder_ptr, at, inside)
    m, m_scale = load_moment(W_dec_m_ptr, W_dec_m_scale_ptr, f, at, inside)
    v, v_scale = load_moment(W_dec_v_ptr, W_dec_v_scale_ptr, f, at, inside)
    lr = _load_if(scalars_ptr, 2, 0.0)
    correction = _load_if(scalars_ptr, 1, 0.0)
    clip = _load_if(clip_ptr, 0, 1.0)
    step = _load_if(step_ptr, 0, 0)
    slot = _load_if(aux_slots_ptr, f, -1)
    dY_ptr += _level_of(f, levels_ptr, LEVELS) * level_stride

    end = tl.where(end - begin > CHUNK, begin, end)
    gradient = _decoder_segment(
        begin, end,
        rows_ptr, positions_ptr, values_ptr, dY_ptr, dz_ptr,
        w, columns, D, dY_scale,
        1, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    for chunk in range(first_chunk, last_chunk):
        there = tl.cast(chunk, tl.int64) * D + columns
        gradient += tl.load(chunk_dW_dec_ptr + there, mask=inside, other=0.0)
    if aux_slots_ptr is not None:
        there = inside & (slot >= 0)
        gradient += tl.load(aux_dW_dec_ptr + slot.to(tl.int64) * D + columns, mask=there, other=0.0)
    gradient = tangent(gradient, w)

    if squares_ptr is not None:
        tl.store(squares_ptr + f, tl.sum(gradient * gradient, 0))
    else:
        m = decoded_moment(m, m_scale, 127)
        v = decoded_moment(v, v_scale, 255)
        w, m, v = _adam(w, gradient, m, v, lr, correction, clip, clip_ptr, eps, BETA1, BETA2)
        store_master(W_dec_ptr, W_dec_remainder_ptr, at, inside, unit(w))
        store_moment(
            W_dec_m_ptr, W_dec_m_scale_ptr, f, first_row, at, columns, inside, m, step, 127
        )
        store_moment(
            W_dec_v_ptr, W_dec_v_scale_ptr, f, first_row, at, columns, inside, v, step, 255
        )


@jit
def encoder_kernel(
    W_enc_ptr, W_enc_m_ptr, W_enc_v_ptr,
    W_enc_remainder_ptr, W_enc_m_scale_ptr, W_enc_v_scale_ptr,
    b_dec_ptr, rows_ptr, offsets_ptr, x_ptr,
    starts_ptr, chunk_dW_enc_ptr, aux_slots_ptr, aux_dW_enc_ptr, aux_db_enc_ptr,
    dz_ptr, db_enc_ptr, block_db_dec_ptr, squares_ptr, scalars_ptr, step_ptr, clip_ptr,
    F, first_row, D, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    CHUNK: tl.constexpr, LATENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
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
    lr = _load_if(scalars_ptr, 0, 0.0)
    correction = _load_if(scalars_ptr, 1, 0.0)
    clip = _load_if(clip_ptr, 0, 1.0)
    step = _load_if(step_ptr, 0, 0)
    for latent in range(block * LATENTS, tl.minimum((block + 1) * LATENTS, F)):
        f = tl.cast(latent, tl.int64)
        at = f * D + columns
        # As in the decoder's, before the gather.
        begin = tl.load(offsets_ptr + f)
        end = tl.load(offsets_ptr + f + 1)
        first_chunk = tl.load(starts_ptr + f)
        last_chunk = tl.load(starts_ptr + f + 1)
        w = load_master(W_enc_ptr, W_enc_remainder_ptr, at, inside)
        m, m_scale = load_moment(W_enc_m_ptr, W_enc_m_scale_ptr, f, at, inside)
        v, v_scale = load_moment(W_enc_v_ptr, W_enc_v_scale_ptr, f, at, inside)
        slot = _load_if(aux_slots_ptr, f, -1)

        db_enc = 0.0
        for first in range(begin, end, CHUNK):
            entry = first + tl.arange(0, CHUNK)
            db_enc += tl.sum(tl.load(dz_ptr + entry, mask=entry < end, other=0.0), 0)
        end = tl.where(end - begin > CHUNK, begin, end)
        gradient = weighted_sum(dz_ptr, rows_ptr, x_ptr, begin, end, columns, D, BLOCK_T, BLOCK_D)
        for chunk in range(first_chunk, last_chunk):
            there = tl.cast(chunk, tl.int64) * D + columns
            gradient += tl.load(chunk_dW_enc_ptr + there, mask=inside, other=0.0)
        if b_dec_ptr is not None:
            # Σ dz·(x - b_dec), centred once: b_dec would occupy registers all through the loop.
            gradient -= db_enc * tl.load(b_dec_ptr + columns, mask=inside, other=0.0)
        db_dec += db_enc * w
        if aux_slots_ptr is not None:
            there = inside & (slot >= 0)
            row = slot.to(tl.int64) * D
            gradient += tl.load(aux_dW_enc_ptr + row + columns, mask=there, other=0.0)
            db_enc += tl.load(aux_db_enc_ptr + slot, mask=slot >= 0, other=0.0)

        tl.store(db_enc_ptr + f, db_enc, mask=tile == 0)
        if squares_ptr is not None:
            tl.store(squares_ptr + tile.to(tl.int64) * F + f, tl.sum(gradient * gradient, 0))
        else:
            m = decoded_moment(m, m_scale, 127)
            v = decoded_moment(v, v_scale, 255)
            w, m, v = _adam(w, gradient, m, v, lr, correction, clip, clip_ptr, eps, BETA1, BETA2)
            store_master(W_enc_ptr, W_enc_remainder_ptr, at, inside, w)
            store_moment(
                W_enc_m_ptr, W_enc_m_scale_ptr, f, first_row, at, columns, inside, m, step, 127
            )
            store_moment(
                W_enc_v_ptr, W_enc_v_scale_ptr, f, first_row, at, columns, inside, v, step, 255
            )
    if b_dec_ptr is not None:
        tl.store(block_db_dec_ptr + block.to(tl.int64) * D + columns, db_dec, mask=inside)


@jit
def _column_sums(
    table_ptr, begin, end, columns, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of rows ``[begin, end)`` of a table of width ``D``."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        total += tl.load(
            table_ptr + row[:, None].to(tl.int64) * D + columns[None, :],
            mask=(row < end)[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
    return tl.sum(total, 0)


@jit
def db_dec_parts_kernel(
    dY_ptr, block_db_dec_ptr, parts_ptr,
    tokens, blocks, D, dY_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows, of ``dY`` or of what blocks of latents take from it, and a tile of columns a program."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = part * ROWS
    if first < tokens:
        end = tl.minimum(first + ROWS, tokens)
        total = _column_sums(dY_ptr, first, end, columns, D, ROWS, COLUMNS) * dY_scale
    else:
        first -= tl.cdiv(tokens, ROWS) * ROWS
        end = tl.minimum(first + ROWS, blocks)
        total = -_column_sums(block_db_dec_ptr, first, end, columns, D, ROWS, COLUMNS)
    tl.store(parts_ptr + part.to(tl.int64) * D + columns, total, mask=columns < D)


@jit
def _update_bias(
    bias_ptr, m_ptr, v_ptr, squares_ptr, scalars_ptr, clip_ptr, at, inside, gradient, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """With ``squares_ptr`` the gradient's norm is taken; without moments the gradient itself is stored."""
    if squares_ptr is not None:
        tl.store(squares_ptr + tl.program_id(0), tl.sum(gradient * gradient, 0))
    elif m_ptr is None:
        tl.store(bias_ptr + at, gradient, mask=inside)
    else:
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        lr, correction = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
        clip = _load_if(clip_ptr, 0, 1.0)
        bias, m, v = _adam(bias, gradient, m, v, lr, correction, clip, clip_ptr, eps, BETA1, BETA2)
        tl.store(bias_ptr + at, bias, mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)


@jit
def biases_kernel(
    b_enc_ptr, b_enc_m_ptr, b_enc_v_ptr, b_dec_ptr, b_dec_m_ptr, b_dec_v_ptr,
    db_enc_ptr, parts_ptr, squares_ptr, scalars_ptr, clip_ptr,
    F, D, parts, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ``b_enc``, or of ``b_dec``, whose gradient is added up here, a program."""
    tile = tl.program_id(0)
    latent_tiles = tl.cdiv(F, COLUMNS)
    if tile < latent_tiles:
        at = tile * COLUMNS + tl.arange(0, COLUMNS)
        gradient = tl.load(db_enc_ptr + at, mask=at < F, other=0.0)
        _update_bias(
            b_enc_ptr, b_enc_m_ptr, b_enc_v_ptr, squares_ptr, scalars_ptr, clip_ptr,
            at, at < F, gradient, eps, BETA1, BETA2,
        )  # fmt: skip
    else:
        at = (tile - latent_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        gradient = _column_sums(parts_ptr, 0, parts, at, D, ROWS, COLUMNS)
        _update_bias(
            b_dec_ptr, b_dec_m_ptr, b_dec_v_ptr, squares_ptr, scalars_ptr, clip_ptr,
            at, at < D, gradient, eps, BETA1, BETA2,
        )  # fmt: skip


def _warps(block: int, elements: int) -> int:
    return min(16, max(1, block // (32 * elements)))


def decoder_blocks(width: int) -> dict[str, int]:
    """A whole row a program: the power of two above it."""
    block = max(16, power_of_2(width))
    return {"BLOCK_D": block, "num_warps": _warps(block, TUNING.decoder_elements)}


def encoder_blocks(width: int, quantized: bool) -> dict[str, int]:
    """Tiles of columns; whole rows where a row has one scale."""
    block = decoder_blocks(width)["BLOCK_D"] if quantized else column_block(width)
    return {"BLOCK_D": block, "num_warps": _warps(block, TUNING.encoder_elements)}


def _bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def _row_pointers(name: str, state: MatrixState) -> dict[str, Tensor | None]:
    rest = {f"{name}_{part}_ptr": getattr(state, part) for part in MatrixState._fields[1:]}
    return {f"{name}_ptr": _bits(state.weight), **rest}


def _bias_pointers(
    name: str, weight: Tensor | None = None, m: Tensor | None = None, v: Tensor | None = None
) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": weight, f"{name}_m_ptr": m, f"{name}_v_ptr": v}


def _launch(
    W_enc: MatrixState,
    W_dec: MatrixState,
    b_dec: Tensor,
    inputs: Batch,
    biases: dict[str, Tensor | None],
    own_part: bool = False,
    norm: bool = False,
    **adam,
) -> Tensor:
    """Launch the kernels over all rows, and over the ``biases``, by their pointers' names.

    With ``norm`` they take the gradients' norms, of which the squares' parts are returned, else they
    update. Of ``b_dec``'s gradient only ``own_part`` is what the latents take.
    """
    values, csc, x, dY, dY_scale, aux, levels, tied = inputs
    latents, width = W_dec.weight.shape
    read, tokens = x.shape[1], 0 if own_part else len(x)
    chunks = chunk_capacity(len(csc.rows))
    blocks = cdiv(latents, TUNING.encoder_latents) if tied else 0
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dz, chunk_sums = new(len(csc.rows)), new(chunks, width)
    db_enc, block_db_dec = new(latents), new(blocks, width)
    long = long_segments(csc.offsets, len(csc.rows))
    quantized = W_enc.m_scale is not None
    registers = TUNING.registers_8bit if quantized else TUNING.registers
    tiles = encoder_blocks(read, quantized)
    bias_tiles = cdiv(latents, BIAS_COLUMNS), cdiv(width, BIAS_COLUMNS)
    encoder_tiles = cdiv(read, tiles["BLOCK_D"])
    sizes = [latents, encoder_tiles * latents, sum(bias_tiles)] if norm else [0, 0, 0]
    squares = new(sum(sizes))
    of_W_dec, of_W_enc, of_biases = squares.split(sizes) if norm else (None, None, None)
    common = {
        "rows_ptr": csc.rows, "offsets_ptr": csc.offsets, "starts_ptr": long.starts, "dz_ptr": dz,
        "CHUNK": CHUNK, "BLOCK_T": TUNING.entries, "maxnreg": registers,
    }  # fmt: skip
    decoder = {
        "values_ptr": values, "positions_ptr": csc.positions, "dY_ptr": dY,
        "chunk_dW_dec_ptr": chunk_sums, "levels_ptr": levels,
        "dY_scale": dY_scale, "level_stride": len(x) * width, "LEVELS": len(dY),
        "D": width,
        **common, **decoder_blocks(width),
    }  # fmt: skip
    if chunks:
        decoder_chunks_kernel[(chunks,)](
            W_dec_ptr=_bits(W_dec.weight), W_dec_remainder_ptr=W_dec.remainder,
            owners_ptr=long.owners,
            F=latents,
            STAGES=TUNING.stages,
            **decoder,
        )  # fmt: skip
    step = {"step_ptr": adam.pop("step_ptr"), "first_row": adam.pop("first_row")}
    decoder_kernel[(latents,)](
        **_row_pointers("W_dec", W_dec),
        aux_slots_ptr=aux and aux.slots, aux_dW_dec_ptr=aux and aux.W_dec, squares_ptr=of_W_dec,
        **decoder, **step, **adam,
    )  # fmt: skip
    # The decoder's chunk sums have been read: the encoder's take their place, if they fit.
    chunk_sums = chunk_sums if read == width else new(chunks, read)
    launch_chunk_sums(dz, csc.rows, csc.offsets, x, long, chunk_sums)
    encoder_kernel[(cdiv(latents, TUNING.encoder_latents), encoder_tiles)](
        **_row_pointers("W_enc", W_enc),
        b_dec_ptr=b_dec if tied else None, x_ptr=x, chunk_dW_enc_ptr=chunk_sums,
        aux_slots_ptr=aux and aux.slots,
        aux_dW_enc_ptr=aux and aux.W_enc, aux_db_enc_ptr=aux and aux.b_enc,
        db_enc_ptr=db_enc, block_db_dec_ptr=block_db_dec, squares_ptr=of_W_enc,
        F=latents, D=read,
        LATENTS=TUNING.encoder_latents,
        **common, **tiles, **step, **adam,
    )  # fmt: skip
    parts = new(cdiv(tokens, BIAS_ROWS) + cdiv(blocks, BIAS_ROWS), width)
    tile = {"D": width, "ROWS": BIAS_ROWS, "COLUMNS": BIAS_COLUMNS, "num_warps": BIAS_COLUMNS // 32}
    db_dec_parts_kernel[(len(parts), bias_tiles[1])](
        dY_ptr=dY, block_db_dec_ptr=block_db_dec, parts_ptr=parts,
        tokens=tokens, blocks=blocks, dY_scale=dY_scale,
        **tile,
    )  # fmt: skip
    biases_kernel[(sum(bias_tiles),)](
        **biases, db_enc_ptr=db_enc, parts_ptr=parts, squares_ptr=of_biases,
        F=latents, parts=len(parts),
        **tile, **adam,
    )  # fmt: skip
    return squares


def gradient_norm(W_enc: MatrixState, W_dec: MatrixState, b_dec: Tensor, inputs: Batch) -> Tensor:
    unused: dict[str, Any] = dict.fromkeys(("scalars_ptr", "step_ptr", "clip_ptr"))
    unused |= dict.fromkeys(("eps", "BETA1", "BETA2"), 0.0) | {"first_row": 0}
    biases = _bias_pointers("b_enc") | _bias_pointers("b_dec")
    return _launch(W_enc, W_dec, b_dec, inputs, biases, norm=True, **unused).sum().sqrt()


def fused_update(parameters: Parameters, db_dec: Tensor | None, inputs: Batch, adam: Adam) -> None:
    W_enc, b_enc, W_dec, b_dec, moments, first_row = parameters
    lr, step, clip, beta1, beta2, eps, decoder_lr_ratio = adam
    scalars = torch.empty(3, dtype=torch.float32, device=lr.device)
    step_scalars_kernel[(1,)](
        lr_ptr=lr, step_ptr=step, scalars_ptr=scalars,
        LOG_BETA1=math.log(beta1), LOG_BETA2=math.log(beta2),
        DECODER_LR_RATIO=decoder_lr_ratio, COUNT=int(db_dec is None),
        num_warps=1,  # another might read the count after it is written
    )  # fmt: skip
    own = (b_dec, *moments) if db_dec is None else (db_dec,)
    _launch(
        W_enc, W_dec, b_dec, inputs, _bias_pointers("b_enc", *b_enc) | _bias_pointers("b_dec", *own),
        own_part=db_dec is not None,
        step_ptr=step, first_row=first_row,
        scalars_ptr=scalars, clip_ptr=clip, eps=eps, BETA1=beta1, BETA2=beta2,
    )  # fmt: skip
