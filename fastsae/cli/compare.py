"""Compare runs, finished or running: a table for the terminal, and a picture.

    fastsae compare runs
    fastsae compare runs/A runs/B --plot a-and-b.png

Reads the metrics.jsonl of each run, and its summary.json where it has ended. Changes nothing, so it
may be asked at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import ConfigError
from .options import parse


@dataclass(frozen=True)
class CompareOptions:
    """Which runs, and where the picture goes."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, or folders that hold several."""
    plot: str = "comparison.png"
    """The picture."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no runs: give folders of runs, as in runs/NAME, or of several")


def main(arguments: Sequence[str], prog: str) -> None:
    """Print a table of the runs, and draw them. Raises FastsaeError."""
    options = parse(CompareOptions, arguments, prog, __doc__)
    from ..reporting.compare import find_runs, plot, read_run, table

    folders = find_runs(options.runs)
    entries = [read_run(folder) for folder in folders]
    if len({folder.name for folder in folders}) < len(folders):  # one name in several places
        entries = [replace(e, name=str(f)) for e, f in zip(entries, folders, strict=True)]
    print(table(entries))  # noqa: T201
    try:
        plot(Path(options.plot), entries)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {options.plot}: {error}; choose another --plot") from error
    print(f"drawn in {options.plot}")  # noqa: T201
