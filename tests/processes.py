"""Several processes as one team, for tests."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from fastsae import team


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(size: int, work: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What ``work(team, *arguments)`` returns on each of ``size`` processes; of a module's top level.

    One process is this one. Results and arguments travel as ``torch.save`` and pickle have them.
    """
    if size == 1:
        return [work(team.ALONE, *arguments)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.multiprocessing.spawn(
            _one, (size, free_port(), work, arguments, folder), nprocs=size, join=True
        )
    except torch.multiprocessing.ProcessRaisedException as error:
        # It is of whichever ended first; the others say that this one is gone, or why it went.
        for path in sorted(folder.glob("*.error")):
            error.add_note(f"process {path.stem}: {path.read_text()}")
        raise
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _one(
    rank: int, size: int, port: int, work: Callable[..., Any], arguments: Any, folder: Path
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        torch.save(work(team.join(), *arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        team.leave()
