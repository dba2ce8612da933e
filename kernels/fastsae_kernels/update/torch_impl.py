"""The fused update on torch; :mod:`fastsae_kernels.update` has the mathematics."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..products import row_sums, sampled_products
from .state import Adam, Batch, MatrixState, Parameters, encode_moment_, split_master

# Latents updated together: both gradients of a block stay in the cache.
BLOCK_LATENTS = 512


class _Block(NamedTuple):
    """Some consecutive latents, their master rows and their gradients, the decoder's projected."""

    at: slice
    w_enc: Tensor
    w_dec: Tensor
    dW_enc: Tensor
    db_enc: Tensor
    dW_dec: Tensor
    db_dec: Tensor | float  # what these latents take from it


def _gradient_blocks(
    W_enc: MatrixState, W_dec: MatrixState, b_dec: Tensor, inputs: Batch
) -> Iterator[_Block]:
    """The gradients, block by block of latents; ``w_enc`` and ``w_dec`` are masters to write."""
    (values, csc, x, dY, dY_scale, aux, levels, tied), work = inputs, b_dec.dtype
    centred, dY = x.to(work) - (b_dec if tied else 0), dY.flatten(0, 1).to(work) * dY_scale
    rows = csc.rows  # of dY, whose levels lie one after another
    if levels is not None:
        entry = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        rows = rows + torch.bucketize(entry, csc.offsets[levels[:-1]], right=True) * len(x)
    z = values[csc.positions].to(work)
    starts = [*csc.offsets[::BLOCK_LATENTS].tolist(), int(csc.offsets[-1])]
    latents = len(W_dec.weight)
    for i, first in enumerate(range(0, latents, BLOCK_LATENTS)):
        at = slice(first, min(first + BLOCK_LATENTS, latents))
        entries = slice(starts[i], starts[i + 1])
        tokens = csc.rows[entries]
        offsets = csc.offsets[at.start : at.stop + 1] - starts[i]
        w_enc, w_dec = (_rows(state, at).master() for state in (W_enc, W_dec))
        dz = sampled_products(w_dec, dY, rows[entries], offsets)
        dW_dec = row_sums(z[entries], rows[entries], offsets, dY)
        dW_enc = row_sums(dz, tokens, offsets, centred)
        # <dW_dec, w> is the same sum over z·<dY, w>, so the gradient need not be read for it.
        ends = offsets.long()
        db_enc = torch.segment_reduce(dz, "sum", offsets=ends, initial=0)
        db_dec = w_enc.T @ db_enc if tied else 0.0
        along = torch.segment_reduce(dz * z[entries], "sum", offsets=ends, initial=0)
        if aux is not None:
            slots = aux.slots[at]
            here = (slots >= 0).nonzero().flatten()
            slots = slots[here].long()
            dead_rows = aux.W_dec[slots]
            along[here] += (dead_rows * w_dec[here]).sum(1)
            dW_dec.index_add_(0, here, dead_rows)
            dW_enc.index_add_(0, here, aux.W_enc[slots])
            db_enc.index_add_(0, here, aux.b_enc[slots])
        norm2 = torch.linalg.vector_norm(w_dec, dim=1).square().clamp_min(torch.finfo(work).tiny)
        dW_dec.addcmul_(w_dec, (along / norm2)[:, None], value=-1)
        yield _Block(at, w_enc, w_dec, dW_enc, db_enc, dW_dec, db_dec)


def gradient_norm(W_enc: MatrixState, W_dec: MatrixState, b_dec: Tensor, inputs: Batch) -> Tensor:
    db_dec = inputs.output_gradient(b_dec.dtype)
    squares = b_dec.new_zeros(())
    for block in _gradient_blocks(W_enc, W_dec, b_dec, inputs):
        for gradient in (block.dW_enc, block.db_enc, block.dW_dec):
            squares += torch.linalg.vector_norm(gradient).square()
        db_dec -= block.db_dec
    return (squares + db_dec.square().sum()).sqrt()


def fused_update(parameters: Parameters, db_dec: Tensor | None, inputs: Batch, adam: Adam) -> None:
    W_enc, b_enc, W_dec, b_dec, moments, first_row = parameters
    lr, step, clip, beta1, beta2, eps, decoder_lr_ratio = adam
    if db_dec is None:
        step += 1
        db_dec = inputs.output_gradient(b_dec.dtype)
    else:
        db_dec.zero_()
    options: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "eps": eps}
    options |= {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    t, rate = step.to(torch.float32).reshape(()), float(lr)

    def update(
        weights: list[Tensor],
        gradients: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        rate: float,
    ) -> None:
        if clip is not None:
            for gradient in gradients:
                gradient *= clip.to(gradient.dtype)
        # An internal name, but the one that torch.optim.Adam(fused=True) calls: one pass over the memory.
        steps = [t] * len(weights)
        torch._fused_adam_(weights, gradients, m, v, [], steps, lr=rate, **options)  # pyright: ignore

    for block in _gradient_blocks(W_enc, W_dec, b_dec, inputs):
        at, masters = block.at, (block.w_enc, block.w_dec)
        states = _rows(W_enc, at), _rows(W_dec, at)
        m, v = zip(*(state.moments() for state in states), strict=True)
        db_dec -= block.db_dec
        of_latents = [block.w_enc, b_enc.weight[at]], [block.dW_enc, block.db_enc]
        update(*of_latents, [m[0], b_enc.m[at]], [v[0], b_enc.v[at]], rate)
        update([block.w_dec], [block.dW_dec], [m[1]], [v[1]], decoder_lr_ratio * rate)
        norm = torch.linalg.vector_norm(block.w_dec, dim=1, keepdim=True)
        block.w_dec.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        for state, master, m_rows, v_rows in zip(states, masters, m, v, strict=True):
            _store_(state, master, m_rows, v_rows, first_row + at.start, step)
    if moments:
        m, v = moments
        update([b_dec], [db_dec], [m], [v], rate)


def _rows(state: MatrixState, at: slice) -> MatrixState:
    """The state of some rows, as views."""
    return MatrixState._make(None if part is None else part[at] for part in state)


def _store_(
    state: MatrixState, master: Tensor, m: Tensor, v: Tensor, first_row: int, step: Tensor
) -> None:
    """Write back what is not a view of the state."""
    if state.remainder is not None:
        high, low = split_master(master)
        state.weight.copy_(high)
        state.remainder.copy_(low)
    if state.m_scale is not None and state.v_scale is not None:
        encode_moment_(state.m, state.m_scale, m, first_row, step)
        encode_moment_(state.v, state.v_scale, v, first_row, step)
