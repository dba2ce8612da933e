"""What every command but training does the same: errors of the user are one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from ..errors import FastsaeError


def guarded(
    command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None
) -> int:
    """Run ``command`` on ``arguments``, by default the program's own; returns the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fastsae").setLevel(logging.INFO)
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except FastsaeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)  # noqa: T201
        return 130
    return 0
