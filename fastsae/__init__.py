"""Exact, fast training of BatchTopK sparse autoencoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import Sweep, TrainConfig
    from .errors import CheckpointError, ConfigError, FastsaeError, FormatError, StreamError
    from .evaluation.evaluate import Evaluation, evaluate
    from .lm.held_out import HeldOutText
    from .lm.hooked import SplicedModel
    from .sae.activation import BatchTopK, JumpReLU, TopK
    from .sae.io import load, save
    from .sae.module import SAE, Loss
    from .training.trainer import Trainer, train

__all__ = [
    "SAE",
    "BatchTopK",
    "CheckpointError",
    "ConfigError",
    "Evaluation",
    "FastsaeError",
    "FormatError",
    "HeldOutText",
    "JumpReLU",
    "Loss",
    "SplicedModel",
    "StreamError",
    "Sweep",
    "TopK",
    "TrainConfig",
    "Trainer",
    "__version__",
    "evaluate",
    "load",
    "save",
    "train",
]

_HOME = {
    "BatchTopK": "sae.activation",
    "TopK": "sae.activation",
    "JumpReLU": "sae.activation",
    "Sweep": "config",
    "TrainConfig": "config",
    "FastsaeError": "errors",
    "ConfigError": "errors",
    "StreamError": "errors",
    "CheckpointError": "errors",
    "FormatError": "errors",
    "evaluate": "evaluation.evaluate",
    "Evaluation": "evaluation.evaluate",
    "HeldOutText": "lm.held_out",
    "SplicedModel": "lm.hooked",
    "load": "sae.io",
    "save": "sae.io",
    "SAE": "sae.module",
    "Loss": "sae.module",
    "Trainer": "training.trainer",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    # Names are found on first use, so that `import fastsae` and the command line's --help stay instant.
    if name not in _HOME:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
