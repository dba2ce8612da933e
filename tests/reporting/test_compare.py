"""The table and the picture of several runs, whatever state they are in."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.cli import main
from fastsae.files import hold
from fastsae.reporting import compare

CONFIG = fastsae.TrainConfig(
    d_sae=32, k=2, batch_size=32, tokens=640, log_every_tokens=64, device="cpu", wandb="disabled"
)


def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=g) for _ in range(20)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(CONFIG, seed=1, out=str(out), name="run")
    fastsae.Trainer(fastsae.Sweep(config, ks=(2, 4)), batches()).fit()
    return out


def test_table_holds_the_newest_numbers(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sub" / "a.png"
    assert main(["compare", str(runs), "--plot", str(picture)]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "state", "tokens", "ev"]
    assert [line.split()[:3] for line in lines] == [
        [f"run-L17-k{k}-seed1", "finished", "640"] for k in (2, 4)
    ]
    for line, k in zip(lines, (2, 4), strict=True):
        metrics = (runs / f"run-L17-k{k}-seed1/metrics.jsonl").read_text().splitlines()
        newest = json.loads(metrics[-1])
        assert f"{newest['explained_variance']:.4f}" in line.split()
        assert f"{newest['tokens_per_second']:,.0f}" in line.split()
        assert f"{newest['l0']:.1f}" in line.split()
    assert str(picture) in last and picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_in_progress_and_a_torn_line(runs: Path) -> None:
    run = runs / "run-L17-k2-seed1"
    whole = compare.read_run(run)
    with hold(run):
        assert compare.read_run(run).state == "running"
    assert compare.read_run(run).state == "finished"
    path = run / "metrics.jsonl"
    content = path.read_text()
    ahead = {**whole.metrics[-1], "tokens_seen": 9999}
    try:
        path.write_text(content + json.dumps(ahead) + '\n{"objective": 0.')
        entry = compare.read_run(run)
        # It has gone on since the summary was written.
        assert (entry.state, entry.row["tokens_seen"], entry.summary) == ("stopped", 9999, {})
    finally:
        path.write_text(content)


def test_a_run_without_a_line_yet(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").touch()
    entries = [compare.read_run(p) for p in compare.find_runs([tmp_path / "new", runs])]
    assert compare.table(entries).splitlines()[1].split() == ["new", "stopped", *"-" * 9]
    compare.plot(tmp_path / "a.png", entries)


@pytest.mark.slow
def test_numbers_that_are_missing_leave_gaps(runs: Path, tmp_path: Path) -> None:
    run = compare.read_run(runs / "run-L17-k2-seed1")
    assert run.row["held_out"] is None  # nothing was held out of these batches
    for metrics in run.metrics[3:5]:
        metrics |= dict.fromkeys(("explained_variance", "l0", "tokens_per_second", "threshold"))
    summary = {**run.summary, "pca_explained_variance": 0.5}
    for drawn in ([run], [dataclasses.replace(run, summary=summary)], [run, run]):
        compare.plot(tmp_path / "a.png", drawn)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "a.png").unlink()
    assert (
        compare.table([dataclasses.replace(run, metrics=run.metrics[:5])]).split().count("-") >= 4
    )


def test_one_name_in_two_places(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs, tmp_path / "copy")
    assert (
        main(["compare", str(runs), str(tmp_path / "copy"), "--plot", str(tmp_path / "a.png")]) == 0
    )
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert len(set(names)) == 4 and f"{tmp_path}/copy/run-L17-k2-seed1" in names


def test_the_same_run_twice_is_one(runs: Path) -> None:
    assert len(compare.find_runs([runs, runs / "run-L17-k2-seed1"])) == 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no metrics.jsonl"),
        ("file", "holds no metrics.jsonl"),
    ],
)
def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert main(["compare", str(tmp_path / path)]) == 2
    assert said in capsys.readouterr().err


def test_files_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('[1, 2]\n"x"\n')
    assert main(["compare", str(tmp_path)]) == 2
    assert "are not those of a run" in capsys.readouterr().err


@pytest.mark.parametrize("picture", ["/dev/null/a.png", "picture.of-no-kind"])
def test_a_picture_that_cannot_be_written(
    runs: Path, capsys: pytest.CaptureFixture[str], picture: str
) -> None:
    assert main(["compare", str(runs), "--plot", picture]) == 2
    assert f"cannot write {picture}" in capsys.readouterr().err
