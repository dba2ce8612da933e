"""Every trainer, ours and the others': each a class in this folder and a line in ``TRAINERS``."""

import importlib.util

from .base import DEAD_AFTER, Problem, Trained, Trainer, Weights
from .dictionary_learning import DictionaryLearning
from .llamascopium import Llamascopium
from .ours import Autograd, Fastsae, Quantized
from .plain import Compiled, Dense
from .saelens import SAELens
from .sparsify import Sparsify

__all__ = [
    "DEAD_AFTER", "OURS", "TRAINERS", "WAYS", "Fastsae", "Problem", "Trained", "Trainer", "Weights",
    "missing",
]  # fmt: skip

TRAINERS: dict[str, type[Trainer]] = {
    "fastsae": Fastsae,
    "fastsae, autograd": Autograd,
    "fastsae, eager": Fastsae.eager(),
    "fastsae, 8-bit": Quantized,
    "torch, eager": Dense,
    "torch, compiled": Compiled,
    "SAELens": SAELens,
    "dictionary_learning": DictionaryLearning,
    "sparsify": Sparsify,
    "llamascopium": Llamascopium,
}
OURS = "fastsae"
WAYS = ("fastsae, eager", "fastsae, 8-bit")


def missing(name: str) -> str | None:
    """Which package trainer ``name`` needs and does not find."""
    package = TRAINERS[name].package
    return package if package and importlib.util.find_spec(package) is None else None
