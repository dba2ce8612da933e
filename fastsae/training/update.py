"""One training step of one SAE: loss, gradients, projection, Adam, renormalisation, counters.

Two ways to the same numbers. :class:`AutogradUpdate` is the loss differentiated by autograd, followed by
projection, ``torch.optim.Adam`` and renormalisation. :class:`FusedUpdate` runs on the kernels and never
forms a dense gradient; it is the default. Both keep the same state under the same names, so a run
saved by one goes on with the other.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastsae_kernels import (
    BiasState,
    MatrixState,
    aux_k_gradients,
    clip_factor,
    csr_to_csc,
    encode_batch_topk,
    fused_update_,
    gradient_norm,
    nested_decode_loss,
    normalize_rows_,
    project_gradient_,
)
from fastsae_kernels.step import (
    centred_input,
    output_gradient,
    step_objective,
    track_selection_,
)

from ..config import TrainConfig
from ..metrics import density_histogram
from ..sae.activation import BatchTopK
from ..sae.module import SAE
from ..sae.transcoder import Transcoder
from .graphs import Graphs, LaggedCounts
from .schedule import k_at, lr_factor_at, quota_at

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
"""Those of every SAE; a transcoder may have ``W_skip`` besides."""


class UpdateResult(NamedTuple):
    """What one step saw, before its update; tensors on the device, for whoever wants to wait for them."""

    objective: Tensor  # what is minimised: reference.objective of the next two
    error: Tensor  # mean over tokens and levels of ‖x - x̂‖², after input scaling
    aux: Tensor
    residuals: Tensor  # [L, B, D], x - x̂ (of a transcoder y - ŷ) of each level, after scaling
    counts: Tensor  # [F], tokens that each latent was selected for


class Update(ABC):
    """What both ways share: counters, metrics, and all the state that a step changes.

    The order of a step is: aux-k sees the latents that were dead at the end of the previous step; decoder
    gradients are projected orthogonal to their rows; Adam moves all four parameters; decoder rows go back
    to unit norm. So what is evaluated and saved always has unit-norm rows.

    Args:
        sae: the SAE to train; it is put into training mode and changed in place.
        config: learning rate, aux-k and dead-latent settings.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        assert isinstance(sae.activation, BatchTopK)
        self._sae = sae.train()
        self.activation = sae.activation
        self.config = config
        self.k_aux = sae.default_k_aux if config.k_aux is None else config.k_aux
        self.tokens_seen = 0
        device = sae.W_dec.device
        self.tokens_since_active = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), dtype=sae.W_dec.dtype, device=device)
        """The learning rate of the last step, on the device."""

    @property
    def sae(self) -> SAE:
        """The SAE, with its weights as they are now."""
        return self._sae

    @property
    def d_sae(self) -> int:
        """Latents of the whole dictionary."""
        return self._sae.d_sae

    @property
    def peak_lr(self) -> float:
        """The learning rate between its rise and its fall."""
        return self.config.peak_lr(self.d_sae, self._sae.d_out)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> UpdateResult:
        """Train on ``x [B, D]`` in raw units; a transcoder, to give ``target [B, D_out]``."""
        self.lr.fill_(self.peak_lr * lr_factor_at(self.config, self.tokens_seen, len(x)))
        quota = self.activation.latent_quota = quota_at(self.config, self.tokens_seen)
        # Events are recorded and graphs captured on the current device, which need not be this one.
        with torch.cuda.device_of(self.lr):
            result = self._step(x, target, int(k_at(self.config, self.tokens_seen) * len(x)))
        self.tokens_seen += len(x)
        plain_next = not quota_at(self.config, self.tokens_seen)
        if quota and plain_next and self.tokens_seen < self.config.tokens:
            # Beside the peaks fewer others are kept, and the smallest of them is larger than inference
            # wants: its average begins anew.
            self.activation.threshold_updates.zero_()
        return result

    @abstractmethod
    def _step(self, x: Tensor, target: Tensor | None, budget: int) -> UpdateResult:
        """Everything that happens on the device; ``budget`` entries of the batch are selected."""

    def _count(self, tokens: int, counts: Tensor) -> None:
        """Note which latents were active: ``counts [F]`` tokens of the step's."""
        self.tokens_since_active += tokens
        self.tokens_since_active.masked_fill_(counts > 0, 0)

    def mark_dead(self, latents: Tensor) -> None:
        """Count the latents ``[F]`` (bool) as dead from the next step on, as if they had long been."""
        self.tokens_since_active.masked_fill_(latents, self.config.dead_after)

    @property
    def dead(self) -> Tensor:
        """Latents ``[F]`` (bool) that were not active for ``config.dead_after`` tokens."""
        return self.tokens_since_active >= self.config.dead_after

    @property
    def alive_window(self) -> int:
        """Tokens within which a latent must have been active to count as alive: as many as the final
        evaluation looks at, so that the fraction seen on the way is the one that comes out."""
        return min(self.config.eval_tokens, self.tokens_seen)

    @property
    def alive(self) -> Tensor:
        """Latents ``[F]`` (bool) that were active within the last ``alive_window`` tokens."""
        # One that was never active has counted every token.
        return self.tokens_since_active < self.alive_window

    @torch.no_grad()
    def metrics(self, x: Tensor, result: UpdateResult) -> dict[str, float]:
        """What happened in the step that returned ``result`` for ``x``, of a transcoder for the target; waits
        for the device.

        ``objective``, ``error`` and ``aux`` are after input scaling; everything else is in the units of
        the raw activations, ``mse`` the mean over tokens and dimensions.
        """
        sae = self._sae
        scaled, statistics = sae.scale_target(x)
        x = x.float()
        # By level, and one at a time: together they are as large as the batch times the levels.
        squared = [
            (x - sae.to_raw_units(scaled - residual, statistics).float()).square()
            for residual in result.residuals
        ]
        variance = (x - x.mean(0)).square().sum()
        explained = [1 - each.sum() / variance for each in squared]
        threshold = sae.threshold
        assert threshold is not None
        values = {
            "objective": result.objective,
            "error": result.error,
            "aux": result.aux,
            "mse": squared[-1].mean(),
            "explained_variance": explained[-1],
            "l0": self._total(result.counts.sum()) / len(x),
            "alive_fraction": self.alive_fraction(),
            "alive_window_tokens": self.alive_window,
            "dead": self._total(self.dead.sum()),
            "threshold": threshold,
            "lr": self.lr,
        }
        if len(explained) > 1:
            for m, square, share in zip(sae.levels, squared, explained, strict=True):
                values |= {f"mse_{m}": square.mean(), f"explained_variance_{m}": share}
        numbers = {name: float(value) for name, value in values.items()}
        whole = ("dead", "alive_window_tokens")
        return numbers | {name: int(numbers[name]) for name in whole}

    def _total(self, count: Tensor) -> Tensor:
        """A number of latents or of their uses, in all of the dictionary."""
        return count

    def alive_fraction(self) -> float:
        """The share of the latents that is :attr:`alive`."""
        return float(self.alive.double().mean())

    def decoder_norm_error(self) -> float:
        """How far the norm of any decoder row is from 1."""
        return float((self.sae.W_dec.norm(dim=1) - 1).abs().max())

    def density_histogram(self, fired: Tensor, tokens: int) -> list[int]:
        """How many latents were active on which share of ``tokens``, given ``fired [F]``, on how many each."""
        return density_histogram(fired, tokens)

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a step reads, by name; the weights are the SAE's own, not folded."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, moments in self._moments().items():
            state |= {f"adam.{name}.{part}": tensor for part, tensor in moments.items()}
        state["adam.updates"] = self.updates
        state["tokens_since_active"] = self.tokens_since_active
        state["tokens_seen"] = torch.tensor(self.tokens_seen)
        return state

    @abstractmethod
    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """All that Adam keeps of each parameter, by name: ``m``, ``v`` and, of 8 bits, their scales."""

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        copy_state(Update.state_dict(self), state)
        self.tokens_seen = int(state["tokens_seen"])


