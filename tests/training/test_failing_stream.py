"""Text that fails in the middle of a run: everything before is saved, and mended, it is the same run."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest

from fastsae.cli import main
from fastsae.data import cache, text
from fastsae.data.buffer import ActivationBuffer
from fastsae.reporting.tracking import read_metrics
from fastsae.training import checkpoint, trainer

BAD = 150
"""The bad line; those before it are read in batches of 64 documents."""
FLAGS = (
    "--quantization", "none", "--context-length", "32", "--harvest-batch", "4", "--d-sae", "128", "--k", "4",
    "--batch-size", "48", "--tokens", "9600", "--pool-tokens", "1024", "--eval-tokens", "256", "--device", "cpu",
    "--log-every-tokens", "480", "--checkpoint-every-tokens", "960", "--dead-after-tokens", "900",
    "--wandb", "disabled",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("text") / "prose.jsonl"
    letters = random.Random(0)
    lines = [
        json.dumps({"text": "".join(letters.choices("etaoin shrdlu", k=30 + i % 40))})
        for i in range(400)
    ]
    lines[BAD - 1] = '{"text": "torn'
    path.write_text("\n".join(lines), encoding="utf-8")
    return ["train", "--model", models.llama(), "--text-files", str(path), "--layer", "2", *FLAGS]


def timeless(run: Path) -> list[dict]:
    return [{n: v for n, v in m.items() if "second" not in n} for m in read_metrics(run)]


def assert_same_runs(out: Path, other: Path) -> None:
    runs = sorted(out.iterdir())
    assert [run.name for run in runs] == sorted(run.name for run in other.iterdir())
    for run in runs:
        a, b = (
            checkpoint.load(checkpoint.newest(of / "checkpoints")) for of in (run, other / run.name)
        )
        assert a.tensors.keys() == b.tensors.keys()
        assert all(tensor.equal(b.tensors[name]) for name, tensor in a.tensors.items())
        assert a.meta["stream"] == b.meta["stream"]
        weights = "sae_weights.safetensors"
        assert (run / weights).read_bytes() == (other / run.name / weights).read_bytes()
        assert timeless(run) == timeless(other / run.name) and len(timeless(run)) == 20


def steps(out: Path) -> list[int]:
    """The newest step of every run in ``out``."""
    return [checkpoint.steps(run / "checkpoints")[-1] for run in sorted(out.iterdir())]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "report_runs", lambda _folders: None)


GRID = ("--layer", "1", "3", "--k", "4", "8")
RARE = ("--checkpoint-every-tokens", "100000")


@contextmanager
def harvesting(ahead: bool) -> Iterator[None]:
    real = ActivationBuffer.__init__

    def init(self: ActivationBuffer, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options, ahead=ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationBuffer, "__init__", init)
        yield


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The runs that left the bad line out from the start, of one SAE or of ``GRID``, harvested ahead or not."""

    @functools.cache
    def train(ahead: bool, *grid: str) -> Path:
        out = tmp_path_factory.mktemp("whole")
        with harvesting(ahead):
            assert main([*command, *grid, "--out", str(out), "--skip-bad-lines"]) == 0
        return out

    return train


@pytest.mark.parametrize(
    ("ahead", "grid", "rare"),
    [
        (False, (), ()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((False, (), RARE), (True, (), ()), (True, GRID, ()))
        ),
    ],
)
def test_a_bad_line_in_the_middle(
    command: list[str],
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ahead: bool,
    grid: tuple[str, ...],
    rare: tuple[str, ...],
) -> None:
    command = [*command, *grid, *rare, "--out", str(tmp_path)]
    with harvesting(ahead):
        assert main(command) == 2
    said = capsys.readouterr().err
    error, note = said[said.rindex("error: ") :].strip().split("\n")
    assert f"line {BAD}: not JSON" in error and "--skip-bad-lines" in error
    assert "everything is saved in" in note and "Give the same command again" in note
    (stopped,) = set(steps(tmp_path))
    assert f"stopped at {48 * stopped:,} of 9,600 tokens" in note and 0 < stopped < 200
    assert stopped % 20, "it was saved at an ordinary checkpoint"
    with harvesting(ahead):
        assert main(command) == 2  # not mended: it ends where it ended
        assert set(steps(tmp_path)) == {stopped}
        assert main([*command, "--skip-bad-lines"]) == 0
    assert_same_runs(tmp_path, whole(ahead, *grid))


@pytest.mark.slow
def test_a_network_that_stays_away(
    command: list[str],
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole(False)
    command = [*command, "--skip-bad-lines", "--out", str(tmp_path)]
    monkeypatch.setattr(text, "RETRY_SECONDS", (0, 0))
    real = text.TextSource._next_of_shard

    def away(self: text.TextSource):
        if self._document >= 150:
            raise ConnectionError("the network is away")
        return real(self)

    monkeypatch.setattr(text.TextSource, "_next_of_shard", away)
    assert main(command) == 2
    (stopped,) = steps(tmp_path)
    assert stopped % 20, "it was saved at an ordinary checkpoint"
    monkeypatch.setattr(text.TextSource, "_next_of_shard", real)
    assert main(command) == 0
    assert_same_runs(tmp_path, expected)


@pytest.mark.slow
def test_a_cache_that_is_damaged(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache, "SHARD_BYTES", 128 << 10)
    command = [*command, "--skip-bad-lines", "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    shard = sorted((tmp_path / "cache").glob("activations_*"))[-3]
    content = shard.read_bytes()
    shard.write_bytes(content[:-500] + bytes(500))
    command += ["--out", str(tmp_path / "mended")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the cache of activations is damaged" in said and "everything is saved in" in said
    assert 0 < steps(tmp_path / "mended")[0] < 200
    shard.write_bytes(content)
    assert main(command) == 0
    assert_same_runs(tmp_path / "mended", tmp_path / "whole")


def test_a_bad_line_before_the_first_step(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was trained, nothing is written."""
    command = [*command, "--pool-tokens", "100000", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"line {BAD}: not JSON" in said and "saved" not in said
    assert not (tmp_path / "run").exists()
