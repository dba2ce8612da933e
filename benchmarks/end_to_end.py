"""Tokens per second from text to a trained SAE: ours, and SAELens's own runner, in turn in one process.

Both read the same text, run the same language model to the same layer, mix activations in a pool of
the same size and train the same shape at the same batch. SAELens is ``LanguageModelSAETrainingRunner``
as a user starts it, without evaluations, logging and saving, and its context of 128 tokens and 32 rows
a forward pass are used on both sides. Loading is not timed; filling the first
pool is, on both sides, and so is everything up to the last step. Runs alternate.

    python benchmarks/smollm2.py DIR
    python benchmarks/end_to_end.py --model DIR --text DIR/text.jsonl --out benchmarks/results/end_to_end.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from torch import Tensor

import fastsae
from fastsae.data.stream import open_stream

PACKAGES = ("torch", "transformers", "sae-lens", "numpy")


def ours(config: fastsae.TrainConfig) -> dict[str, float]:
    """Train as ``train.py`` does, on the stream's batches; seconds by stage."""
    stream = open_stream(config)
    waiting = 0.0

    def batches() -> Iterator[Tensor]:
        nonlocal waiting
        while True:
            start = time.perf_counter()
            layers = stream.next_batch()
            waiting += time.perf_counter() - start
            if layers is None:
                return
            yield layers[0]

    before = stream.seconds  # the held-out rows are not trained on
    start = time.perf_counter()
    fastsae.train(batches(), config)
    total = time.perf_counter() - start
    stages = {stage: seconds - before[stage] for stage, seconds in stream.seconds.items()}
    mixing = waiting - sum(stages.values())
    return {"total": total, **stages, "mix": mixing, "step": total - waiting}


def saelens(config: fastsae.TrainConfig, text: str) -> dict[str, float]:
    """SAELens's runner with the same settings; seconds by stage."""
    import datasets
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
    )

    d_in = open_width(config.model)
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=config.resolve_d_sae(d_in), k=config.k),
            model_name=config.model,
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{config.layer}",
            dataset_path="json",
            is_dataset_tokenized=False,
            context_size=config.context_length,
            store_batch_size_prompts=config.harvest_batch,
            n_batches_in_buffer=config.pool_tokens // config.context_length,
            train_batch_size_tokens=config.batch_size,
            training_tokens=config.tokens,
            lr=config.lr,
            exclude_special_tokens=True,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=None,
            verbose=False,
        ),
        override_dataset=datasets.load_dataset("json", data_files=text, split="train"),
    )
    store = runner.activations_store
    loader, waiting = store.get_data_loader(), 0.0

    def timed() -> Iterator[Tensor]:
        nonlocal waiting
        while True:
            start = time.perf_counter()
            batch = next(loader)
            waiting += time.perf_counter() - start
            yield batch

    store._dataloader = timed()
    start = time.perf_counter()
    runner.run()
    total = time.perf_counter() - start
    return {"total": total, "tokenise, harvest, mix": waiting, "step": total - waiting}


def open_width(model: str) -> int:
    from fastsae.lm.loading import load_config

    return load_config(model).get_text_config(decoder=True).hidden_size


def compare(config: fastsae.TrainConfig, text: str, repeats: int) -> dict[str, Any]:
    """Alternate the two ``repeats`` times; medians, every run, and the ratio of the medians."""
    runs: dict[str, list[dict[str, float]]] = {"fastsae": [], "saelens": []}
    trainers: dict[str, Callable[[], dict[str, float]]] = {
        "fastsae": lambda: ours(config),
        "saelens": lambda: saelens(config, text),
    }
    for _ in range(repeats):
        for name, train in trainers.items():
            runs[name].append(train())
            print(name, {stage: round(s, 2) for stage, s in runs[name][-1].items()}, flush=True)
    tokens = config.steps * config.batch_size
    speeds = {
        name: tokens / statistics.median(run["total"] for run in found)
        for name, found in runs.items()
    }
    return {
        "tokens": tokens,
        "tokens_per_second": speeds,
        "ratio": speeds["fastsae"] / speeds["saelens"],
        "seconds": runs,
        "config": {
            name: getattr(config, name)
            for name in (
                "layer", "k", "expansion", "context_length", "harvest_batch", "pool_tokens",
                "batch_size", "quantization", "activation_dtype",
            )
        },
        "about": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="a .jsonl file with a column text")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--expansion", type=float, default=16)
    parser.add_argument("--tokens", type=int, default=114_688)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = fastsae.TrainConfig(
        model=options.model,
        text_files=(options.text,),
        layer=options.layer,
        k=options.k,
        expansion=options.expansion,
        tokens=options.tokens,
        quantization="none",
        context_length=128,
        harvest_batch=32,
        pool_tokens=16_384,
        eval_tokens=256,
        device="cpu",
        log_every_tokens=options.tokens,
    )
    result = compare(config, options.text, options.repeats)
    print(json.dumps({n: result[n] for n in ("tokens_per_second", "ratio")}, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
