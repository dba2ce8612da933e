"""Exact, fast training of BatchTopK sparse autoencoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .activation import BatchTopK, JumpReLU, TopK
    from .config import TrainConfig
    from .errors import CheckpointError, ConfigError, FastsaeError, FormatError, StreamError
    from .evaluation import Evaluation, HeldOutText, SplicedModel, evaluate
    from .formats import load
    from .sae import SAE, Loss
    from .trainer import Trainer, train

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
    "TopK",
    "TrainConfig",
    "Trainer",
    "__version__",
    "evaluate",
    "load",
    "train",
]

_HOME = {
    "BatchTopK": "activation",
    "TopK": "activation",
    "JumpReLU": "activation",
    "TrainConfig": "config",
    "FastsaeError": "errors",
    "ConfigError": "errors",
    "StreamError": "errors",
    "CheckpointError": "errors",
    "FormatError": "errors",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "HeldOutText": "evaluation",
    "SplicedModel": "evaluation",
    "load": "formats",
    "SAE": "sae",
    "Loss": "sae",
    "Trainer": "trainer",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    # Names are found on first use, so that `import fastsae` and the command line's --help stay instant.
    if name not in _HOME:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
