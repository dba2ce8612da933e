"""The command line: flags to the SAEs they ask for, errors to one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro

from ..config import Sweep, TrainConfig
from ..errors import FastsaeError, Interrupted
from .train_flags import TrainFlags


def parse(arguments: Sequence[str], description: str | None = None) -> Sweep:
    """The SAEs that ``arguments`` ask for, on top of the recipe, or of the demo with ``--demo``.

    Raises:
        ConfigError: a value is impossible.
        SystemExit: ``--help``, or a flag that does not exist (2).
    """
    default = TrainConfig()
    if "--demo" in arguments:
        from .presets import demo_config

        default = demo_config()
        if any(flag.partition("=")[0] == "--expansion" for flag in arguments):
            default = replace(default, d_sae=None)
    flags = tyro.cli(
        TrainFlags, args=list(arguments), default=TrainFlags.of(default), description=description
    )
    return flags.sweep()


def main(description: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for ours in ("fastsae", "fastsae_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, description)
        from ..training.trainer import train_and_report

        train_and_report(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)  # noqa: T201
        return 128 + interruption.signal
    except FastsaeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0
