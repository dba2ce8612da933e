"""The flags of ``fastsae train``: the fields of ``TrainConfig``, three of which may have several values."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Sweep, TrainConfig


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """Train SAEs on the residual stream of a language model."""

    layer: tuple[int, ...] = (TrainConfig.layer,)  # type: ignore[assignment]
    """Residual stream after this decoder layer (0 is the first); several share one forward pass."""
    k: tuple[float, ...] = (TrainConfig.k,)  # type: ignore[assignment]
    """Mean active latents per token; may be fractional; several train one SAE each."""
    seed: tuple[int, ...] = (TrainConfig.seed,)  # type: ignore[assignment]
    """Seed of the initial weights (several train one SAE each) and, without --stream-seed, of the stream."""

    def __post_init__(self) -> None:
        """Values are checked where a sweep is made of them."""

    @classmethod
    def of(cls, config: TrainConfig) -> TrainFlags:
        """The flags that ask for ``config``."""
        several = {"layer": (config.layer,), "k": (config.k,), "seed": (config.seed,)}
        return cls(**vars(config) | several)

    def sweep(self) -> Sweep:
        """The SAEs that the flags ask for. Raises ConfigError."""
        several = {"layer": self.layer, "k": self.k, "seed": self.seed}
        first = {name: values[0] for name, values in several.items() if values}
        settings = {name: value for name, value in vars(self).items() if name not in several}
        return Sweep(TrainConfig(**settings | first), self.layer, self.k, self.seed)
