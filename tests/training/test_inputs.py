"""What users pass to the Python API: paths, loaders, arrays, rows that are not finite, and iterables that fail."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastsae
from fastsae.reporting.compare import find_runs
from fastsae.reporting.tracking import read_metrics
from fastsae.training import checkpoint

CONFIG = fastsae.TrainConfig(
    d_sae=48, k=4, lr=3e-3, batch_size=32, tokens=32 * 12, dead_after_tokens=100, device="cpu", seed=1,
    log_every_tokens=64, checkpoint_every_tokens=128, name="run",
)  # fmt: skip


def batches(count: int = 12, rows: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1 + torch.randn(rows, 8, generator=generator) for _ in range(count)]


def fit(given: Any, config: fastsae.TrainConfig) -> fastsae.SAE:
    """``fastsae.train`` without the report at the end."""
    (sae,) = fastsae.Trainer(config, given).fit()
    return sae


def same(a: fastsae.SAE, b: fastsae.SAE) -> bool:
    other = b.state_dict()
    return all(tensor.equal(other[name]) for name, tensor in a.state_dict().items())


def timeless(run: Path) -> list[dict]:
    return [{n: v for n, v in m.items() if "second" not in n} for m in read_metrics(run)]


def test_paths_and_devices_as_python_has_them(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, out=tmp_path, device=torch.device("cpu"))
    sae = fastsae.train(batches(), config)
    assert same(sae, fastsae.train(batches(), CONFIG))
    run = tmp_path / "run"
    for of in (str, Path):
        loaded = fastsae.load(of(run), torch.device("cpu"))
        assert loaded.W_dec.equal(sae.W_dec)
        assert fastsae.save(loaded, of(tmp_path / "copy")) == tmp_path / "copy"
        assert find_runs([of(tmp_path)]) == find_runs([of(run)]) == [run]
        model = fastsae.SplicedModel.load(of(models.llama()), 1, device=torch.device("cpu"))
        assert model.name == models.llama()
    again = dataclasses.replace(CONFIG, d_sae=None, init_from=run)
    assert fastsae.train(batches(), again).metadata["warm_start"]["source"] == str(run)


# --- batches as loaders give them ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: [x],
        lambda x: (x,),
        lambda x: {"anything": x},
        lambda x: {"activations": [x], "labels": x[:, 0]},
        lambda x: x.numpy(),
        lambda x: x.double().numpy().astype(">f8"),
        lambda x: x.flip(0).numpy()[::-1],
        lambda x: [np.asfortranarray(x.numpy())],
        lambda x: x.double(),
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, :8],
        lambda x: x.clone().requires_grad_() * 1,
    ],
)
@pytest.mark.parametrize("step", ["fused", "autograd"])
@pytest.mark.parametrize("normalize", ["scalar", "none"])
def test_the_obvious_is_unpacked(wrap: Callable[[Tensor], Any], step: str, normalize: str) -> None:
    config = dataclasses.replace(CONFIG, step=step, normalize=normalize, tokens=32 * 4)
    expected = fastsae.train(batches(), config)
    assert same(expected, fastsae.train(map(wrap, batches()), config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_shorter_floats_are_taken_at_their_value(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in batches()]
    assert same(fastsae.train(given, CONFIG), fastsae.train([x.float() for x in given], CONFIG))


@pytest.mark.parametrize("step", ["fused", "autograd"])
@pytest.mark.parametrize("normalize", ["scalar", "none"])
def test_tensors_made_under_inference_mode(step: str, normalize: str) -> None:
    config = dataclasses.replace(CONFIG, step=step, normalize=normalize)
    with torch.inference_mode():
        given = batches()
    assert same(fastsae.train(given, config), fastsae.train(batches(), config))


def test_a_loader_of_torch() -> None:
    x = torch.cat(batches())
    loader = DataLoader(TensorDataset(x), batch_size=32)
    assert same(fastsae.train(loader, CONFIG), fastsae.train(x.split(32), CONFIG))
    with pytest.raises(
        fastsae.StreamError, match=r"list of 2 \(Tensor \(32, 8\) of torch.float32, T"
    ):
        fastsae.train(DataLoader(TensorDataset(x, x), batch_size=32), CONFIG)


X = torch.randn(64, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (X, r"a batch is Tensor \(8,\) of torch.float32.*give x.split\(1024\)"),
        (X.numpy(), r"a batch is ndarray \(8,\) of float32.*give x.split\(1024\)"),
        ([X[None]], r"Tensor \(1, 64, 8\).*x.flatten\(0, 1\)"),
        ([X.long()], r"torch.int64, expected a float tensor \[B, D\]"),
        ([X.long().numpy()], r"ndarray \(64, 8\) of int64, expected a float tensor"),
        ([X.to(torch.complex64)], "torch.complex64, expected a float tensor"),
        ([{"a": X, "b": X}], "a dict of 'a', 'b', expected"),
        ({"a": X}, "a batch is str, expected"),
        ([X, None, X], "a batch is NoneType, expected"),
        (lambda: iter([X]), "function is no iterable of batches.*what it returns"),
        (3, "int is no iterable of batches"),
    ],
)
def test_what_cannot_be_understood_is_told(given: Any, said: str) -> None:
    with pytest.raises(fastsae.StreamError, match=said):
        fastsae.train(given, CONFIG)


def test_several_layers_come_in_any_sequence() -> None:
    sweep = fastsae.Sweep(CONFIG, layers=[3, 5])
    pairs = [(x, 2 * x) for x in batches()]
    expected = fastsae.Trainer(sweep, pairs).fit()
    for wrap in (list, lambda pair: {"activations": pair}, lambda pair: [x.numpy() for x in pair]):
        found = fastsae.Trainer(sweep, map(wrap, pairs)).fit()
        assert all(map(same, found, expected))


# --- rows that are not finite ---


def spoilt(clean: Iterable[Tensor], value: float = float("nan")) -> Iterator[Tensor]:
    """Batches with three more rows that are not finite, and, after the second, one of such rows alone."""
    for i, x in enumerate(clean):
        bad = x[:3].clone()
        bad[:, 1] = value
        yield torch.cat([x[:5], bad[:1], x[5:], bad[1:]])
        if i == 1:
            yield bad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_dropped_and_counted(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(CONFIG, out=str(tmp_path))
    sae = fit(spoilt(batches(), value), config)
    assert same(sae, fit(batches(), CONFIG))
    (told,) = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert "3 of 35 rows of the batches (8.6%)" in told and "counted as nonfinite" in told
    assert json.loads((tmp_path / "run/summary.json").read_text())["nonfinite"] == 3 * 12 + 3
    assert [m["nonfinite"] for m in read_metrics(tmp_path / "run")][:2] == [6, 15]


def test_a_row_is_dropped_from_all_layers() -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        for x in batches():
            second = 2 * x
            second[7, 0] = float("inf")
            yield x, second

    clean = [x[torch.arange(32) != 7] for x in batches()]
    sweep = fastsae.Sweep(dataclasses.replace(CONFIG, tokens=31 * 12), layers=[3, 5])
    found = fastsae.Trainer(sweep, broken()).fit()
    assert all(map(same, found, fastsae.Trainer(sweep, [(x, 2 * x) for x in clean]).fit()))


def test_beyond_float32_is_not_finite() -> None:
    given = [
        torch.cat([x.double(), torch.full((1, 8), 1e300, dtype=torch.float64)]) for x in batches()
    ]
    assert same(fastsae.train(given, CONFIG), fastsae.train(batches(), CONFIG))


def test_one_row_a_batch_may_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*torch.cat(batches()).split(1)]
    lost = torch.full((1, 8), float("nan"))
    given = [lost, *rows[:9], lost, lost, *rows[9:]]
    config = dataclasses.replace(CONFIG, batch_size=1, tokens=64)
    assert same(fastsae.train(given, config), fastsae.train(rows, config))
    assert "1 of 1 rows" in caplog.text


def test_mostly_not_finite_stops(tmp_path: Path) -> None:
    def overflowing() -> Iterator[Tensor]:
        yield from batches(5)
        for x in batches(80):
            x[: len(x) // 2 + 1] = float("inf")
            yield x

    config = dataclasses.replace(CONFIG, tokens=10**6, out=str(tmp_path))
    with pytest.raises(
        fastsae.StreamError, match=r"rows of the batches \(\d\d\.\d%\).*in float32"
    ) as e:
        fit(overflowing(), config)
    # Two times so many batches as have a thousand rows: among the first ones are good ones.
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == 2 * 32 - 1
    assert "everything is saved" in e.value.__notes__[0]


def test_nothing_finite_at_all() -> None:
    with pytest.raises(fastsae.StreamError, match=r"8 of 8 rows of the batches \(100.0%\)"):
        fastsae.train([torch.full((4, 8), float("nan"))] * 2, CONFIG)


@pytest.mark.parametrize("stop", [1, 3, 4, 9])
def test_resuming_passes_over_the_same_batches(tmp_path: Path, stop: int) -> None:
    """Also where it stopped between a batch that was passed over and the next one."""
    whole = dataclasses.replace(CONFIG, out=str(tmp_path / "whole"))
    stopped = dataclasses.replace(CONFIG, out=str(tmp_path / "stopped"))
    expected = fit(spoilt(batches()), whole)
    with pytest.raises(OSError, match="gone"):
        fit(breaking(spoilt(batches()), stop), stopped)
    assert same(expected, fit(spoilt(batches()), stopped))
    assert timeless(tmp_path / "whole/run") == timeless(tmp_path / "stopped/run")


# --- iterables that fail ---


def breaking(given: Iterable[Any], stop: int) -> Iterator[Any]:
    for _, x in zip(range(stop), given, strict=False):
        yield x
    raise OSError("the disk is gone")


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_what_was_trained_is_saved_before_the_users_exception(tmp_path: Path, stop: int) -> None:
    config = dataclasses.replace(CONFIG, out=str(tmp_path))
    with pytest.raises(OSError, match="the disk is gone") as e:
        fit(breaking(batches(), stop), config)
    (note,) = e.value.__notes__
    assert note == (
        f"stopped at {32 * stop:,} of 384 tokens; everything is saved in {tmp_path / 'run'}. Give the "
        f"same command again to go on"
    )
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == stop
    assert same(fit(batches(), config), fit(batches(), CONFIG))


def test_a_bad_batch_comes_again(tmp_path: Path) -> None:
    """What was refused is not passed over: mended, the run is the one that never met it."""
    config = dataclasses.replace(CONFIG, out=str(tmp_path))
    for bad in (batches()[5].long(), batches()[5][:, :7], batches()[5][None]):
        with pytest.raises(fastsae.StreamError) as e:
            fit([*batches()[:5], bad, *batches()[6:]], config)
        assert "everything is saved" in e.value.__notes__[0]
        assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == 5
    assert same(fit(batches(), config), fit(batches(), CONFIG))


def test_another_width_is_refused_on_resume(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, out=str(tmp_path))
    fit(batches(5), config)
    with pytest.raises(fastsae.StreamError, match="width 7, those before had 8"):
        fit([x[:, :7] for x in batches()], config)


def test_every_sae_of_a_sweep_is_saved(tmp_path: Path) -> None:
    sweep = fastsae.Sweep(dataclasses.replace(CONFIG, out=tmp_path), layers=[3, 5], ks=[2, 4])
    pairs = [(x, 2 * x) for x in batches()]
    with pytest.raises(OSError, match="gone"):
        fastsae.Trainer(sweep, breaking(pairs, 6)).fit()
    runs = [tmp_path / run.run_name for run in sweep.runs]
    assert len(runs) == 4
    assert all(checkpoint.steps(run / "checkpoints")[-1] == 6 for run in runs)
    found = fastsae.Trainer(sweep, pairs).fit()
    assert all(
        map(same, found, fastsae.Trainer(fastsae.Sweep(CONFIG, [3, 5], [2, 4]), pairs).fit())
    )


def test_without_out_the_exception_alone_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="gone") as e:
        fastsae.train(breaking(batches(), 3), CONFIG)
    assert not hasattr(e.value, "__notes__") and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise fastsae.CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="gone") as e:
        fit(breaking(batches(), 3), dataclasses.replace(CONFIG, out=tmp_path))
    assert e.value.__notes__ == ["It could not be saved: no space left"]


def test_an_exception_before_the_first_step_is_let_out(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        fit(breaking(batches(), 0), dataclasses.replace(CONFIG, out=tmp_path))
    assert not list(tmp_path.iterdir())


# --- training that diverges ---


def exploding() -> Iterator[Tensor]:
    """Batches of which the seventh is finite, and its error is not."""
    for i, x in enumerate(batches()):
        yield x * 1e25 if i == 6 else x


@pytest.mark.parametrize("step", ["fused", "autograd"])
def test_a_run_that_diverges_ends_with_what_to_try(tmp_path: Path, step: str) -> None:
    config = dataclasses.replace(CONFIG, out=tmp_path, step=step, objective="plain")
    with pytest.raises(fastsae.StreamError) as e:
        fit(exploding(), config)
    said = str(e.value)
    assert "run diverged between step 6 and step 8" in said
    assert "lower --lr (it is 0.003)" in said and "--clip-norm 1" in said
    assert said.endswith(f"Its last checkpoint is {tmp_path}/run/checkpoints/step_4")
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [4]
    saved = checkpoint.load(tmp_path / "run/checkpoints/step_4").tensors
    assert all(t.isfinite().all() for t in saved.values() if t.is_floating_point())
    assert not (tmp_path / "run/sae_weights.safetensors").exists()
    assert [m["step"] for m in timeless(tmp_path / "run")] == [2, 4, 6]
    begun = dataclasses.replace(CONFIG, d_sae=None, init_from=tmp_path / "run/checkpoints/step_4")
    assert fit(batches(), begun).d_sae == 48


@pytest.mark.parametrize(
    ("step", "moments"), [("fused", "fp32"), ("fused", "8bit"), ("autograd", "fp32")]
)
def test_a_learning_rate_far_too_large(tmp_path: Path, step: str, moments: str) -> None:
    config = dataclasses.replace(CONFIG, lr=1e30, step=step, moments=moments)
    for out in (None, tmp_path):
        with pytest.raises(fastsae.StreamError, match="diverged.*lr.*It has no checkpoint"):
            fit(batches(), dataclasses.replace(config, out=out))
    assert not checkpoint.steps(tmp_path / "run/checkpoints")
    assert not list((tmp_path / "run").glob("sae_weights*"))


def test_nothing_is_saved_where_it_diverged_since_the_last_look(tmp_path: Path) -> None:
    """Neither at a checkpoint nor at the end nor where the iterable fails."""
    rare = {"log_every_tokens": 10**6, "checkpoint_every_tokens": 10**6, "out": tmp_path}
    config = dataclasses.replace(CONFIG, **rare, objective="plain")
    with pytest.raises(fastsae.StreamError, match="between step 0 and step 12"):
        fit(exploding(), config)
    with pytest.raises(OSError, match="gone") as e:
        fit(breaking(exploding(), 8), config)
    assert "It could not be saved: run diverged" in e.value.__notes__[0]
    with pytest.raises(fastsae.StreamError, match="between step 0 and step 8"):
        fit(exploding(), dataclasses.replace(config, checkpoint_every_tokens=256))
    assert not checkpoint.steps(tmp_path / "run/checkpoints")


def test_moments_that_overflow_are_seen(tmp_path: Path) -> None:
    """Squares of gradients overflow long before the gradients do, and such latents never move again."""
    config = dataclasses.replace(CONFIG, normalize="none", objective="plain", out=tmp_path)
    with pytest.raises(fastsae.StreamError, match="diverged"):
        fit([x * 3e15 for x in batches()], config)
    assert not checkpoint.steps(tmp_path / "run/checkpoints")


# --- the smallest batches ---


@pytest.mark.slow
def test_one_row_a_batch(tmp_path: Path) -> None:
    rows = torch.cat(batches()).split(1)
    config = dataclasses.replace(CONFIG, batch_size=1, tokens=200, out=tmp_path, lr=1e-3)
    sae = fastsae.train(rows, config)
    assert all(t.isfinite().all() for t in sae.state_dict().values())
    assert {m["l0"] for m in read_metrics(tmp_path / "run")} == {4}
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize(("k", "rows"), [(0.5, 1), (0.1, 9)])
def test_batches_that_would_select_nothing(k: float, rows: int) -> None:
    given = torch.cat(batches()).split(rows)
    with pytest.raises(
        fastsae.ConfigError, match=rf"select none in a batch of {rows}; .* to {round(1 / k)}"
    ):
        fastsae.train(given, dataclasses.replace(CONFIG, k=k))
    sae = fastsae.train(torch.cat(batches()).split(rows + 1), dataclasses.replace(CONFIG, k=k))
    assert sae.threshold > 0


def test_settings_and_batches_in_the_wrong_order() -> None:
    with pytest.raises(fastsae.ConfigError, match=r"a list, expected .*train\(batches, config\)"):
        fastsae.train(CONFIG, batches())
    with pytest.raises(fastsae.ConfigError, match=r"a list, expected .*Trainer\(config, batches\)"):
        fastsae.Trainer(batches(), CONFIG)


# --- outliers ---


@pytest.mark.parametrize("outlier_norm", [None, 10])
def test_outliers_are_told_and_dropped_only_if_asked(
    caplog: pytest.LogCaptureFixture, outlier_norm: float | None
) -> None:
    given = batches()
    for x in given[2::3]:
        x[5] *= 1e4
    config = dataclasses.replace(CONFIG, outlier_norm=outlier_norm, tokens=32 * 20)
    with caplog.at_level("INFO"):
        trainer = fastsae.Trainer(config, given)
        trainer.fit()
    assert trainer.source.counts == {"nonfinite": 0, "outliers": 4 * (outlier_norm is not None)}
    told = [record for record in caplog.records if "the batches: norms of" in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO" if outlier_norm else "WARNING"]
    assert "4 (1.04%) above 10 times the median hold 99% of the variance" in told[0].getMessage()
    if outlier_norm is not None:
        kept = [torch.cat([x[:5], x[6:]]) if i % 3 == 2 else x for i, x in enumerate(given)]
        (expected,) = fastsae.Trainer(config, kept).fit()
        assert same(trainer.runs[0].update.sae.eval(), expected)
