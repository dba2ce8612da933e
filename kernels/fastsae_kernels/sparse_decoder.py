"""The sparse decoder: reconstructions as weighted sums of the active latents' rows.

    x̂[b]     = Σ_{j in row b} z[j] · W_dec[i[j]] + b_dec        z: CSR values, i: CSR indices
    dz[j]    = <dx̂[b(j)], W_dec[i[j]]>
    dW_dec[f] = Σ_{j: i[j] = f} z[j] · dx̂[b(j)]                 the same sum, over the CSC
    db_dec   = Σ_b dx̂[b]

Nested (Matryoshka), the first ``m_l`` latents reconstruct by themselves, for each level l:

    x̂_l[b]   = x̂_{l-1}[b] + Σ_{j in row b, m_{l-1} <= i[j] < m_l} z[j] · W_dec[i[j]],   x̂_0 = b_dec

so a row is cut at the levels into segments, each is summed once, and the sums add up over the levels.

Shapes: ``values [K]``, ``indices [K]``, ``offsets [B + 1]``, ``W_dec [F, D]``, ``b_dec [D]``,
``x [B, D]``. Sums are in float32 (float64 for float64 tensors) and rounded once, at the store. Rows of
more than 128 actives are summed in chunks (:mod:`.segments`). No atomics: bitwise reproducible.

Bytes moved, ``e`` bytes an element: forward ``nnz·D·e`` gathered (through L2: at most ``F·D·e`` of it
from memory) plus ``B·D·e`` written; the loss reads and writes ``B·D·e`` more. ``dz``: ``2·nnz·D·e``
gathered. ``dW_dec``: ``nnz·D·e`` gathered and ``F·D·e`` written.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import cdiv, implementation, jit, power_of_2, register, save_inputs, tl
from .dtypes import accumulator, rounded, upcast
from .products import row_sums, sampled_products
from .segments import CHUNK, LongSegments, chunk_capacity, long_segments
from .sparse import CSR
from .transpose import csr_to_csc

# Entries and columns of one tile, and warps: 32 float32 accumulators a thread.
BLOCK_N = 8
WARPS = 4
ONE_STAGE = tl.constexpr(1)


def column_block(width: int) -> int:
    """Columns of a tile: 512 where it divides D, else 256 (768 and 2304 are multiples of it)."""
    return 512 if width % 512 == 0 else min(256, max(16, power_of_2(width)))


@jit
def weighted_sum(
    values_ptr, indices_ptr, table_ptr,
    begin, end, columns, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr = ONE_STAGE,
):  # fmt: skip
    """``Σ_{begin <= j < end} values[j] · table[indices[j], columns]``, ``[BLOCK_D]`` float32.

    ``STAGES`` of the loop are under way at a time: more pay where segments are long.
    """
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        entry = first + tl.arange(0, BLOCK_N)
        inside = entry < end
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        index = tl.load(indices_ptr + entry, mask=inside, other=0).to(tl.int64)
        row = tl.load(  # [BLOCK_N, BLOCK_D]
            table_ptr + index[:, None] * D + columns[None, :],
            mask=inside[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += value[:, None] * row
    return tl.sum(total, 0)


@jit
def chunk_sums_kernel(
    values_ptr, indices_ptr, offsets_ptr, table_ptr, starts_ptr, owners_ptr, sums_ptr,
    segments, D,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of a long segment and one tile of columns a program."""
    chunk = tl.program_id(0)
    if chunk < tl.load(starts_ptr + segments):
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        segment = tl.load(owners_ptr + chunk)
        begin = tl.load(offsets_ptr + segment) + (chunk - tl.load(starts_ptr + segment)) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offsets_ptr + segment + 1))
        total = weighted_sum(
            values_ptr, indices_ptr, table_ptr, begin, end, columns, D, BLOCK_N, BLOCK_D, STAGES=3
        )
        tl.store(sums_ptr + chunk.to(tl.int64) * D + columns, total, mask=columns < D)


