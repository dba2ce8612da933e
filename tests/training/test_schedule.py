"""Learning rate, k and latent quota over a run."""

import dataclasses

import pytest

import fastsae
from fastsae.training.schedule import k_at, lr_factor_at, quota_at

F, D = 24_576, 1536
CONFIG = fastsae.TrainConfig(
    d_sae=64,
    k=4,
    lr=0.5,
    lr_warmup_tokens=0,
    lr_decay_tokens=0,
    latent_quota=0.0,
    tokens=1000,
    batch_size=10,
)


def test_without_options_nothing_changes() -> None:
    assert {lr_factor_at(CONFIG, seen, 10) for seen in range(0, 1000, 10)} == {1}
    assert {k_at(CONFIG, seen) for seen in range(0, 1000, 10)} == {4}
    assert {quota_at(CONFIG, seen) for seen in range(0, 1000, 10)} == {0}


def test_the_schedule_follows_the_length_of_the_run() -> None:
    recipe = fastsae.TrainConfig()
    assert lr_factor_at(recipe, 0, 1024) == pytest.approx(1024 / 1_000_000)
    assert lr_factor_at(recipe, 50_000_000, 1024) == 1 and recipe.peak_lr(F, D) == 3e-4
    assert lr_factor_at(recipe, 100_000_000 * 5 // 6, 1024) == pytest.approx(0.5)
    short = fastsae.TrainConfig(tokens=6_250_000)
    assert short.peak_lr(F, D) == pytest.approx(3e-4 * 16**0.28)
    assert (short.warmup_tokens, short.decay_tokens) == (125_000, 2_083_333)
    assert fastsae.TrainConfig(tokens=10).peak_lr(16, 16) == 3.6e-3
    assert fastsae.TrainConfig(tokens=10**9).peak_lr(F, D) == 3e-4


def test_the_learning_rate_falls_with_the_square_root_of_the_width() -> None:
    short = fastsae.TrainConfig(tokens=6_250_000)
    assert short.peak_lr(64, D // 4) == pytest.approx(2 * short.peak_lr(64, D))
    assert short.peak_lr(64, D // 16) == pytest.approx(4 * short.peak_lr(64, D))
    assert short.peak_lr(64, D // 64) == 3.6e-3
    assert short.peak_lr(64, 16 * D) == 3e-4
    assert fastsae.TrainConfig(tokens=6_250_000, lr=0.5).peak_lr(64, 16 * D) == 0.5


def test_seldom_active_latents_bound_the_learning_rate_of_short_runs() -> None:
    short = fastsae.TrainConfig(tokens=500_000, k=32)
    assert short.peak_lr(4608, 128) == pytest.approx(3.6e-3)
    assert short.peak_lr(9216, 128) == pytest.approx(1.8e-3)
    assert short.peak_lr(4 * 4608, 128) == pytest.approx(9e-4)
    for more in ({"k": 64}, {"batch_size": 2048}):
        assert dataclasses.replace(short, **more).peak_lr(4 * 4608, 128) == pytest.approx(1.8e-3)
    assert short.peak_lr(10**7, 128) == 3e-4  # not below that of long runs
    assert fastsae.TrainConfig(tokens=500_000, lr=0.5).peak_lr(10**7, 128) == 0.5


def test_learning_rate_rises_stays_and_falls() -> None:
    config = dataclasses.replace(CONFIG, lr_warmup_tokens=40, lr_decay_tokens=100)
    rates = [lr_factor_at(config, seen, 10) for seen in range(0, 1000, 10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[85:91] == pytest.approx([1] * 6)
    assert rates[91:] == pytest.approx([0.1 * n for n in range(9, 0, -1)])


def test_a_run_shorter_than_warm_up_and_decay_takes_the_smaller_rate() -> None:
    config = dataclasses.replace(CONFIG, tokens=30, lr_warmup_tokens=100, lr_decay_tokens=100)
    assert [lr_factor_at(config, seen, 10) for seen in (0, 10, 20)] == pytest.approx(
        [0.1, 0.2, 0.1]
    )


def test_tokens_beyond_the_end_have_no_learning_rate_below_zero() -> None:
    config = dataclasses.replace(CONFIG, lr_decay_tokens=100)
    assert lr_factor_at(config, 1010, 10) == 0


def test_k_goes_linearly_from_its_initial_value() -> None:
    config = dataclasses.replace(CONFIG, k_initial=12, k_anneal_tokens=80)
    ks = [k_at(config, seen) for seen in range(0, 120, 10)]
    assert ks == pytest.approx([12, 11, 10, 9, 8, 7, 6, 5, 4, 4, 4, 4])


def test_the_quota_ends_with_its_share_of_the_run() -> None:
    config = dataclasses.replace(CONFIG, latent_quota=0.5)
    assert [quota_at(config, seen) for seen in (0, 890, 900, 990, 2000)] == [0.5, 0.5, 0, 0, 0]
    longer = dataclasses.replace(config, tokens=2000)
    assert [quota_at(longer, seen) for seen in (900, 1790, 1800)] == [0.5, 0.5, 0]
    always = dataclasses.replace(config, latent_quota_until=1)
    assert quota_at(always, 990) == 0.5
