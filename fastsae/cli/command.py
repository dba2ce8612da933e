"""The command line: flags to a TrainConfig, errors to one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tyro

from ..config import TrainConfig
from ..errors import FastsaeError


def parse(arguments: Sequence[str], description: str | None = None) -> TrainConfig:
    """The settings that ``arguments`` ask for, on top of the recipe, or of the demo with ``--demo``.

    Raises:
        ConfigError: a value is impossible.
        SystemExit: ``--help``, or a flag that does not exist (2).
    """
    default = None  # what one setting is by default depends on others that are given
    if "--demo" in arguments:
        from .presets import demo_config

        default = demo_config()
        if any(flag.partition("=")[0] == "--expansion" for flag in arguments):
            default = replace(default, d_sae=None)
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(TrainConfig, args=list(arguments), description=description, **options)


def main(description: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for ours in ("fastsae", "fastsae_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, description)
        from ..training.trainer import Interrupted, Trainer

        try:
            Trainer(config).fit()
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)  # noqa: T201
            return 128 + interruption.signal
    except FastsaeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing was changed", file=sys.stderr)  # noqa: T201
        return 130
    return 0
