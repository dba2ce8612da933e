"""Several SAEs on one pass: each is the one trained alone, whatever happens on the way."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

import fastsae
from fastsae.cli import main
from fastsae.reporting.tracking import read_metrics
from fastsae.training import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = fastsae.TrainConfig(
    layer=3, k=2, seed=1, d_sae=48, lr=3e-3, batch_size=32, tokens=32 * 20,
    dead_after_tokens=200, log_every_tokens=64, checkpoint_every_tokens=160, keep_checkpoints=1,
    device="cpu", wandb="disabled",
)  # fmt: skip


EVERYTHING = {"layers": (3, 5), "ks": (2, 4), "seeds": (1, 2)}


def sweep(grid: dict, **changes: object) -> fastsae.Sweep:
    """The SAEs of ``grid``, with other settings than ``CONFIG``'s where ``changes`` has them."""
    return fastsae.Sweep(dataclasses.replace(CONFIG, **changes), **grid)


class Killed(BaseException):
    """What a kill looks like from inside."""


def layers(count: int = 2) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of ``count`` layers; layer i is the same whatever ``count`` is."""
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    while True:
        yield tuple(i + torch.randn(32, 12, generator=g) for i, g in enumerate(generators))


def only(layer: int) -> Iterator[Tensor]:
    return (batch[layer] for batch in layers())


def timeless(run: Path) -> list[dict]:
    return [{n: v for n, v in m.items() if "second" not in n} for m in read_metrics(run)]


def assert_same_runs(a: Path, b: Path) -> None:
    """The final files and metrics of two runs, bit for bit, and all state of the last checkpoint."""
    for file in ("sae_weights.safetensors", "sae_weights.pt", "cfg.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), (b, file)
    assert timeless(a) == timeless(b) and len(timeless(a)) > 5
    one, two = (checkpoint.load(checkpoint.newest(run / "checkpoints")) for run in (a, b))
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.equal(two.tensors[name]), name
    assert [h["step"] for h in one.meta["history"]] == [h["step"] for h in two.meta["history"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of the grid, trained by itself."""
    out = tmp_path_factory.mktemp("alone")
    for config in sweep(EVERYTHING, out=str(out)).runs:
        fastsae.train(only(EVERYTHING["layers"].index(config.layer)), config)
    return out


