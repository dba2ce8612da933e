"""The same mathematics in plain torch, everything dense, as trainers of BatchTopK SAEs write it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae_kernels import reference

from .base import DEAD_AFTER, Trainer, Weights

AUX_WEIGHT = 18.75  # of aux-k beside the log of the error: the default


def dense_objective(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor,
    x: Tensor, K: int, dead: Tensor | None, k_aux: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is minimised, and which latents were active ``[F]``; everything dense, ``W_enc [F, D]``."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    active = torch.relu(pre)
    top = active.flatten().topk(K, sorted=False)
    z = torch.zeros_like(active).flatten().scatter(0, top.indices, top.values).view_as(active)
    residual = x - (z @ W_dec + b_dec)
    objective = residual.float().square().sum(1).mean().log()
    if dead is not None:
        # Zero, and its gradient takes back what aux-k would give b_dec: cheaper than another product.
        given = torch.relu(pre + (b_dec - b_dec.detach()) @ W_enc.T)
        best = torch.where(dead, given, 0).topk(k_aux, dim=-1, sorted=False)
        z_aux = torch.zeros_like(active).scatter(-1, best.indices, best.values)
        target = residual.detach().float()
        error = (z_aux @ W_dec - target).float().square().mean()
        scale = (dead.sum() / k_aux).clamp(max=1) / (target - target.mean(0)).square().mean()
        objective = objective + AUX_WEIGHT * scale * error
    return objective, (z > 0).any(0)


class Dense(Trainer):
    exact = True
    coarse_selection = True
    compiled = False

    def prepare(self, weights: Weights) -> None:
        start = (weights.W_dec.clone(), weights.W_dec, weights.b_enc, weights.b_dec)
        self.parameters = [p.clone().requires_grad_() for p in start]
        self.adam = torch.optim.Adam(self.parameters, lr=self.problem.lr, fused=True)
        self.since = torch.zeros_like(weights.b_enc, dtype=torch.int64)
        self.objective = torch.compile(dense_objective) if self.compiled else dense_objective

    def mark_dead(self, dead: Tensor) -> None:
        self.since.masked_fill_(dead, DEAD_AFTER)

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        for x in batches:
            self._step(x)

    def _step(self, x: Tensor) -> None:
        p = self.problem
        dead = None if p.dead is None else self.since >= DEAD_AFTER
        with p.autocast():
            objective, fired = self.objective(*self.parameters, x, p.shape.K, dead, p.k_aux)
        objective.backward()
        with torch.no_grad():
            W_dec = self.parameters[1]
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.adam.step()
            self.adam.zero_grad()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.since += len(x)
            self.since.masked_fill_(fired, 0)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        W_enc, W_dec, b_enc, b_dec = self.parameters
        pre = reference.pre_activations(x, W_enc.T, b_enc, b_dec)
        mask = reference.batch_topk_mask(pre, self.problem.shape.K)
        return reference.decode(pre * mask, W_dec, b_dec)

    def moments(self) -> tuple[Tensor, Tensor]:
        W_enc, W_dec, *_ = (self.adam.state[p]["exp_avg"] for p in self.parameters)
        return W_enc, W_dec


class Compiled(Dense):
    compiled = True
