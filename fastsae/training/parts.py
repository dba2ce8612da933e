"""What the processes of a run settle before they train: its parts, and that it is one run."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Sweep
from ..device import resolve_device
from ..errors import ConfigError
from ..files import require_writable
from ..reporting.run_folder import RunFolder
from ..team import Team
from ..version import __version__
from . import checkpoint


def resolve_parts(sweep: Sweep, team: Team) -> Sweep:
    """``sweep`` with the lanes and latent shards that it has: those given, those of the run that goes on, or
    as many as processes.

    Raises ConfigError if there are more processes than lanes, or what several processes or shards came to
    would be written nowhere.
    """
    base = sweep.base
    if base.out is None and team.size > 1:
        raise ConfigError(
            f"{team.size} processes train together and nothing is to be written; give out, a folder that all "
            f"of them see"
        )
    saved = team.on_first(lambda: _saved_parts(sweep))
    several, whole = len(sweep.runs) > 1, base.needs_whole_dictionary
    own = {"lanes": team.size, "latent_shards": 1 if several or whole else team.size}
    parts = {name: getattr(base, name) or (saved or own)[name] for name in own}
    if base.out is None and parts["latent_shards"] > 1:
        raise ConfigError(
            f"latent_shards = {parts['latent_shards']}, and nothing is to be written: the shards become one SAE "
            f"in a checkpoint; give out, a folder"
        )
    if team.size > parts["lanes"]:
        raise ConfigError(
            f"this run has {parts['lanes']} lanes, and there are {team.size} processes: use up to "
            f"{parts['lanes']}. Choose more --lanes at the start of a run that is to grow later"
        )
    return Sweep(replace(base, **parts), sweep.layers, sweep.ks, sweep.seeds, sweep.hooks)


def _saved_parts(sweep: Sweep) -> dict[str, int] | None:
    """The lanes and latent shards of the run that goes on, if one does."""
    for config in sweep.runs:
        folder = RunFolder.of(config)
        newest = folder and checkpoint.newest(folder.checkpoints)
        if newest:
            saved = checkpoint.load_meta(newest)["config"]
            return {name: saved.get(name) or 1 for name in ("lanes", "latent_shards")}
    return None


def require_one_run(sweep: Sweep, team: Team) -> None:
    """Raise ConfigError, on all processes, unless they were started alike and see the same folders."""
    device = resolve_device(sweep.base.device)
    alike = {
        **sweep.base.to_dict(),
        "runs": [config.run_name for config in sweep.runs],
        "torch": torch.__version__,
        "fastsae": __version__,
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    team.require_same(alike)
    assert sweep.base.out is not None
    out = Path(sweep.base.out)

    def leave_a_mark() -> str:
        require_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        mark = out / f".processes-{uuid.uuid4().hex}"
        mark.touch()
        return mark.name

    mark = out / team.on_first(leave_a_mark)
    blind = [rank for rank, (seen,) in enumerate(team.agree(mark.exists())) if not seen]
    if team.is_first:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"process {blind[0]} of {team.size} does not see what process 0 writes to {out}: give --out a "
            f"folder on a file system that all machines share"
        )
