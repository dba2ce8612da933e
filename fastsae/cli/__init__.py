"""The command line: ``fastsae train | evaluate | contrast | compare | plan``, a file for each command."""

from .command import main

__all__ = ["main"]
