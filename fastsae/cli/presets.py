"""Settings that have a name: the recipe is the default, ``--demo`` the one that runs anywhere."""

from __future__ import annotations

from typing import Any

from ..config import TrainConfig

_SETTINGS: dict[str, Any] = {
    "demo": True,
    "model": "glassllm",
    "dataset": "docstrings",
    "dataset_config": None,
    "layer": 2,
    "quantization": "none",
    "context_length": 128,
    "harvest_batch": 32,
    "k": 16,
    "d_sae": 1024,
    "tokens": 768_000,
    "lr": 1e-3,
    "dead_after_tokens": 76_800,  # a tenth of the run, as in the recipe
    "pool_tokens": 65_536,
    "eval_tokens": 16_384,
    "checkpoint_every_tokens": 192_000,
    "log_every_tokens": 16_384,
}


def demo_config(**overrides: Any) -> TrainConfig:
    """The demo's settings; ``overrides`` are fields of ``TrainConfig`` that were given explicitly."""
    return TrainConfig(**{**_SETTINGS, **overrides})


def preset_of(model: str) -> TrainConfig:
    """The preset that trains on ``model``: the demo for its model, the recipe for any other."""
    return demo_config() if model == _SETTINGS["model"] else TrainConfig()
