"""The command line: one command, and options declared once."""

from .command import main

__all__ = ["main"]
