"""Train SAEs on the residual stream of a language model.

    fastsae train --demo                            any machine, about a minute
    fastsae train --layer 17 --k 64                 Gemma 4 E2B on FineWeb-Edu: the recipe
    fastsae train --model DIR --text-files a.txt --layer 10 --k 32 --quantization none

A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import TrainConfig
from . import options
from .presets import demo_config


def parse(arguments: Sequence[str], prog: str = "fastsae train") -> TrainConfig:
    """The settings that ``arguments`` ask for, on top of the recipe, or of the demo with ``--demo``.

    Raises:
        ConfigError: a flag that does not exist, or an impossible value.
        SystemExit: ``--help`` (0).
    """
    default = TrainConfig()
    if "--demo" in arguments:
        default = demo_config()
        if any(flag.partition("=")[0] == "--expansion" for flag in arguments):
            default = replace(default, d_sae=None)
    return options.parse(TrainConfig, arguments, prog, __doc__, default)


def main(arguments: Sequence[str], prog: str) -> None:
    """The command. Raises FastsaeError, or Interrupted once everything is saved."""
    config = parse(arguments, prog)
    from ..training.trainer import Trainer

    Trainer(config).fit()
