"""Tokens per second from text to a trained SAE, each trainer by its own pipeline, in turns.

All read the same text, run the same language model, mix activations in a pool of the same size where
they have one, and train the same shape at the same batch on one layer. dictionary_learning's buffer
wants nnsight's wrapper and is left out.
``--model``, ``--text`` and ``--layer`` take the place of the demo's language model and text.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from bench_step import add
from harness import time_pipelines

from fastsae import TrainConfig
from fastsae.cli.presets import demo_config

NAMES = ("fastsae", "fastsae, autograd", "SAELens", "sparsify")
SAME = {"batch_size": 1024, "pool_tokens": 16_384, "eval_tokens": 4096, "device": "cpu"}


def settings(model: str | None, text: str | None, layer: int) -> tuple[TrainConfig, str, int, int]:
    """The run, its name, and the two lengths in tokens."""
    if model is None:
        config = demo_config(d_sae=2048, k=16, layer=2, dead_after_tokens=10_000_000, **SAME)
        name = "demo model (4 layers, width 128), layer 2, F=2048, k=16, B=1024"
        return config, name, 20_480, 81_920
    if text is None:
        raise pytest.UsageError("--model needs --text, a file of text to train on")
    config = TrainConfig(
        model=model, text_files=(text,), layer=layer, k=32, expansion=16, quantization="none",
        context_length=128, harvest_batch=32, **SAME,
    )  # fmt: skip
    return config, f"{Path(model).name}, layer {layer}, 16x, k=32, B=1024", 32_768, 114_688


measured = functools.cache(time_pipelines)


@pytest.mark.parametrize("name", NAMES)
def bench_tokens(request, report, device, name):
    if device != "cpu":
        pytest.skip("the language model runs on a CPU here; on a GPU, bench_stream")
    option = request.config.getoption
    config, setting, short, long = settings(option("--model"), option("--text"), option("--layer"))
    rounds = max(1, option("--rounds"))
    found = measured(config, NAMES, rounds=rounds, short=short, long=long)
    group = "seconds per token, language model in the loop"
    group += f" | {setting}" if option("--model") else ""
    add(report, found, name, kind="end to end", group=group, setting=setting)
