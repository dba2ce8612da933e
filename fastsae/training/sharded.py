"""One training step of an SAE whose dictionary is in shards, which one process hosts or several.

All processes take the step on the same whole batch. Everything local is done shard by shard, or on the whole
batch, with shapes that the number of processes does not touch; what crosses between processes is moved, not
added, apart from integers, and sums over shards run along one tree. So the bits are the same on any number of
processes. Beside :class:`FusedUpdate` the selection is the same, and two sums run in another order: that of
the reconstruction and that of the gradient of ``b_dec``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastsae_kernels import (
    CSR,
    AuxGradients,
    BiasState,
    MatrixState,
    csr_to_csc,
    decode_part,
    encode_batch_topk,
    fused_update_latents_,
    reference,
)
from fastsae_kernels.aux_k import ActiveDead, active_dead, loss_and_error_gradient
from fastsae_kernels.sharded_topk import select_across

from ..config import TrainConfig
from ..metrics import density_histogram
from ..sae.module import SAE
from ..team import Node, Team, cover, tree_sum
from .graphs import LaggedCounts
from .update import FusedUpdate, Update, UpdateResult, adam_, copy_state, empty_

_BY_LATENT = ("W_enc", "W_dec", "b_enc")


def latents_of(shards: range, count: int, d_sae: int) -> range:
    """The latents of consecutive ``shards`` of ``count`` that ``d_sae`` latents are cut into."""
    return range(shards.start * d_sae // count, shards.stop * d_sae // count)


class Shard(NamedTuple):
    """Some consecutive latents. Their tensors are their own: where a view of more began in memory, which
    may decide how a library adds, would depend on what else a process hosts."""

    latents: range  # of the dictionary
    W_enc: MatrixState
    b_enc: BiasState
    W_dec: MatrixState
    tokens_since_active: Tensor

    def state(self) -> dict[str, Tensor]:
        """All that is kept of each latent, one row of each tensor; ``W_enc`` too."""
        state = {"tokens_since_active": self.tokens_since_active}
        for name in _BY_LATENT:
            own = getattr(self, name)
            state[name] = own.master() if isinstance(own, MatrixState) else own.weight
            for part, tensor in own._asdict().items():
                if tensor is not None and part not in ("weight", "remainder"):
                    state[f"adam.{name}.{part}"] = tensor
        return state


class ShardedUpdate(Update):
    """The step of :class:`FusedUpdate` on a dictionary in ``config.latent_shards`` shards.

    To be called by all processes of ``team`` with the same batch; so are ``metrics`` and all that tells of
    the whole dictionary. ``tokens_since_active``, ``dead``, ``alive`` and the ``counts`` of a result are of
    the hosted latents, everything else in a result is of the whole.

    Args:
        sae: holds the latents of the shards that this process hosts, maybe none. They are taken out of it:
            while it trains it holds what the shards share.
        d_sae: the number of all latents.
    """

    def __init__(self, sae: SAE, config: TrainConfig, team: Team, d_sae: int) -> None:
        super().__init__(sae, config)
        assert config.latent_shards and not config.needs_whole_dictionary
        count, device = config.latent_shards, sae.device
        self._team, self._whole, self._number = team, d_sae, count
        self._operand = torch.bfloat16 if sae.precision == "bf16" else sae.dtype
        self._nodes = [cover((0, count), team.hosted(count, rank)) for rank in range(team.size)]
        self._widths = [len(latents_of(range(s, s + 1), count, d_sae)) for s in range(count)]
        self._shards: dict[int, Shard] = {}
        hosted = team.hosted(count)
        for shard in hosted:
            latents = latents_of(range(shard, shard + 1), count, d_sae)
            first = latents.start - latents_of(hosted, count, d_sae).start
            at = slice(first, first + len(latents))
            W_enc, W_dec = (
                MatrixState.start(
                    rows[at].clone(),
                    split=self._operand != sae.dtype,
                    quantized_moments=config.moments == "8bit",
                )
                for rows in (sae.W_enc.data.T, sae.W_dec.data)
            )
            b_enc = BiasState.start(sae.b_enc.data[at].clone())
            since = self.tokens_since_active[at]
            self._shards[shard] = Shard(latents, W_enc, b_enc, W_dec, since)
        empty_(sae, _BY_LATENT)
        self._b_dec = BiasState.start(sae.b_dec.data)
        self._dead_counts = LaggedCounts(FusedUpdate.AUX_LAG_STEPS.get(device.type, 0))

    @property
    def shards(self) -> dict[int, range]:
        """The shards that this process hosts, and the latents of each."""
        return {number: shard.latents for number, shard in self._shards.items()}

    # --- what the processes exchange ---

    def _stacked(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return torch.stack(parts) if parts else like.new_empty(0, *like.shape)

    def _from_all(self, parts: list[Tensor], like: Tensor, purpose: str) -> Tensor:
        """Of something that there is for each shard, and is as ``like``, that of all shards ``[S, ...]``."""
        return self._team.gather(
            self._stacked(parts, like), self._team.counts(self._number), purpose
        )

    def _own_tokens(self, tokens: int) -> slice:
        own = self._team.hosted(tokens)
        return slice(own.start, own.stop)

    def _sum(self, parts: list[Tensor], like: Tensor, purpose: str) -> Tensor:
        """The sum over all shards of what each adds to each token ``[B, D]``, for this process's tokens."""
        first = self._team.hosted(self._number).start

        def own(node: Node) -> Tensor | None:
            return parts[node[0] - first] if node[1] - node[0] == 1 else None

        mine = [tree_sum(node, own) for node in self._nodes[self._team.rank]]
        rows, pieces = self._team.counts(len(like)), [len(nodes) for nodes in self._nodes]
        theirs = self._team.exchange(self._stacked(mine, like), rows, pieces, purpose)
        sums = dict(zip([node for nodes in self._nodes for node in nodes], theirs, strict=True))
        return tree_sum((0, self._number), sums.get)

    def _total(self, count: Tensor) -> Tensor:
        return self._team.add_integers_(count, "metrics")

    # --- the step ---

    @torch.no_grad()
    def _step(self, x: Tensor, target: Tensor | None, budget: int) -> UpdateResult:
        config, team, shards = self.config, self._team, [*self._shards.values()]
        scaled, _ = self._sae.scale_input(x)
        b_dec = self._b_dec.weight
        csrs, threshold = self._select(scaled, budget)
        cscs = [csr_to_csc(csr, len(s.latents)) for csr, s in zip(csrs, shards, strict=True)]
        parts = [decode_part(csr, s.W_dec.weight) for csr, s in zip(csrs, shards, strict=True)]
        x_hat = self._sum(parts, scaled, "partial sums") + b_dec
        own = self._own_tokens(len(x))
        residual = team.gather(scaled[own] - x_hat, team.counts(len(x)), "gradients")
        error, dY = residual.square().sum(1).mean(), residual
        if config.objective == "log":
            dY = dY * reference.error_weight(error)

        aux = torch.zeros_like(error)
        aux_gradients: Sequence[AuxGradients | None] = [None] * len(shards)
        if config.aux_weight > 0:
            dead = self._dead_by_shard()
            if capacity := max(self._dead_counts.update(dead)):
                n_dead = dead.clamp(max=capacity).sum()
                aux, aux_gradients = self._aux_k(scaled, residual, n_dead, capacity)
        self.updates += 1
        dY_scale = -2 / len(x)
        inputs, dY = scaled.to(self._operand), dY.to(self._operand)
        parts = [
            fused_update_latents_(
                s.W_enc, s.b_enc, s.W_dec, b_dec, csr, csc, inputs, dY, self.lr, self.updates,
                betas=config.adam_betas, decoder_lr_ratio=config.decoder_lr_ratio,
                dY_scale=dY_scale, aux_gradients=extra, first_row=s.latents.start,
            )
            for s, csr, csc, extra in zip(shards, csrs, cscs, aux_gradients, strict=True)
        ]  # fmt: skip
        parts = self._from_all(parts, b_dec, "scalars")
        leaf = lambda node: parts[node[0]] if node[1] - node[0] == 1 else None
        db_dec = dY.sum(0, dtype=b_dec.dtype) * dY_scale + tree_sum((0, self._number), leaf)
        adam_(self._b_dec, db_dec, self.lr, self.updates, config.adam_betas)
        self.activation.track(threshold)
        counts = torch.cat([self.updates.new_empty(0), *(csc.counts() for csc in cscs)])
        self._count(len(x), counts)
        objective = reference.objective(error, aux, config.aux_weight, config.objective)
        return UpdateResult(objective, error, aux, residual[None], counts)

    def _select(self, x: Tensor, budget: int) -> tuple[list[CSR], Tensor]:
        """Each hosted shard's part of the selection, and the threshold."""
        quota = self.activation.latent_quota
        found = [
            encode_batch_topk(
                x, s.W_enc.weight.T, s.b_enc.weight, self._b_dec.weight, budget, quota
            )
            for s in self._shards.values()
        ]
        return select_across(
            [selection.csr for selection in found], self._team.hosted(self._number), self._widths,
            budget, quota, tokens=len(x), dtype=x.dtype, device=x.device,
            add=lambda counts: self._team.add_integers_(counts, "selection"),
        )  # fmt: skip

    # --- aux-k ---

    def _dead_by_shard(self) -> Tensor:
        """How many latents of each shard are dead ``[S]``."""
        after = self.config.dead_after
        dead = [(s.tokens_since_active >= after).sum() for s in self._shards.values()]
        return self._from_all(dead, self.updates, "aux-k")

    def mark_dead(self, latents: Tensor) -> None:
        super().mark_dead(latents)
        self._dead_counts.fill(self._dead_by_shard())

    def _aux_k(
        self, x: Tensor, residual: Tensor, n_dead: Tensor, capacity: int
    ) -> tuple[Tensor, list[AuxGradients]]:
        """Aux-k's loss and the gradients of each hosted shard's dead latents, at most ``capacity`` of each."""
        config, team = self.config, self._team
        active = []
        for s in self._shards.values():
            most = min(capacity, len(s.latents))
            matrices = s.W_enc.weight, s.b_enc.weight, s.W_dec.weight, self._b_dec.weight
            active.append(
                active_dead(
                    s.tokens_since_active,
                    config.dead_after,
                    most,
                    x,
                    *matrices,
                    self.k_aux,
                    x.dtype,
                )
            )
        active = self._keep_largest(active, x)
        E = self._sum([each.reconstruction() for each in active], residual, "aux-k")
        E = E - residual[self._own_tokens(len(x))]
        E = team.gather(E, team.counts(len(x)), "aux-k")
        loss, dE = loss_and_error_gradient(
            E, residual, x, n_dead, self.k_aux, config.aux_normalization,
            config.aux_weight, self._operand,
        )  # fmt: skip
        return loss, [each.gradients(dE) for each in active]

    def _keep_largest(self, active: list[ActiveDead], x: Tensor) -> list[ActiveDead]:
        """Of what the shards kept for themselves, each token's ``k_aux`` largest; of equals, the lower latents."""
        team, k = self._team, self.k_aux
        best = [each.A.topk(min(k, each.A.shape[1])).values for each in active]
        best = [pad(each, (0, k - each.shape[1])) for each in best]
        rows, like = team.counts(len(x)), x.new_empty(len(x), k)
        theirs = team.exchange(self._stacked(best, like), rows, team.counts(self._number), "aux-k")
        # [S, own tokens, k] -> the k-th of each token, and how many level with it each shard may keep.
        kth = theirs.transpose(0, 1).flatten(1).topk(k).values[:, -1:]
        ties = ((theirs == kth) & (kth > 0)).sum(2)
        quota = k - (theirs > kth).sum((0, 2)) - (ties.cumsum(0) - ties)
        answer = torch.cat([kth, quota.clamp_min(0).T.to(kth.dtype)], 1)
        answer = team.gather(answer, rows, "aux-k")
        kth, kept = answer[:, :1], []
        for number, each in zip(self._shards, active, strict=True):
            A, most = each.A, answer[:, number + 1 : number + 2]
            tied = A.eq(kth) & (kth > 0)
            keep = A.gt(kth) | (tied & (tied.cumsum(1) <= most))
            kept.append(each._replace(A=torch.where(keep, A, 0)))
        return kept

    # --- of the whole dictionary ---

    @property
    def d_sae(self) -> int:
        return self._whole

    def alive_fraction(self) -> float:
        return int(self._total(self.alive.sum())) / self.d_sae

    def decoder_norm_error(self) -> float:
        errors = [(s.W_dec.master().norm(dim=1) - 1).abs().max() for s in self._shards.values()]
        worst = torch.stack([torch.zeros_like(self.lr), *errors]).max()
        return float(self._team.gather(worst[None], [1] * self._team.size, "metrics").max())

    def density_histogram(self, fired: Tensor, tokens: int) -> list[int]:
        return self._total(torch.tensor(density_histogram(fired, tokens))).tolist()

    # --- state ---

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        return {"b_dec": {"m": self._b_dec.m, "v": self._b_dec.v}}

    def shared_state(self) -> dict[str, Tensor]:
        """What all processes have: as :meth:`Update.state_dict`, without what is kept of each latent."""
        latents = {"tokens_since_active", *(f"sae.{name}" for name in _BY_LATENT)}
        state = super().state_dict() | {"dead_counts": self._dead_counts.state()}
        return {name: tensor for name, tensor in state.items() if name not in latents}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Restore it. Raises KeyError and RuntimeError where a tensor is missing or has another shape."""
        own = self.shared_state()
        del own["dead_counts"]  # of any length
        copy_state(own, state)
        self.tokens_seen = int(state["tokens_seen"])
        self._dead_counts.restore(state["dead_counts"])

    def shard_state(self, shard: int) -> dict[str, Tensor]:
        """What is kept of each latent of a hosted shard, one row of each tensor: ``W_enc``, ``W_dec``, ``b_enc``
        (not folded), their ``adam.W_enc.m``, ..., ``tokens_since_active``."""
        return self._shards[shard].state()

    def load_shard_state(self, shard: int, state: dict[str, Tensor]) -> None:
        """Restore it. Raises KeyError and RuntimeError where a tensor is missing or has another shape."""
        copy_state(self.shard_state(shard), state)
        for name in ("W_enc", "W_dec"):  # split ones are copies there
            getattr(self._shards[shard], name).set_master_(state[name])

    def state_dict(self) -> dict[str, Tensor]:
        state = self.shared_state()
        for number in self._shards:
            state |= {_key(number, name): t for name, t in self.shard_state(number).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.load_shared_state(state)
        for number in self._shards:
            own = {name: state[_key(number, name)] for name in self.shard_state(number)}
            self.load_shard_state(number, own)


def _key(shard: int, name: str) -> str:
    return f"shard_{shard:02}.{name}"
