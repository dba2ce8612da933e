"""Matryoshka SAEs as runs: what levels are for, and that they change nothing of what a run promises."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.evaluation.evaluate import evaluate
from fastsae.evaluation.table import describe
from fastsae.reporting.tracking import read_metrics
from fastsae_kernels import reference as ref

LEVELS = (8, 24, 64)
CONFIG = fastsae.TrainConfig(
    d_sae=64, k=4, matryoshka=LEVELS, batch_size=64, tokens=64 * 40, device="cpu", seed=1, layer=0,
    log_every_tokens=640, checkpoint_every_tokens=1280, dead_after_tokens=600, wandb="disabled",
)  # fmt: skip


def batches(seed: int = 0) -> Iterator[torch.Tensor]:
    """Sparse mixtures of 48 directions, of which the first are frequent and the last are rare."""
    directions = ref.normalize_rows(torch.randn(48, 16, generator=torch.Generator().manual_seed(7)))
    g = torch.Generator().manual_seed(seed)
    rate = 0.4 / torch.arange(1, 49)
    while True:
        active = torch.rand(64, 48, generator=g) < rate
        yield 10 * (torch.rand(64, 48, generator=g) * active) @ directions + 2


@torch.no_grad()
def explained(sae: fastsae.SAE, latents: int) -> float:
    x = torch.cat([*itertools.islice(batches(99), 30)])
    z = sae.encode(x) * (torch.arange(64) < latents)
    return float(ref.explained_variance(x, sae.decode(z)))


def test_prefixes_reconstruct_and_the_whole_does_as_well() -> None:
    config = dataclasses.replace(CONFIG, tokens=64 * 300)
    nested = fastsae.train(batches(), config)
    plain = fastsae.train(batches(), dataclasses.replace(config, matryoshka=()))
    assert nested.levels == LEVELS and plain.levels == (64,)
    for latents in LEVELS[:2]:
        assert explained(nested, latents) > explained(plain, latents) + 0.1
    assert explained(nested, 64) > explained(plain, 64) - 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"moments": "8bit", "clip_norm": 1.0},
        pytest.param({"step": "autograd", "k_initial": 8}, marks=pytest.mark.slow),
    ],
)
def test_runs_side_by_side_that_stopped_go_on_bit_for_bit(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    alone = [fastsae.train(batches(), dataclasses.replace(config, k=k)) for k in (2, 4)]
    group = fastsae.Sweep(dataclasses.replace(config, out=str(tmp_path)), ks=(2, 4))

    def breaking() -> Iterator[torch.Tensor]:
        yield from itertools.islice(batches(), 25)
        raise ConnectionError("the source went away")

    with pytest.raises(ConnectionError):
        fastsae.Trainer(group, breaking()).fit()
    resumed = fastsae.Trainer(group, batches()).fit()
    for sae, whole, run in zip(resumed, alone, group.runs, strict=True):
        assert all(t.equal(whole.state_dict()[name]) for name, t in sae.state_dict().items())
        loaded = fastsae.load(tmp_path / run.run_name)
        assert loaded.levels == sae.levels == LEVELS and loaded.metadata == sae.metadata
        last = read_metrics(tmp_path / run.run_name)[-1]
        inner = [last[f"explained_variance_{m}"] for m in LEVELS]
        assert inner == sorted(inner) and inner[-1] == last["explained_variance"]


def test_a_run_is_evaluated_by_level(tmp_path: Path) -> None:
    sae = fastsae.train(batches(), dataclasses.replace(CONFIG, out=str(tmp_path), name="run"))
    x = torch.cat([*itertools.islice(batches(99), 30)])
    evaluation = evaluate(sae, x, "topk")
    scores = evaluation["topk"]
    assert "by the first 24" in describe(evaluation)
    assert [*scores.levels] == [*LEVELS]
    for m, found in scores.levels.items():
        assert found == pytest.approx(explained(sae, m), abs=1e-5)
        assert found.low < found < found.high
    assert scores.explained_variance == scores.levels[64]
    assert json.loads(json.dumps(scores.to_json()))["levels"]["8"]["value"] == scores.levels[8]


def test_levels_begin_on_any_sae_of_their_size(tmp_path: Path) -> None:
    fastsae.save(fastsae.train(batches(), CONFIG), tmp_path)
    config = dataclasses.replace(CONFIG, d_sae=None, matryoshka=(), init_from=str(tmp_path))
    assert fastsae.train(batches(), config).levels == (64,)
    again = fastsae.train(batches(), dataclasses.replace(config, matryoshka=(32, 64)))
    assert again.levels == (32, 64)
    with pytest.raises(fastsae.ConfigError, match="ends with 32, but the dictionary has 64"):
        fastsae.train(batches(), dataclasses.replace(config, matryoshka=(16, 32)))


def test_the_shape_of_published_saes_trains() -> None:
    config = dataclasses.replace(
        CONFIG, d_sae=65_536, k=100, matryoshka=(2048, 16_384, 65_536), tokens=64 * 3
    )
    sae = fastsae.train(batches(), config)
    assert sae.levels == (2048, 16_384, 65_536)
    x = next(batches(99))
    x_hats = sae.decode_levels(sae.encode(x, "batch"))
    assert x_hats.shape == (3, 64, 16) and x_hats.isfinite().all()
