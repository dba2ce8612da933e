"""The step on a dictionary in shards: that of the whole one, and the same bits on any number of processes."""

import dataclasses
from typing import Any

import pytest
import torch
from tolerances import SHARDS, SHARDS_FLOAT32

import fastsae
from fastsae.team import ALONE, Team
from fastsae.training.sharded import ShardedUpdate
from fastsae.training.update import FusedUpdate, Update

D, F, B = 12, 50, 36
CONFIG = fastsae.TrainConfig(
    d_sae=F, k=3, lr=3e-3, k_aux=5, dead_after_tokens=100, normalize="none", device="cpu", batch_size=B,
    lr_warmup_tokens=0,
)  # fmt: skip


def replaced(config: fastsae.TrainConfig, **changes: Any) -> fastsae.TrainConfig:
    return dataclasses.replace(config, **changes)


def new_sae(
    config: fastsae.TrainConfig, part: range | None, dtype: torch.dtype, width: int = D
) -> fastsae.SAE:
    assert config.d_sae is not None
    sae = fastsae.SAE(
        width, config.d_sae, config.k, part=part, normalize=config.normalize, dtype=dtype,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    sae.precision = "bf16" if config.precision == "bf16" else "fp32"
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, width))
        if config.normalize == "scalar":
            sae.scale.fill_(0.3)
    return sae


def whole(config: fastsae.TrainConfig, dtype: torch.dtype) -> FusedUpdate:
    return FusedUpdate(new_sae(config, None, dtype), config)


def sharded(
    config: fastsae.TrainConfig, dtype: torch.dtype, team: Team = ALONE, width: int = D
) -> ShardedUpdate:
    assert config.d_sae is not None and config.latent_shards is not None
    hosted, count = team.hosted(config.latent_shards), config.latent_shards
    part = range(hosted.start * config.d_sae // count, hosted.stop * config.d_sae // count)
    return ShardedUpdate(new_sae(config, part, dtype, width), config, team, config.d_sae)


def batches(
    n: int, dtype: torch.dtype, rows: int = B, width: int = D, ties: bool = False
) -> list[torch.Tensor]:
    """Sparse sums of directions, so that latents live and die; with ``ties``, repeated tokens of few bits."""
    basis = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(n):
        z = torch.rand(rows, 3 * width, generator=g)
        x = torch.where(z > 0.9, z, 0) @ basis + 0.5
        if ties:
            x = x.bfloat16().float()
            x[::3] = x[0]
        found.append(x.to(dtype))
    return found


def by_latent(update: Update) -> dict[str, torch.Tensor]:
    """Weights, moments and counters, those of the matrices by latent, whichever update it is."""
    state = dict(update.state_dict())
    if isinstance(update, ShardedUpdate):
        names = update.shard_state(next(iter(update.shards)))
        rows = {n: [state.pop(f"shard_{s:02}.{n}") for s in update.shards] for n in names}
        return {name: torch.cat(parts) for name, parts in rows.items()} | state
    for name in ("W_enc", "W_dec", "b_enc"):
        state[name] = state.pop(f"sae.{name}")
    for name in ("W_enc", *(f"adam.W_enc.{m}" for m in "mv")):
        state[name] = state[name].T if state[name].shape[0] == D else state[name]
    return state


def assert_close(sharded: ShardedUpdate, whole: FusedUpdate, tolerance: float) -> None:
    found, expected = by_latent(sharded), by_latent(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            assert found[name].equal(value), name
        else:
            largest = value.abs().max().clamp_min(1e-300)
            assert (found[name] - value).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_are_those_of_the_whole_dictionary(steps: int) -> None:
    """With quota and decay, whose ends are within them; and with latents dead in many steps."""
    config = replaced(CONFIG, tokens=steps * B)
    all_ = whole(config, torch.float64)
    own = [sharded(replaced(config, latent_shards=s), torch.float64) for s in (2, 3, 5)]
    aux_seen = 0
    for x in batches(steps, torch.float64):
        expected = all_(x)
        found = [each(x) for each in own]
        for result in found:
            assert result.counts.equal(expected.counts)
            for a, b in zip(result[:4], expected[:4], strict=True):
                torch.testing.assert_close(a, b, rtol=SHARDS, atol=SHARDS)
        aux_seen += bool(expected.aux > 0)
    assert aux_seen > steps / 5
    for each, result in zip(own, found, strict=True):
        assert_close(each, all_, SHARDS)
        assert each.metrics(x, result) == pytest.approx(all_.metrics(x, expected), rel=SHARDS)
        fired = torch.arange(F)
        assert each.density_histogram(fired, 99) == all_.density_histogram(fired, 99)
        assert each.decoder_norm_error() < 1e-15


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize": "scalar"},
        {"normalize": "layer_norm", "objective": "plain"},
        {"objective": "plain", "aux_normalization": "total_variance"},
        {"k_initial": 9.5, "k_anneal_tokens": 30 * B, "aux_normalization": "none"},
        {"latent_quota": 1.0, "latent_quota_until": 0.5, "tokens": 40 * B},
        {"aux_coefficient": 0.0, "latent_quota": 0.0},
        {"k_aux": 40, "d_sae": 49},
    ],
)
def test_every_setting_is_that_of_the_whole_dictionary(changes: dict[str, Any]) -> None:
    config = replaced(CONFIG, latent_shards=3, dead_after_tokens=100, **changes)
    own, all_ = sharded(config, torch.float64), whole(config, torch.float64)
    for x in batches(60, torch.float64):
        assert own(x).counts.equal(all_(x).counts)
    assert all_.dead.any()
    assert_close(own, all_, SHARDS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_in_every_precision_is_that_of_the_whole_dictionary(
    precision: str, moments: str
) -> None:
    """With dead latents. Codes round at random, with the whole dictionary's random bits: few differ, by one."""
    config = replaced(CONFIG, latent_shards=3, precision=precision, moments=moments)
    own, all_ = sharded(config, torch.float32), whole(config, torch.float32)
    for update in (own, all_):
        update.mark_dead(torch.arange(F) % 4 == 1)
    (x,) = batches(1, torch.float32)
    found, expected = own(x), all_(x)
    assert found.aux > 0
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32)
    found, expected = by_latent(own), by_latent(all_)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype in (torch.int8, torch.uint8):
            assert (found[name].int() - value.int()).abs().max() <= 1, name
            assert (found[name] != value).float().mean() < 0.002, name
        else:
            torch.testing.assert_close(
                found[name], value, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32, msg=name
            )