@jit
def _segment_sum(
    values_ptr, indices_ptr, offsets_ptr, table_ptr, starts_ptr, sums_ptr,
    segment, columns, D,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The whole of one segment: from its entries if short, from its chunks' sums if long."""
    begin = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    end = tl.where(end - begin > CHUNK, begin, end)
    total = weighted_sum(
        values_ptr, indices_ptr, table_ptr, begin, end, columns, D, BLOCK_N, BLOCK_D
    )
    for chunk in range(tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)):
        at = tl.cast(chunk, tl.int64) * D + columns
        total += tl.load(sums_ptr + at, mask=columns < D, other=0.0)
    return total


@jit
def weighted_row_sums_kernel(
    values_ptr, indices_ptr, offsets_ptr, table_ptr, bias_ptr, starts_ptr, sums_ptr, out_ptr,
    D,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One segment and one tile of columns a program."""
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _segment_sum(
        values_ptr, indices_ptr, offsets_ptr, table_ptr, starts_ptr, sums_ptr,
        segment, columns, D,
        CHUNK, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    at = segment.to(tl.int64) * D + columns
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=columns < D)


@jit
def decode_loss_kernel(
    values_ptr, indices_ptr, offsets_ptr, table_ptr, bias_ptr, x_ptr, starts_ptr, sums_ptr,
    residual_ptr, squares_ptr,
    tokens, D,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, with its segments, and one tile of columns a program; ``squares [L, B, tiles]``."""
    token = tl.program_id(0)
    tile = tl.program_id(1)
    columns = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for level in range(LEVELS):
        total += _segment_sum(
            values_ptr, indices_ptr, offsets_ptr, table_ptr, starts_ptr, sums_ptr,
            token * LEVELS + level, columns, D,
            CHUNK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        # Read here: kept from level to level they would occupy registers all through the sums. Outside D
        # all of x, x̂ and hence the residual are zero.
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token.to(tl.int64) * D + columns, mask=inside, other=0.0)
        residual = x.to(tl.float32) - (total + bias)
        row = tl.cast(level, tl.int64) * tokens + token
        to = residual_ptr + row * D + columns
        tl.store(to, rounded(residual, residual_ptr.dtype.element_ty), mask=inside)
        tl.store(squares_ptr + row * tl.num_programs(1) + tile, tl.sum(residual * residual, 0))


@jit
def value_gradients_kernel(
    dx_hat_ptr, indices_ptr, tokens_ptr, offsets_ptr, W_dec_ptr, out_ptr,
    B, K, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` slots a program; slots beyond ``nnz`` get zero."""
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = slot < tl.load(offsets_ptr + B)
    token = tl.load(tokens_ptr + slot, mask=inside, other=0).to(tl.int64)
    index = tl.load(indices_ptr + slot, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        dx_hat = tl.load(dx_hat_ptr + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
        row = tl.load(W_dec_ptr + index[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total += dx_hat.to(tl.float32) * row.to(tl.float32)
    dz = rounded(tl.sum(total, 1), out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot, dz, mask=slot < K)


def tile_blocks(width: int) -> dict[str, int]:
    """The constants of a kernel over tiles of columns."""
    return {"CHUNK": CHUNK, "BLOCK_N": BLOCK_N, "BLOCK_D": column_block(width), "num_warps": WARPS}


def launch_chunk_sums(
    values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor, long: LongSegments, out: Tensor
) -> None:
    """Write each chunk's weighted sum of ``table``'s rows to ``out [chunk_capacity(K), D]`` float32."""
    width = table.shape[1]
    if len(out):
        chunk_sums_kernel[(len(out), cdiv(width, column_block(width)))](
            values_ptr=values, indices_ptr=indices, offsets_ptr=offsets, table_ptr=table,
            starts_ptr=long.starts, owners_ptr=long.owners, sums_ptr=out,
            segments=len(offsets) - 1, D=width,
            **tile_blocks(width),
        )  # fmt: skip


def _launch_segment_sums(kernel, programs, values, indices, offsets, table, **others) -> None:
    """Launch ``kernel`` over (programs, column tiles), the long segments' chunks before it."""
    width = table.shape[1]
    if not programs * width:
        return
    long, chunks = long_segments(offsets, len(indices)), chunk_capacity(len(indices))
    sums = torch.empty(chunks, width, dtype=torch.float32, device=table.device)
    launch_chunk_sums(values, indices, offsets, table, long, sums)
    kernel[(programs, cdiv(width, column_block(width)))](
        values_ptr=values, indices_ptr=indices, offsets_ptr=offsets, table_ptr=table,
        starts_ptr=long.starts, sums_ptr=sums,
        D=width,
        **others, **tile_blocks(width),
    )  # fmt: skip


def _row_sums_torch(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """The weighted row sums ``[n, D]`` in the accumulator's dtype."""
    table, nnz = upcast(table), int(offsets[-1])
    # The unused slots would count to the last row.
    return row_sums(values[:nnz].to(table.dtype), indices[:nnz], offsets, table)


def _fake_row_sums(values, indices, offsets, table, bias, unrounded=False):
    dtype = accumulator(table.dtype) if unrounded else table.dtype
    return table.new_empty(offsets.shape[0] - 1, table.shape[1], dtype=dtype)


def _fake_value_gradients(dx_hat, values, indices, offsets, W_dec):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@register(fake=_fake_value_gradients)
def _value_gradients(
    dx_hat: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor
) -> Tensor:
    dx_hat, W_dec = dx_hat.contiguous(), W_dec.contiguous()
    out = _fake_value_gradients(dx_hat, values, indices, offsets, W_dec)
    if implementation(W_dec) == "torch":
        nnz = int(offsets[-1])
        dz = sampled_products(upcast(dx_hat), upcast(W_dec), indices[:nnz], offsets)
        out.zero_()[:nnz] = dz
    elif len(values):
        tokens = CSR(values, indices, offsets).tokens()
        value_gradients_kernel[(cdiv(len(values), BLOCK_N),)](
            dx_hat_ptr=dx_hat, indices_ptr=indices, tokens_ptr=tokens, offsets_ptr=offsets,
            W_dec_ptr=W_dec, out_ptr=out,
            B=len(offsets) - 1, K=len(values), D=W_dec.shape[1],
            BLOCK_N=BLOCK_N, BLOCK_D=column_block(W_dec.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    return out


def _decode_gradients(ctx, inputs, dx_hat) -> tuple[Tensor | None, ...]:
    """Gradients of the decoder's five inputs from ``dx̂``, each only where it is needed."""
    (values, indices, offsets, W_dec, b_dec), need = inputs, ctx.needs_input_grad
    dvalues = dW_dec = db_dec = None
    low = dx_hat.to(W_dec.dtype)
    if need[0]:
        dvalues = _value_gradients(low, values, indices, offsets, W_dec)
    if need[3]:
        csc = csr_to_csc(CSR(values, indices, offsets), W_dec.shape[0])
        # The plain sums: they have no derivative, so that a second one is refused, not wrong.
        dW_dec = _weighted_row_sums(values[csc.positions], csc.rows, csc.offsets, low, None)
    if need[4]:
        db_dec = dx_hat.sum(0, dtype=accumulator(dx_hat.dtype)).to(b_dec.dtype)
    return dvalues, None, None, dW_dec, db_dec


def _decode_backward(ctx, dx_hat) -> tuple[Tensor | None, ...]:
    return _decode_gradients(ctx, ctx.saved_tensors, dx_hat)


@register(fake=_fake_row_sums)
def _weighted_row_sums(
    values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor, bias: Tensor | None,
    unrounded: bool = False,
) -> Tensor:  # fmt: skip
    values, table = values.contiguous(), table.contiguous()
    out = _fake_row_sums(values, indices, offsets, table, bias, unrounded)
    if implementation(table) == "torch":
        total = _row_sums_torch(values, indices, offsets, table)
        return (total if bias is None else total + bias).to(out.dtype)
    bias = None if bias is None else bias.contiguous()
    _launch_segment_sums(
        weighted_row_sums_kernel, len(out), values, indices, offsets, table,
        bias_ptr=bias, out_ptr=out,
    )  # fmt: skip
    return out


@register(fake=_fake_row_sums, setup_context=save_inputs, backward=_decode_backward)
def _sparse_decode(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    return _weighted_row_sums(values, indices, offsets, W_dec, b_dec)


def _fake_decode_loss(values, indices, offsets, W_dec, b_dec, x):
    squared_error = x.new_empty(x.shape[0], dtype=accumulator(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), squared_error


def _fake_nested_decode_loss(values, indices, offsets, W_dec, b_dec, x, levels):
    squared_error = x.new_empty(levels, x.shape[0], dtype=accumulator(x.dtype))
    return x.new_empty(levels, *x.shape), squared_error


@register(fake=_fake_nested_decode_loss)
def _nested_decode_loss(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``offsets [B * levels + 1]`` cut each token's row into the segments of its levels."""
    values, W_dec, b_dec, x = (t.contiguous() for t in (values, W_dec, b_dec, x))
    residual, squared_error = _fake_nested_decode_loss(
        values, indices, offsets, W_dec, b_dec, x, levels
    )
    if implementation(W_dec) == "torch":
        blocks = _row_sums_torch(values, indices, offsets, W_dec).view(len(x), levels, x.shape[1])
        x_hat = b_dec
        for level in range(levels):
            x_hat = x_hat + blocks[:, level]
            exact = x - x_hat
            residual[level], squared_error[level] = exact, exact.square().sum(1)
        return residual, squared_error
    tiles = cdiv(x.shape[1], column_block(x.shape[1]))
    # The sum of one tile needs no other.
    squares = squared_error if tiles == 1 else squared_error.new_empty(levels, len(x), tiles)
    _launch_segment_sums(
        decode_loss_kernel, len(x), values, indices, offsets, W_dec,
        bias_ptr=b_dec, x_ptr=x, residual_ptr=residual, squares_ptr=squares,
        tokens=len(x), LEVELS=levels,
    )  # fmt: skip
    return residual, squares if tiles == 1 else squares.sum(2)


def _save_decode_loss(ctx, inputs, output):
    values, indices, offsets, W_dec, b_dec, _ = inputs
    ctx.save_for_backward(values, indices, offsets, W_dec, b_dec, output[0])


def _decode_loss_backward(ctx, dresidual, dsquared_error):
    *inputs, residual = ctx.saved_tensors
    dx_hat = -dresidual - 2 * dsquared_error.to(residual.dtype)[:, None] * residual
    dx = -dx_hat if ctx.needs_input_grad[5] else None
    return *_decode_gradients(ctx, inputs, dx_hat), dx


@register(fake=_fake_decode_loss, setup_context=_save_decode_loss, backward=_decode_loss_backward)
def _sparse_decode_loss(
    values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    residual, squared_error = _nested_decode_loss(values, indices, offsets, W_dec, b_dec, x, 1)
    return residual[0], squared_error[0]


def nested_gradient(residual: Tensor) -> Tensor:
    """``[L, B, D]``: each level's residual and those of the levels after it, summed from the last on.

    Times ``-2 / (L·B)``, the gradient of the mean of all levels' errors by what the latents that a level adds
    (of the first, ``b_dec`` too) reconstruct. Of one level, the residual itself.
    """
    if len(residual) == 1:
        return residual
    sums = residual.clone()
    for level in reversed(range(len(sums) - 1)):
        sums[level] += sums[level + 1]
    return sums


def _check(csr: CSR, W_dec: Tensor, b_dec: Tensor, x: Tensor | None = None) -> None:
    if csr.values.shape != csr.indices.shape or csr.values.dim() != 1:
        raise ValueError(
            "csr.values and csr.indices: expected two vectors of one length, got "
            f"{list(csr.values.shape)} and {list(csr.indices.shape)}"
        )
    for name, tensor in (("indices", csr.indices), ("offsets", csr.offsets)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"csr.{name}: expected int32, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"csr.{name}: expected contiguous, got strides {tensor.stride()}")
    if W_dec.dim() != 2 or b_dec.shape != W_dec.shape[1:]:
        raise ValueError(
            "W_dec and b_dec: expected [F, D] and [D], got "
            f"{list(W_dec.shape)} and {list(b_dec.shape)}"
        )
    if x is not None and x.shape != (len(csr.offsets) - 1, W_dec.shape[1]):
        raise ValueError(
            f"x: expected [B, D] = [{len(csr.offsets) - 1}, {W_dec.shape[1]}] of csr and W_dec, "
            f"got {list(x.shape)}"
        )


def sparse_decode(csr: CSR, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``x̂ = z @ W_dec + b_dec``, ``[B, D]`` in ``W_dec``'s dtype, for ``z`` in sparse form.

    ``csr`` holds int32 indices and offsets and values of any float dtype; ``W_dec [F, D]`` and
    ``b_dec [D]`` are float64, float32, bfloat16 or float16. Strided tensors are copied. Differentiable
    in ``csr.values``, ``W_dec`` (its gradient is dense ``[F, D]``) and ``b_dec``; not twice.
    Bitwise reproducible. Bytes: see the module. Raises ValueError on shapes and dtypes that do not fit.
    """
    _check(csr, W_dec, b_dec)
    return _sparse_decode(*csr, W_dec, b_dec)


def decode_part(csr: CSR, W_dec: Tensor) -> Tensor:
    """``z @ W_dec [B, D]``, what some latents add to a reconstruction: not rounded, in float32 (float64 for
    float64), and without the bias. Not differentiable; the rest as :func:`sparse_decode`."""
    _check(csr, W_dec, W_dec.new_empty(W_dec.shape[1]))
    return _weighted_row_sums(*csr, W_dec, None, True)


class DecodeLoss(NamedTuple):
    residual: Tensor  # [B, D] = x - x̂, the dtype of x
    squared_error: Tensor  # [B] = Σ_d (x - x̂)², float32 (float64 for float64)


def sparse_decode_loss(csr: CSR, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> DecodeLoss:
    """Decode, subtract and square in one pass, for ``x [B, D]``; the rest as :func:`sparse_decode`.

    The error is ``squared_error.mean()``, and its gradient is a multiple of what is returned:
    ``dY = d error / dx̂ = residual · (-2 / B)``, so no second buffer is written; ``fused_update_``
    takes the pair. The squares are those of the unrounded residual, summed tile by tile in fixed
    order. Differentiable in ``csr.values``, ``W_dec``, ``b_dec`` and ``x``.
    """
    _check(csr, W_dec, b_dec, x)
    return DecodeLoss(*_sparse_decode_loss(*csr, W_dec, b_dec, x))


def nested_decode_loss(
    csr: CSR, W_dec: Tensor, b_dec: Tensor, x: Tensor, levels: Tensor
) -> DecodeLoss:
    """:func:`sparse_decode_loss` of every prefix of the dictionary: residual ``[L, B, D]``, squares ``[L, B]``.

    ``levels [L]`` (int32, on the device, not looked at) are the prefixes' latents, ascending; the last
    is F, so the last residual is that of the whole. Each active latent's row is still gathered once.
    With one level, the bits of :func:`sparse_decode_loss`. Not differentiable; :func:`nested_gradient` has
    what ``fused_update_`` takes.
    """
    _check(csr, W_dec, b_dec, x)
    offsets = csr.offsets
    if len(levels) > 1:
        # Entries ascend in (token, latent), and a level's segment ends where its first latent beyond
        # would stand; the unused slots count to a token after the last.
        latents, token = len(W_dec), torch.arange(len(x), device=x.device)
        entries = csr.tokens() * latents + csr.indices
        ends = torch.searchsorted(entries, (token[:, None] * latents + levels).flatten())
        offsets = torch.cat([offsets[:1], ends.int()])
    return DecodeLoss(
        *_nested_decode_loss(csr.values, csr.indices, offsets, W_dec, b_dec, x, len(levels))
    )