@pytest.mark.slow
def test_each_is_the_one_trained_alone(tmp_path: Path, alone: Path) -> None:
    config = sweep(EVERYTHING, out=str(tmp_path))
    saes, runs = fastsae.Trainer(config, layers()).fit(), config.runs
    assert [(sae.k, run.layer) for sae, run in zip(saes, runs, strict=True)] == [
        (2, 3), (2, 3), (4, 3), (4, 3), (2, 5), (2, 5), (4, 5), (4, 5),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {run.run_name for run in runs}
    for run in runs:
        assert_same_runs(alone / run.run_name, tmp_path / run.run_name)
    assert len({sae.W_dec.sum().item() for sae in saes}) == 8, "some SAEs are the same"


@pytest.mark.parametrize("point", [1, 2, 3, 5, 6, 11, 14])
@pytest.mark.slow
def test_killed_between_any_two_writes(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Killed at a rename: a checkpoint that appears, or one that goes. One checkpoint is kept."""
    config = sweep({"ks": (2, 4)}, out=str(tmp_path))
    renames, rename = 0, Path.rename

    def dying(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames >= point:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed):
        fastsae.Trainer(config, only(0)).fit()
    monkeypatch.undo()
    if point > 2:  # the first checkpoint of both was written: work is lost since then alone
        kept = [set(checkpoint.steps(tmp_path / r.run_name / "checkpoints")) for r in config.runs]
        assert set.intersection(*kept)
    fastsae.Trainer(config, only(0)).fit()
    for run in config.runs:
        assert_same_runs(alone / run.run_name, tmp_path / run.run_name)
        assert len(checkpoint.steps(tmp_path / run.run_name / "checkpoints")) == 1


@pytest.mark.slow
def test_finished_runs_stay_and_the_others_train(tmp_path: Path, alone: Path) -> None:
    fastsae.Trainer(sweep({"seeds": (1, 2)}, out=str(tmp_path)), only(0)).fit()
    before = {
        file: file.read_bytes() for file in tmp_path.rglob("*") if file.suffix == ".safetensors"
    }
    more = sweep({"ks": (2, 4), "seeds": (1, 2)}, out=str(tmp_path))
    fastsae.Trainer(more, only(0)).fit()
    for run in more.runs:
        assert_same_runs(alone / run.run_name, tmp_path / run.run_name)
    assert all(file.read_bytes() == content for file, content in before.items())
    fastsae.Trainer(more, only(0)).fit()  # all of them finished
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.slow
def test_work_of_a_run_by_itself_is_never_thrown_away(tmp_path: Path) -> None:
    config = sweep({"ks": (2, 4)}, out=str(tmp_path))
    (first, _second) = config.runs
    fastsae.train(only(0), dataclasses.replace(first, tokens=320))
    with pytest.raises(
        fastsae.CheckpointError, match="to step 10 without the others.*--stream-seed 1"
    ):
        fastsae.Trainer(config, only(0)).fit()
    assert checkpoint.steps(tmp_path / first.run_name / "checkpoints") == [10]
    fastsae.train(only(0), first)
    fastsae.Trainer(config, only(0)).fit()  # as the message says


def test_a_changed_setting_is_refused_before_anything_goes(tmp_path: Path) -> None:
    config = sweep({"ks": (2, 4)}, out=str(tmp_path), tokens=320)
    fastsae.Trainer(config, only(0)).fit()
    with pytest.raises(fastsae.CheckpointError, match=r"lr: 0\.003 in the run, 0\.1 now"):
        fastsae.Trainer(sweep({"ks": (2, 4)}, out=str(tmp_path), lr=0.1), only(0)).fit()
    assert all(checkpoint.steps(tmp_path / r.run_name / "checkpoints") == [10] for r in config.runs)


def test_train_gives_one_sae() -> None:
    with pytest.raises(
        fastsae.ConfigError, match=r"ask for 8.*Trainer\(config, batches\)\.fit\(\)"
    ):
        fastsae.train(only(0), sweep(EVERYTHING))


@pytest.mark.parametrize(
    "batch", [torch.ones(4, 3), (torch.ones(4, 3),), (torch.ones(4, 3), torch.ones(5, 3))]
)
def test_batches_must_have_every_layer(batch: object) -> None:
    with pytest.raises(fastsae.StreamError, match="for each of 2 layers, all with the same B"):
        fastsae.Trainer(sweep(EVERYTHING), [batch]).fit()


# --- on a language model, as processes ---

FLAGS = (
    "--quantization", "none", "--context-length", "32", "--harvest-batch", "4", "--d-sae", "128",
    "--batch-size", "64", "--tokens", "2560", "--pool-tokens", "1024", "--eval-tokens", "256",
    "--log-every-tokens", "128", "--checkpoint-every-tokens", "256", "--dead-after-tokens", "700",
    "--device", "cpu", "--wandb", "disabled",
)  # fmt: skip
GRID = ("--layer", "1", "3", "--k", "4", "8", "--seed", "1")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = models.prose(tmp_path_factory.mktemp("text"), words=12_000, each=40)
    return ["--model", models.llama(), "--text-files", str(text), *FLAGS]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    out = tmp_path_factory.mktemp("together")
    assert main(["train", *common, *GRID, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_layers_of_one_pass_are_those_of_two(
    together: Path, tmp_path: Path, common: list[str]
) -> None:
    """The second layer with the second k, alone: the same bits."""
    assert len(list(together.iterdir())) == 4
    one = ("--layer", "3", "--k", "8", "--seed", "1")
    assert main(["train", *common, *one, "--out", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name == "llama-scope-v1-L3-batchtopk-k8-seed1"
    assert_same_runs(run, together / run.name)
    summaries = [
        json.loads((out / run.name / "summary.json").read_text()) for out in (tmp_path, together)
    ]
    for name in ("explained_variance", "pca_explained_variance", "threshold_l0", "alive_fraction"):
        assert summaries[0][name] == summaries[1][name]
    assert fastsae.load(run).hook_name == "blocks.3.hook_resid_post"


@pytest.mark.slow
def test_sigkill_of_the_group(together: Path, tmp_path: Path, common: list[str]) -> None:
    """Killed at a moment drawn anew in every run of the tests, and given the same command."""
    command = [sys.executable, str(ROOT / "train.py"), *common, *GRID, "--out", str(tmp_path)]
    first = tmp_path / sorted(path.name for path in together.iterdir())[0] / "checkpoints"
    # Sums over many threads round otherwise: as many as ``together`` had.
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alike)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(first):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command, capture_output=True, text=True, env=alike)
    assert done.returncode == 0, done.stderr
    for run in together.iterdir():
        assert_same_runs(run, tmp_path / run.name)
