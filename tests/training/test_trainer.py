"""``fastsae.train`` on plain iterables: what it promises, and what it leaves alone."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_saes import pca_explained_variance

import fastsae
from fastsae.errors import ConfigError
from fastsae.evaluation.evaluate import evaluate
from fastsae.reporting.tracking import read_metrics
from fastsae_kernels import reference as ref

CONFIG = fastsae.TrainConfig(
    d_sae=64, k=4, lr=3e-3, batch_size=64, tokens=64 * 50, dead_after_tokens=600, device="cpu", seed=1,
    log_every_tokens=640, checkpoint_every_tokens=1280, lr_warmup_tokens=0, lr_decay_tokens=0,
    latent_quota=0.0,
)  # fmt: skip


class Source:
    """Endless batches of sparse mixtures of 32 directions, which counts what was drawn."""

    def __init__(self, seed: int = 0, d_in: int = 16, stop: int | None = None) -> None:
        g = torch.Generator().manual_seed(7)
        self.directions = torch.nn.functional.normalize(torch.randn(32, d_in, generator=g), dim=1)
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn, self.stop = 0, stop

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.stop is None or self.drawn < self.stop:
            self.drawn += 1
            yield self.batch(64)

    def batch(self, tokens: int) -> torch.Tensor:
        g = self.generator
        z = torch.rand(tokens, 32, generator=g) * (torch.rand(tokens, 32, generator=g) < 0.1)
        return 10 * z @ self.directions + 2


def same(a: fastsae.SAE, b: fastsae.SAE) -> bool:
    other = b.state_dict()
    return all(tensor.equal(other[name]) for name, tensor in a.state_dict().items())


@pytest.mark.slow
def test_trains_a_good_sae() -> None:
    source = Source()
    config = dataclasses.replace(CONFIG, tokens=64 * 600)
    sae = fastsae.train(source, config)
    held_out = Source(seed=99).batch(4000)
    for mode in ("topk", "threshold", "batch"):
        assert evaluate(sae, held_out, mode)[mode].explained_variance > 0.8
    baseline = pca_explained_variance(held_out, 4)
    assert baseline is not None
    assert evaluate(sae, held_out)["topk"].explained_variance > baseline + 0.2
    assert evaluate(sae, held_out, "threshold")["threshold"].l0 == pytest.approx(4, rel=0.1)


def test_returns_a_folded_sae_in_eval_mode() -> None:
    sae = fastsae.train(Source(), CONFIG)
    assert not sae.training and sae.normalize == "none" and sae.scale == 1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    assert sae.threshold > 0


def test_one_pass_without_lookahead() -> None:
    source = Source()
    fastsae.train(source, CONFIG)
    assert source.drawn == CONFIG.steps == 50


def test_the_first_batch_initialises_and_is_trained_on() -> None:
    source = Source(stop=1)
    x = next(iter(Source(stop=1)))
    sae = fastsae.train(source, CONFIG)
    # The same by the definitions: initialise on x, one step on x.
    center = ref.geometric_median(x)
    c = ref.scale_constant(x, center)
    start = fastsae.SAE(16, 64, 4, generator=torch.Generator().manual_seed(1))
    state = ref.initial_state(start.W_dec.detach(), c * center)
    settings = ref.Settings(
        k=4, k_aux=8, lr=3e-3, aux_coefficient=CONFIG.aux_weight,
        betas=CONFIG.adam_betas, decoder_lr_ratio=CONFIG.decoder_lr_ratio,
    )  # fmt: skip
    expected = ref.train_step(state, c * x, settings).state.params
    torch.testing.assert_close(sae.W_dec.detach(), expected.W_dec, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.b_dec.detach(), expected.b_dec / c, rtol=0, atol=1e-4)
    assert not sae.W_dec.equal(start.W_dec)


def test_memory_may_be_filled_again() -> None:
    """Batches are drawn ahead to begin with; a loader may give the same tensor every time."""
    memory = torch.empty(64, 16)
    again = (memory.copy_(x) for x in Source())
    assert same(fastsae.train(again, CONFIG), fastsae.train(Source(), CONFIG))


@pytest.mark.slow
def test_an_offset_of_all_activations_changes_nothing() -> None:
    """Scaling is by the spread, and ``b_dec`` begins at the middle."""
    spread = Source().batch(2000).std(0).mean()
    held_out = Source(seed=99).batch(4000)
    config = dataclasses.replace(CONFIG, tokens=64 * 300)
    found = []
    for offset in (0, 1, 10, 100):
        away = offset * spread * torch.nn.functional.normalize(torch.ones(16), dim=0) * 4
        sae = fastsae.train((x + away for x in Source()), config)
        score = evaluate(sae, held_out + away, "topk")["topk"]
        found.append(score.explained_variance)
        assert sae.metadata["mean_to_spread"] >= offset
    assert found[0] > 0.75
    assert found == pytest.approx(found[:1] * 4, abs=0.005)


def test_an_outcome_to_worry_about_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(CONFIG, d_sae=2048, k=1, tokens=640, eval_tokens=100)
    with caplog.at_level(logging.WARNING):
        fastsae.train(Source(), config)
    assert "of the latents were active within the last 100 tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fastsae.train(Source(), CONFIG)
    assert not caplog.text


def test_an_early_end_is_a_normal_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sae = fastsae.train(Source(stop=7), CONFIG)
    assert "ended after 448 tokens of 3,200" in caplog.text
    assert same(sae, fastsae.train(Source(), dataclasses.replace(CONFIG, tokens=448)))


def test_batches_are_taken_as_they_come() -> None:
    source = Source()
    sizes = [10, 100, 1, 64, 200]
    sae = fastsae.train(
        (source.batch(n).to(torch.bfloat16) for n in sizes), dataclasses.replace(CONFIG, tokens=300)
    )
    assert sae.W_dec.isfinite().all() and sae.W_dec.dtype == torch.float32


def test_seed_decides_and_nothing_else() -> None:
    a = fastsae.train(Source(), CONFIG)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    b = fastsae.train(Source(), CONFIG)
    assert torch.get_rng_state().equal(before), "the caller's random state was touched"
    assert same(a, b)
    assert not same(a, fastsae.train(Source(), dataclasses.replace(CONFIG, seed=2)))


def test_writes_nothing_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fastsae.train(Source(), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_model_and_text_settings_are_not_looked_at() -> None:
    config = dataclasses.replace(
        CONFIG, model="no/such-model", layer=999, text_files=("missing.txt",), tokens=64
    )
    fastsae.train(Source(), config)


@pytest.mark.parametrize("normalize", ["scalar", "none", "layer_norm"])
def test_every_input_scaling_trains(normalize: str) -> None:
    config = dataclasses.replace(CONFIG, normalize=normalize, tokens=64 * 300)
    sae = fastsae.train(Source(), config)
    assert evaluate(sae, Source(seed=99).batch(2000), "batch")["batch"].explained_variance > 0.5


class TestWithOut:
    def test_files(self, tmp_path: Path) -> None:
        config = dataclasses.replace(CONFIG, out=str(tmp_path), name="run")
        sae = fastsae.train(Source(), config)
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names >= {
            "cfg.json",
            "sae_weights.safetensors",
            "sae_weights.pt",
            "summary.json",
            "metrics.jsonl",
            "training.png",
        }
        checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
        assert [path.name for path in checkpoints] == ["step_20", "step_40", "step_50"]
        assert all((path / "sae_weights.safetensors").is_file() for path in checkpoints)
        loaded = fastsae.load(tmp_path / "run")
        x = Source(seed=5).batch(50)
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=1e-5)
        metrics = read_metrics(tmp_path / "run")
        assert [m["tokens_seen"] for m in metrics] == [640 * n for n in range(1, 6)]
        assert all(m["l0"] == 4 for m in metrics)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["tokens_seen"] == 3200 and summary["l0"] == 4
        assert {
            "explained_variance",
            "pca_explained_variance",
            "alive_fraction",
            "tokens_per_second",
        } <= set(summary)

    # The last checkpoint before a stop is at step 20 or 40; the quota ends at step 25.
    @pytest.mark.parametrize(
        ("stop", "quota"),
        [
            (23, 0.5),
            *(
                pytest.param(*case, marks=pytest.mark.slow)
                for case in ((1, 0), (20, 0), (23, 0), (45, 0.5))
            ),
        ],
    )
    def test_a_run_that_stopped_goes_on_bit_for_bit(
        self, tmp_path: Path, stop: int, quota: float
    ) -> None:
        config = dataclasses.replace(CONFIG, latent_quota=quota, latent_quota_until=0.5)
        whole = fastsae.train(
            Source(), dataclasses.replace(config, out=str(tmp_path), name="whole")
        )
        config = dataclasses.replace(config, out=str(tmp_path), name="stopped")

        def breaking() -> Iterator[torch.Tensor]:
            yield from itertools.islice(Source(), stop)
            raise ConnectionError("the source went away")

        with pytest.raises(ConnectionError):
            fastsae.train(breaking(), config)
        source = Source()
        resumed = fastsae.train(source, config)
        assert same(whole, resumed) and source.drawn == 50
        timeless = [
            [
                {n: v for n, v in m.items() if "second" not in n}
                for m in read_metrics(tmp_path / name)
            ]
            for name in ("whole", "stopped")
        ]
        assert timeless[0] == timeless[1] and len(timeless[0]) == 5

    @pytest.mark.slow
    def test_other_settings_are_refused_with_the_difference(self, tmp_path: Path) -> None:
        config = dataclasses.replace(CONFIG, out=str(tmp_path), name="run")
        fastsae.train(Source(stop=30), config)
        with pytest.raises(fastsae.CheckpointError, match=r"lr: 0\.003 in the run, 0\.1 now"):
            fastsae.train(Source(), dataclasses.replace(config, lr=0.1))
        with pytest.raises(fastsae.ConfigError, match="--resume is never"):
            fastsae.train(Source(), dataclasses.replace(config, resume="never"))
        longer = fastsae.train(Source(), dataclasses.replace(config, tokens=64 * 60))
        assert same(longer, fastsae.train(Source(), dataclasses.replace(CONFIG, tokens=64 * 60)))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch at all"),
        ([torch.zeros(3)], r"float tensor \[B, D\]"),
        ([torch.ones(3, 4, dtype=torch.int64)], "torch.int64"),
        ([torch.empty(0, 4)], "at least one row"),
        ([torch.full((3, 4), 0.1)], "all the same"),
        ([torch.full((3, 4), float("nan"))], "not finite"),
        ([torch.randn(8, 4), torch.randn(8, 5)], "width 5, those before had 4"),
    ],
)
def test_unusable_batches(batches: list[torch.Tensor], message: str) -> None:
    with pytest.raises(fastsae.StreamError, match=message):
        fastsae.train(batches, CONFIG)


def test_cuda_asked_for_and_absent() -> None:
    device = f"cuda:{torch.cuda.device_count()}"  # one beyond the last
    with pytest.raises(fastsae.ConfigError, match="CUDA devices"):
        fastsae.train(Source(), dataclasses.replace(CONFIG, device=device))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precisions_of_cuda_are_refused_on_a_cpu(precision) -> None:
    config = dataclasses.replace(CONFIG, device="cpu", precision=precision)
    with pytest.raises(ConfigError, match=f"{precision}.* on a CPU .*--precision fp32"):
        fastsae.train(Source(), config)


def test_k_beyond_the_dictionary_of_this_width() -> None:
    config = dataclasses.replace(CONFIG, d_sae=None, expansion=0.2)
    with pytest.raises(fastsae.ConfigError, match="k = 4 is more than the dictionary's 3 latents"):
        fastsae.train(Source(), config)


def test_evaluation_changes_nothing_and_does_not_depend_on_its_batches() -> None:
    sae = fastsae.train(Source(), CONFIG).train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    x = Source(seed=3).batch(1000)
    a, b = (evaluate(sae, x, "topk", batch_size=n)["topk"] for n in (1000, 7))
    assert a.explained_variance == pytest.approx(b.explained_variance, rel=1e-6)
    selected = (sae.encode(x, "topk") > 0).double()  # 4 a token, where as many are positive
    assert a.l0 == b.l0 == selected.sum(1).mean().item() <= 4
    assert a.density.equal(b.density) and a.l0 > 3
    assert sae.training and all(sae.state_dict()[n].equal(t) for n, t in before.items())
    assert a.alive_fraction == (a.density > 0).double().mean().item()


def test_the_threshold_is_that_of_plain_selection_at_the_end() -> None:
    """With the quota's batches still in the average, inference kept 25.6 latents for k = 32 after 200 steps."""
    source, steps = Source(), 100
    config = dataclasses.replace(
        CONFIG,
        d_sae=256,
        batch_size=512,
        tokens=512 * steps,
        latent_quota=0.8,
        lr_decay_tokens=512 * 20,
    )
    sae = fastsae.train((source.batch(512) for _ in range(steps)), config)
    l0 = evaluate(sae, Source(seed=99).batch(4000), "threshold")["threshold"].l0
    assert l0 == pytest.approx(config.k, rel=0.03)  # design: within 3 % of k


def test_reuse_is_refused_for_batches_of_the_users_own() -> None:
    with pytest.raises(ConfigError, match="reuse = 2 .* each taken once"):
        fastsae.train(Source(), dataclasses.replace(CONFIG, reuse=2))
