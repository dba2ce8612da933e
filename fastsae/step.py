"""One training step of one SAE: loss, gradients, projection, Adam, renormalisation, counters."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae_kernels import reference

from .activation import BatchTopK
from .config import TrainConfig
from .sae import SAE, Loss

ALIVE_WINDOW_TOKENS = 1_000_000
"""A latent counts as alive when it was active within this many tokens."""

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


class AutogradStep:
    """The training step by plain autograd, and all the state that it changes.

    The order is: aux-k sees the latents that were dead at the end of the previous step; each decoder
    row's gradient loses its component along the row; Adam moves all four parameters; decoder rows go
    back to unit norm. So what is evaluated and saved always has unit-norm rows.

    Args:
        sae: the SAE to train; it is put into training mode and changed in place.
        config: learning rate, aux-k and dead-latent settings.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae = sae.train()
        self.config = config
        self.tokens_seen = 0
        device = sae.W_dec.device
        self.tokens_since_active = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        parameters = [getattr(sae, name) for name in PARAMETERS]
        self.optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=True)
        # Moments exist from the start, with their parameter's memory layout, so that a restored run
        # copies into the same storage as an uninterrupted one.
        for p in parameters:
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def __call__(self, x: Tensor) -> Loss:
        """Train on ``x [B, D]`` in raw units; what is returned was computed before the update."""
        sae, config = self.sae, self.config
        loss = sae.loss(
            x,
            self.dead if config.aux_coefficient > 0 else None,
            aux_coefficient=config.aux_coefficient,
            k_aux=config.k_aux,
            aux_normalization=config.aux_normalization,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        with torch.no_grad():
            assert sae.W_dec.grad is not None
            sae.W_dec.grad = reference.project_gradient(sae.W_dec, sae.W_dec.grad)
            self.optimizer.step()
            sae.W_dec.copy_(reference.normalize_rows(sae.W_dec))
            active = (loss.latents > 0).any(0)
            self.tokens_since_active += len(x)
            self.tokens_since_active.masked_fill_(active, 0)
        self.tokens_seen += len(x)
        return loss

    @property
    def dead(self) -> Tensor:
        """Latents ``[F]`` (bool) that were not active for ``dead_after_tokens`` tokens."""
        return self.tokens_since_active >= self.config.dead_after_tokens

    @torch.no_grad()
    def metrics(self, x: Tensor, loss: Loss) -> dict[str, float]:
        """What happened in the step that returned ``loss`` for ``x``; waits for the device.

        ``loss`` and ``aux`` are the terms that were minimised (after input scaling); everything else
        is in the units of the raw activations.
        """
        x = x.float()
        activation = self.sae.activation
        threshold = self.sae.threshold if isinstance(activation, BatchTopK) else None
        # A latent that was never active has counted every token; it is not alive however young the run.
        window = min(ALIVE_WINDOW_TOKENS, self.tokens_seen)
        values = {
            "loss": loss.loss,
            "mse": reference.mean_squared_error(x, loss.reconstruction),
            "aux": loss.aux,
            "explained_variance": reference.explained_variance(x, loss.reconstruction),
            "l0": (loss.latents > 0).sum() / len(x),
            "alive_fraction": (self.tokens_since_active < window).double().mean(),
            "dead": self.dead.sum(),
            "threshold": torch.zeros(()) if threshold is None else threshold,
        }
        values = {name: float(value) for name, value in values.items()}
        values["dead"] = int(values["dead"])
        return values

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a step reads, by name; the weights are the SAE's own, not folded."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name in PARAMETERS:
            adam = self.optimizer.state[getattr(self.sae, name)]
            state |= {f"adam.{name}.{key}": value for key, value in adam.items()}
        state["tokens_since_active"] = self.tokens_since_active
        state["tokens_seen"] = torch.tensor(self.tokens_seen)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        for name, tensor in self.state_dict().items():
            if tensor.shape != state[name].shape:
                raise RuntimeError(
                    f"{name}: saved {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        self.tokens_seen = int(state["tokens_seen"])
