"""Train SAEs on the activations of a language model.

    fastsae train --demo                            any machine, about a minute
    fastsae train --layer 17 --k 64                 Gemma 4 E2B on FineWeb-Edu: the recipe
    fastsae train --model DIR --text-files a.txt --layer 10 --k 32 --quantization none

A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from ..config import Sweep, TrainConfig
from ..errors import ConfigError
from . import options
from .presets import card_config, demo_config


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """Train SAEs on the activations of a language model."""

    layer: tuple[int, ...] = (TrainConfig.layer,)  # type: ignore[assignment]
    """Decoder layer (0 is the first); several share one forward pass."""
    hook: tuple[str, ...] = (TrainConfig.hook,)  # type: ignore[assignment]
    """What is read there: resid_post (the residual stream after the layer), resid_pre, attn_out, mlp_in, mlp_out; or
    the path of a submodule, of the layer or of the model, for its output, or with .input behind it its input.
    Several, with each layer, share one forward pass."""
    k: tuple[float, ...] = (TrainConfig.k,)  # type: ignore[assignment]
    """Mean active latents per token; may be fractional; several train one SAE each."""
    seed: tuple[int, ...] = (TrainConfig.seed,)  # type: ignore[assignment]
    """Seed of the initial weights (several train one SAE each) and, without --stream-seed, of the stream."""
    preset: Literal["recipe", "card"] = "recipe"
    """What the other flags change: the recipe, or its settings on the model card of the published SAE."""

    def __post_init__(self) -> None:
        """Values are checked where a sweep is made of them."""

    @classmethod
    def of(cls, config: TrainConfig) -> TrainFlags:
        """The flags that ask for ``config``."""
        several: dict[str, Any] = {n: (getattr(config, n),) for n in ("layer", "hook", "k", "seed")}
        return cls(**vars(config) | several)

    def sweep(self) -> Sweep:
        """The SAEs that the flags ask for. Raises ConfigError."""
        several = {"layer": self.layer, "hook": self.hook, "k": self.k, "seed": self.seed}
        first = {name: values[0] for name, values in several.items() if values}
        own = {*several, "preset"}
        settings = {name: value for name, value in vars(self).items() if name not in own}
        return Sweep(TrainConfig(**settings | first), self.layer, self.k, self.seed, self.hook)


def parse(arguments: Sequence[str], prog: str = "fastsae train") -> Sweep:
    """The SAEs that ``arguments`` ask for, on top of the recipe, of the card's, or of the demo's settings.

    Raises:
        ConfigError: a flag that does not exist, or an impossible value.
        SystemExit: ``--help`` (0).
    """
    flags = TrainFlags()
    card = "--preset=card" in arguments or ("--preset", "card") in pairwise(arguments)
    if "--demo" in arguments:
        if card:
            raise ConfigError("--demo and --preset card are settings of two runs; give one of them")
        default = demo_config()
        if any(flag.partition("=")[0] == "--expansion" for flag in arguments):
            default = replace(default, d_sae=None)
        flags = TrainFlags.of(default)
    elif card:
        flags = TrainFlags.of(card_config())
    return options.parse(TrainFlags, arguments, prog, __doc__, default=flags).sweep()


def main(arguments: Sequence[str], prog: str) -> None:
    """The command. Raises FastsaeError, or Interrupted once everything is saved."""
    sweep = parse(arguments, prog)
    from ..training.trainer import train_and_report

    train_and_report(sweep)