def copy_state(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Write what was ``saved`` into the tensors of the same names. Raises KeyError and RuntimeError where one is
    missing or has another shape."""
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise RuntimeError(
                f"{name}: saved {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])


class AutogradUpdate(Update):
    """The plain way: ``SAE.loss``, autograd, projection, ``torch.optim.Adam``, renormalisation."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        super().__init__(sae, config)
        self._parameters = {name: getattr(sae, name) for name in PARAMETERS}
        if isinstance(sae, Transcoder) and sae.W_skip is not None:
            self._parameters["W_skip"] = sae.W_skip
        self._decoder_lr = torch.zeros_like(self.lr)
        others = [p for name, p in self._parameters.items() if name != "W_dec"]
        groups = [{"params": others}, {"params": [sae.W_dec], "lr": self._decoder_lr}]
        self._optimizer = torch.optim.Adam(groups, lr=self.lr, betas=config.adam_betas, fused=True)
        for p in self._parameters.values():
            self._optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                # With the parameter's memory layout: one latent, one contiguous row.
                "exp_avg": torch.zeros_like(p.data),
                "exp_avg_sq": torch.zeros_like(p.data),
            }

    def _step(self, x: Tensor, target: Tensor | None, budget: int) -> UpdateResult:
        sae, config = self.sae, self.config
        loss = sae.loss(
            x,
            self.dead,
            budget=budget,
            objective=config.objective,
            aux_coefficient=config.aux_weight,
            k_aux=self.k_aux,
            aux_normalization=config.aux_normalization,
            target=target,
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        with torch.no_grad():
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            assert sae.W_dec.grad is not None
            project_gradient_(sae.W_dec, sae.W_dec.grad)
            if config.clip_norm is not None:
                norm = torch.stack([g.norm() for g in gradients]).norm()
                clip = clip_factor(norm, config.clip_norm)
                for gradient in gradients:
                    gradient *= clip
            torch.mul(self.lr, config.decoder_lr_ratio, out=self._decoder_lr)
            for state in self._optimizer.state.values():
                state["step"].copy_(self.updates)
            self._optimizer.step()
            self.updates += 1
            normalize_rows_(sae.W_dec)
            counts = (loss.latents > 0).sum(0)
            self._count(len(x), counts)
        objective, error, aux, *_, residuals = (tensor.detach() for tensor in loss)
        return UpdateResult(objective, error, aux, residuals, counts)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        states = {name: self._optimizer.state[p] for name, p in self._parameters.items()}
        return {name: {"m": s["exp_avg"], "v": s["exp_avg_sq"]} for name, s in states.items()}


class FusedUpdate(Update):
    """The fast way: everything sparse runs on the kernels, and a latent's whole update is one pass.

    Nothing waits for the device, and no ``[F, D]`` gradient exists. With ``config.cuda_graph`` a step
    on CUDA is one CUDA graph, one for each number of dead latents that buffers are made for.
    """

    AUX_LAG_STEPS: ClassVar = {"cuda": 4}
    """By type of device, 0 elsewhere: aux-k's buffers are sized by the number of dead latents this many
    steps ago. That count has arrived without anybody waiting, and a fixed lag keeps runs reproducible."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        super().__init__(sae, config)
        self._split = sae.precision == "bf16"
        self._rows = {
            name: MatrixState.start(
                _feature_major(getattr(sae, name).data, name),
                split=self._split,
                quantized_moments=config.moments == "8bit",
            )
            for name in ("W_enc", "W_dec")
        }
        if self._split:
            empty_(sae, self._rows)
        self._biases = {
            name: BiasState.start(getattr(sae, name).data) for name in ("b_enc", "b_dec")
        }
        self._tied = not isinstance(sae, Transcoder)
        self._no_aux = torch.zeros_like(self.lr)
        # Small launches, which need not queue behind large ones. A harvest's stream has another priority, and so
        # is never the same one, which it could be where torch has given out all it has.
        self._stream = torch.cuda.Stream(self.lr.device, priority=-1) if self.lr.is_cuda else None
        if isinstance(sae, Transcoder) and sae.W_skip is not None:
            self._biases["W_skip"] = BiasState.start(sae.W_skip.data)
        self._levels = torch.tensor(sae.levels, dtype=torch.int32, device=sae.W_dec.device)
        self._dead_counts = LaggedCounts(self.AUX_LAG_STEPS.get(sae.W_dec.device.type, 0))
        self._graphs = Graphs(self._on_device) if config.cuda_graph and sae.W_dec.is_cuda else None

    @property
    def sae(self) -> SAE:
        """The SAE, with its weights as they are now: copies, where masters are split and the SAE that was given
        is without rows."""
        if not self._split:
            return self._sae
        whole = copy.copy(self._sae)
        masters = {name: _feature_major(rows.master(), name) for name, rows in self._rows.items()}
        own = {name: nn.Parameter(master) for name, master in masters.items()}
        whole._parameters = {**self._sae._parameters, **own}
        return whole

    def mark_dead(self, latents: Tensor) -> None:
        super().mark_dead(latents)
        self._dead_counts.fill(self.dead.sum())

    @torch.no_grad()
    def _step(self, x: Tensor, target: Tensor | None, budget: int) -> UpdateResult:
        capacity = 0
        if self.config.aux_weight > 0:
            capacity = min(*self._dead_counts.update(self.dead.sum()), self._sae.d_sae)
        quota = self.activation.latent_quota
        batch = x if target is None else torch.cat([x, target], 1)
        # While k goes to its final value no budget comes back, and none is worth a graph.
        settled = budget == int(self.config.k * len(x))
        step = self._graphs if self._graphs and settled else self._on_device
        return step(batch, budget, quota, capacity)

    def _on_device(self, batch: Tensor, budget: int, quota: float, capacity: int) -> UpdateResult:
        """One step that selects ``budget`` entries with a latent ``quota``, and in which up to
        ``capacity`` dead latents take part; reads nothing back."""
        sae, config = self._sae, self.config
        W_enc, W_dec = self._rows["W_enc"], self._rows["W_dec"]
        b_enc, b_dec = self._biases["b_enc"], self._biases["b_dec"]
        operand = W_enc.weight.dtype
        if self._tied:
            constant = sae.scale if sae.normalize == "scalar" else None
            x = sae.scale_input(batch)[0] if sae.normalize == "layer_norm" else batch
            scaled, centred, inputs = centred_input(x, constant, b_dec.weight, operand)
            whole = left = scaled
        else:  # a transcoder's input is centred already
            scaled, _ = sae.scale_input(batch[:, : sae.d_in])
            whole, _ = sae.scale_target(batch[:, sae.d_in :])
            left = sae.left_to_decoder(whole, scaled)
            centred = inputs = scaled.to(operand)

        selection = encode_batch_topk(centred, W_enc.weight.T, b_enc.weight, None, budget, quota)
        csr = selection.csr
        with self._beside():
            csc = csr_to_csc(csr, sae.d_sae)
        decoded = nested_decode_loss(csr, W_dec.weight, b_dec.weight, left, self._levels)

        aux, aux_gradients = self._no_aux, None
        if capacity:
            aux, aux_gradients = aux_k_gradients(
                scaled,
                decoded.residual[-1],
                W_enc.weight,
                b_enc.weight,
                W_dec.weight,
                b_dec.weight if self._tied else torch.zeros_like(scaled[0]),
                self.tokens_since_active,
                dead_after=config.dead_after,
                max_dead=capacity,
                k_aux=self.k_aux,
                normalization=config.aux_normalization,
                coefficient=config.aux_weight,
                target=whole,
            )
        error, objective, weight = step_objective(
            decoded.squared_error, aux, config.aux_weight, config.objective
        )
        levels, tokens, _ = decoded.residual.shape
        dY_scale = -2 / (levels * tokens)
        skip, dW_skip, clip = self._biases.get("W_skip"), None, None
        dY = output_gradient(decoded.residual, weight, operand if skip is None else weight.dtype)
        if skip is not None:
            # All levels share the skip connection, as they do b_dec.
            dW_skip = dY_scale * (dY[0].T @ scaled)
            dY = dY.to(operand)
        self._join()
        with self._beside():
            counts = track_selection_(
                self.activation.threshold,
                self.activation.threshold_updates,
                self.tokens_since_active,
                selection.threshold,
                csc.offsets,
                tokens,
                self.activation.threshold_rate,
            )
        options: dict[str, Any] = {"dY_scale": dY_scale, "aux_gradients": aux_gradients}
        options |= {"levels": self._levels, "tied": self._tied}
        if config.clip_norm is not None:
            norm = gradient_norm(W_enc, W_dec, b_dec.weight, csr, csc, inputs, dY, **options)
            if dW_skip is not None:
                norm = torch.hypot(norm, dW_skip.norm())
            clip = clip_factor(norm, config.clip_norm)
        fused_update_(
            W_enc, b_enc, W_dec, b_dec, csr, csc, inputs, dY, self.lr, self.updates,
            betas=config.adam_betas, decoder_lr_ratio=config.decoder_lr_ratio, clip=clip, **options,
        )  # fmt: skip
        if skip is not None and dW_skip is not None:
            gradient = dW_skip if clip is None else clip * dW_skip
            adam_(skip, gradient, self.lr, self.updates, config.adam_betas)
        self._join()
        return UpdateResult(objective, error, aux, decoded.residual, counts)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What is launched in the block may run beside what follows it, until :meth:`_join`.

        It begins after all that was launched before, so that it may take memory which that has given back; and
        what it reads is not given back before the join.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        parts = {}
        for name, rows in self._rows.items():
            parts[name] = {"m": rows.m, "v": rows.v}
            if rows.m_scale is None:
                # In the parameter's public shape, as the autograd step has them.
                parts[name] = {part: _feature_major(t, name) for part, t in parts[name].items()}
            else:
                parts[name] |= {"m_scale": rows.m_scale, "v_scale": rows.v_scale}
        return parts | {name: {"m": b.m, "v": b.v} for name, b in self._biases.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"dead_counts": self._dead_counts.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        # A run that the autograd step saved has no counts on their way: aux-k starts the lag anew.
        self._dead_counts.restore(state.get("dead_counts", torch.zeros(0, dtype=torch.int64)))
        if self._split:
            for name, rows in self._rows.items():
                rows.set_master_(_feature_major(state[f"sae.{name}"], name))


def adam_(
    state: BiasState,
    gradient: Tensor,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> None:
    """One step of Adam, in place, for what no kernel updates; reads nothing back."""
    beta1, beta2 = betas
    state.m.lerp_(gradient, 1 - beta1)
    state.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1, correction2 = (1 - beta ** step.double() for beta in betas)
    root = (state.v / correction2.to(state.v.dtype)).sqrt_().add_(eps)
    state.weight.sub_(state.m * (lr / correction1).to(state.m.dtype) / root)


def empty_(sae: SAE, names: Iterable[str]) -> None:
    """Let go of the latents' rows of ``sae``, which somebody else holds from now on."""
    for name in names:
        parameter = getattr(sae, name)
        none = parameter.data[:, :0] if name == "W_enc" else parameter.data[:0]
        parameter.data = none.clone()  # a view would keep the rest in memory


def _feature_major(tensor: Tensor, name: str) -> Tensor:
    """Between a parameter or its moment and its contiguous ``[F, D]`` storage: ``W_enc`` is a transposed view."""
    return tensor.T if name == "W_enc" else tensor


UPDATES = {"fused": FusedUpdate, "autograd": AutogradUpdate}
