"""Exact, fast training of BatchTopK sparse autoencoders."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import Sweep, TrainConfig
    from .errors import CheckpointError, ConfigError, FastsaeError, FormatError, StreamError
    from .evaluation.evaluate import Evaluation, evaluate
    from .lm.attached import Lens, attach
    from .lm.held_out import HeldOutText
    from .lm.hooked import SplicedModel
    from .sae.activation import BatchTopK, JumpReLU, TopK
    from .sae.formats.circuit_tracer import save_for_circuit_tracer
    from .sae.io import load, save
    from .sae.module import SAE, Loss
    from .sae.transcoder import Transcoder
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
    "Lens",
    "Loss",
    "SplicedModel",
    "StreamError",
    "Sweep",
    "TopK",
    "TrainConfig",
    "Trainer",
    "Transcoder",
    "__version__",
    "attach",
    "evaluate",
    "load",
    "save",
    "save_for_circuit_tracer",
    "train",
]

_MODULES = {
    "config": ("Sweep", "TrainConfig"),
    "errors": ("CheckpointError", "ConfigError", "FastsaeError", "FormatError", "StreamError"),
    "evaluation.evaluate": ("Evaluation", "evaluate"),
    "lm.attached": ("Lens", "attach"),
    "lm.held_out": ("HeldOutText",),
    "lm.hooked": ("SplicedModel",),
    "sae.activation": ("BatchTopK", "JumpReLU", "TopK"),
    "sae.formats.circuit_tracer": ("save_for_circuit_tracer",),
    "sae.io": ("load", "save"),
    "sae.module": ("SAE", "Loss"),
    "sae.transcoder": ("Transcoder",),
    "training.trainer": ("Trainer", "train"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Names are found on first use, so that `import fastsae` and the command line's --help stay instant.
    if name not in _HOME:
        raise AttributeError(f"module 'fastsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


class _Package(ModuleType):
    """nnsight gives every object a method ``save``, modules too, and what an object has is not looked for."""

    @property
    def save(self) -> Any:
        return __getattr__("save")


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return __all__
