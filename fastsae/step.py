"""One training step of one SAE: loss, gradients, projection, Adam, renormalisation, counters.

Two ways to the same numbers. :class:`AutogradStep` is the loss differentiated by autograd, followed by
projection, ``torch.optim.Adam`` and renormalisation. :class:`FusedStep` runs on the kernels and never
forms a dense gradient; it is the default. Both keep the same state under the same names, so a run
saved by one goes on with the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import reference
from fastsae_kernels.adam_state import Rows, Vector
from fastsae_kernels.aux_k import aux_k_gradients
from fastsae_kernels.batch_topk import csr_to_csc
from fastsae_kernels.decoder_norm import normalize_rows_, project_gradient_
from fastsae_kernels.encode_topk import encode_batch_topk
from fastsae_kernels.fused_update import fused_update_
from fastsae_kernels.sparse_decoder import sparse_decode_loss

from .activation import BatchTopK
from .config import TrainConfig
from .sae import SAE

ALIVE_WINDOW_TOKENS = 1_000_000
"""A latent counts as alive when it was active within this many tokens."""

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


class StepResult(NamedTuple):
    """What one step saw, before its update; tensors on the device, for whoever wants to wait for them."""

    loss: Tensor
    mse: Tensor
    aux: Tensor
    residual: Tensor  # [B, D], x - x̂ in raw units
    counts: Tensor  # [F], tokens that each latent was selected for


class TrainStep(ABC):
    """What both ways share: counters, metrics, and all the state that a step changes.

    The order of a step is: aux-k sees the latents that were dead at the end of the previous step; each
    decoder row's gradient loses its component along the row; Adam moves all four parameters; decoder
    rows go back to unit norm. So what is evaluated and saved always has unit-norm rows.

    Args:
        sae: the SAE to train; it is put into training mode and changed in place.
        config: learning rate, aux-k and dead-latent settings.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        assert isinstance(sae.activation, BatchTopK)
        self.sae = sae.train()
        self.activation = sae.activation
        self.config = config
        self.k_aux = max(1, sae.d_in // 2) if config.k_aux is None else config.k_aux
        self.tokens_seen = 0
        device = sae.W_dec.device
        self.tokens_since_active = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        # Each with its parameter's memory layout: one latent, one contiguous row.
        self.m = {name: torch.zeros_like(getattr(sae, name).data) for name in PARAMETERS}
        self.v = {name: torch.zeros_like(getattr(sae, name).data) for name in PARAMETERS}

    def __call__(self, x: Tensor) -> StepResult:
        """Train on ``x [B, D]`` in raw units."""
        result = self._update(x)
        self.tokens_since_active += len(x)
        self.tokens_since_active.masked_fill_(result.counts > 0, 0)
        self.tokens_seen += len(x)
        return result

    @abstractmethod
    def _update(self, x: Tensor) -> StepResult:
        """Everything but the counters."""

    @property
    def dead(self) -> Tensor:
        """Latents ``[F]`` (bool) that were not active for ``dead_after_tokens`` tokens."""
        return self.tokens_since_active >= self.config.dead_after_tokens

    @torch.no_grad()
    def metrics(self, x: Tensor, result: StepResult) -> dict[str, float]:
        """What happened in the step that returned ``result`` for ``x``; waits for the device.

        ``loss`` and ``aux`` are the terms that were minimised (after input scaling); everything else
        is in the units of the raw activations.
        """
        x, residual = x.float(), result.residual.float()
        error = residual.square()
        threshold = self.sae.threshold
        assert threshold is not None
        # A latent that was never active has counted every token; it is not alive however young the run.
        window = min(ALIVE_WINDOW_TOKENS, self.tokens_seen)
        values = {
            "loss": result.loss,
            "mse": error.mean(),
            "aux": result.aux,
            "explained_variance": 1 - error.sum() / (x - x.mean(0)).square().sum(),
            "l0": result.counts.sum() / len(x),
            "alive_fraction": (self.tokens_since_active < window).double().mean(),
            "dead": self.dead.sum(),
            "threshold": threshold,
        }
        numbers = {name: float(value) for name, value in values.items()}
        return numbers | {"dead": int(numbers["dead"])}

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a step reads, by name; the weights are the SAE's own, not folded."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name in PARAMETERS:
            state |= {f"adam.{name}.m": self.m[name], f"adam.{name}.v": self.v[name]}
        state["adam.updates"] = self.updates
        state["tokens_since_active"] = self.tokens_since_active
        state["tokens_seen"] = torch.tensor(self.tokens_seen)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        for name, tensor in TrainStep.state_dict(self).items():
            if tensor.shape != state[name].shape:
                raise RuntimeError(
                    f"{name}: saved {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        self.tokens_seen = int(state["tokens_seen"])


class AutogradStep(TrainStep):
    """The plain way: ``SAE.loss``, autograd, projection, ``torch.optim.Adam``, renormalisation."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        super().__init__(sae, config)
        parameters = {name: getattr(sae, name) for name in PARAMETERS}
        self._optimizer = torch.optim.Adam(parameters.values(), lr=config.lr, fused=True)
        for name, p in parameters.items():
            self._optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=sae.W_dec.device),
                "exp_avg": self.m[name],
                "exp_avg_sq": self.v[name],
            }

    def _update(self, x: Tensor) -> StepResult:
        sae, config = self.sae, self.config
        loss = sae.loss(
            x,
            self.dead if config.aux_coefficient > 0 else None,
            aux_coefficient=config.aux_coefficient,
            k_aux=self.k_aux,
            aux_normalization=config.aux_normalization,
        )
        self._optimizer.zero_grad(set_to_none=True)
        objective = loss.loss
        if config.scale_gradient:
            objective = objective * reference.gradient_scale(loss.mse.detach())
        objective.backward()
        with torch.no_grad():
            assert sae.W_dec.grad is not None
            project_gradient_(sae.W_dec, sae.W_dec.grad)
            for state in self._optimizer.state.values():
                state["step"].copy_(self.updates)
            self._optimizer.step()
            self.updates += 1
            normalize_rows_(sae.W_dec)
            residual = x.to(loss.reconstruction.dtype) - loss.reconstruction
        counts = (loss.latents > 0).sum(0)
        return StepResult(
            loss.loss.detach(), loss.mse.detach(), loss.aux.detach(), residual.detach(), counts
        )


class FusedStep(TrainStep):
    """The fast way: everything sparse runs on the kernels, and a latent's whole update is one pass.

    Nothing waits for the device, and no ``[F, D]`` gradient exists.
    """

    AUX_LAG_STEPS = 4
    """On CUDA, aux-k's buffers are sized by the number of dead latents this many steps ago: that count
    has arrived without anybody waiting, and a fixed lag keeps runs reproducible."""

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        super().__init__(sae, config)
        low = torch.bfloat16 if sae.precision == "bf16" else None
        rows = {name: _feature_major(getattr(sae, name).data, name) for name in ("W_enc", "W_dec")}
        self._rows = {
            name: Rows(
                weight,
                _feature_major(self.m[name], name),
                _feature_major(self.v[name], name),
                copy=None if low is None else weight.to(low),
            )
            for name, weight in rows.items()
        }
        self._biases = {
            name: Vector(getattr(sae, name).data, self.m[name], self.v[name])
            for name in ("b_enc", "b_dec")
        }
        self._lr = torch.tensor(config.lr, dtype=sae.W_dec.dtype, device=sae.W_dec.device)
        self._dead_counts = _LaggedCount(self.AUX_LAG_STEPS, sae.W_dec.device)

    @torch.no_grad()
    def _update(self, x: Tensor) -> StepResult:
        sae, config = self.sae, self.config
        W_enc, W_dec = self._rows["W_enc"], self._rows["W_dec"]
        b_enc, b_dec = self._biases["b_enc"], self._biases["b_dec"]
        scaled, statistics = sae.scale_input(x)

        budget = int(config.mean_active * len(x))
        selection = encode_batch_topk(scaled, W_enc.compute().T, b_enc.weight, b_dec.weight, budget)
        csr = selection.csr
        csc = csr_to_csc(csr, sae.d_sae)
        decoded = sparse_decode_loss(csr, W_dec.compute(), b_dec.weight, scaled)
        mse = decoded.squared_error.sum() / scaled.numel()

        loss, aux, extra = mse, torch.zeros_like(mse), None
        capacity = self._dead_counts.update(self.dead) if config.aux_coefficient > 0 else 0
        if capacity:
            aux, extra = aux_k_gradients(
                scaled,
                decoded.residual,
                W_enc.compute(),
                b_enc.weight,
                W_dec.compute(),
                b_dec.weight,
                self.tokens_since_active,
                dead_after=config.dead_after_tokens,
                capacity=min(capacity, sae.d_sae),
                k_aux=self.k_aux,
                normalization=config.aux_normalization,
                coefficient=config.aux_coefficient,
            )
            loss = mse + config.aux_coefficient * aux
        self.updates += 1
        operand = W_enc.compute().dtype
        fused_update_(
            W_enc, b_enc, W_dec, b_dec, csr, csc,
            scaled.to(operand), decoded.residual.to(operand), self._lr, self.updates,
            dY_scale=-2 / scaled.numel(), extra=extra,
            clip=reference.gradient_scale(mse) if config.scale_gradient else None,
        )  # fmt: skip
        self.activation.track(selection.threshold)
        residual = x - sae.to_raw_input(scaled - decoded.residual, statistics)
        return StepResult(loss, mse, aux, residual, csc.counts())

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"dead_counts": self._dead_counts.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._dead_counts.restore(state["dead_counts"])
        for rows in self._rows.values():
            if rows.copy is not None:
                rows.copy.copy_(rows.weight)


class _LaggedCount:
    """How many latents were dead some steps ago, rounded up, without waiting for the device.

    On a CPU there is nothing to wait for, and the count is today's.
    """

    def __init__(self, lag: int, device: torch.device) -> None:
        self._lag = lag if device.type == "cuda" else 0
        self._pending: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def update(self, dead: Tensor) -> int:
        """Note today's dead latents ``[F]``; returns a capacity for those of ``lag`` steps ago."""
        count = dead.sum()
        if self._lag == 0:
            return int(count)
        host = torch.empty((), dtype=count.dtype, pin_memory=True)
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))
        if len(self._pending) <= self._lag:
            return 0
        old, arrived = self._pending.pop(0)
        if arrived is not None:
            arrived.synchronize()  # recorded steps ago: it has long arrived
        # Powers of two, so that few shapes ever occur; twice the count leaves room for new deaths.
        return 1 << (2 * int(old) - 1).bit_length() if int(old) else 0

    def state(self) -> Tensor:
        """The counts on their way, oldest first ``[n]`` int64."""
        for _, arrived in self._pending:
            if arrived is not None:
                arrived.synchronize()
        return torch.tensor([int(count) for count, _ in self._pending], dtype=torch.int64)

    def restore(self, counts: Tensor) -> None:
        self._pending = [(count, None) for count in counts.cpu()]


def _feature_major(tensor: Tensor, name: str) -> Tensor:
    """The ``[F, D]`` contiguous storage of a parameter or its moment."""
    return tensor.T if name == "W_enc" else tensor


STEPS = {"fused": FusedStep, "autograd": AutogradStep}
