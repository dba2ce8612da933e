"""The folder of a run: who may write to it, and what is kept in it for later."""

import dataclasses
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from small_saes import small_sae

import fastsae
from fastsae.files import read_json, write_json
from fastsae.reporting.run_folder import RunFolder
from fastsae.reporting.tracking import read_metrics

CONFIG = fastsae.TrainConfig(
    name="run", d_sae=40, k=4, text_files=("a.txt",), device="cpu", wandb="disabled"
)
SUMMARY = {
    "tokens_seen": 64, "step": 1, "tokens_per_second": 9.0, "seconds_step": 0.5,
    "peak_memory_bytes": None, "explained_variance": None, "pca_explained_variance": None,
}  # fmt: skip


def finished(out: Path, held_out: fastsae.HeldOutText | torch.Tensor | None) -> RunFolder:
    """A folder with one line of metrics, whose run was just finished."""
    folder = RunFolder.of(dataclasses.replace(CONFIG, out=str(out)))
    assert folder is not None
    with ExitStack() as scope:
        scope.enter_context(folder.locked())
        folder.open(scope, 0)
        folder.log({"tokens_seen": 64, "explained_variance": 0.5, "l0": 4.0, "alive_fraction": 1.0})
        folder.history.append({"tokens_seen": 64, "step": 1, "time": "2026-01-02T03:04:05+00:00"})
        folder.finish(small_sae(k=4), SUMMARY, held_out)
    return folder


@pytest.mark.slow
def test_it_is_held_by_one_process(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
import fastsae
from fastsae.reporting.run_folder import RunFolder
try:
    with RunFolder(Path({str(tmp_path)!r}), fastsae.TrainConfig()).locked(): print("entered")
except fastsae.CheckpointError as error: print(error)
"""
    run = lambda: (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    )
    with RunFolder(tmp_path, CONFIG).locked():
        assert "another process is training" in run()
    assert run() == "entered\n"


def test_without_out_there_is_none() -> None:
    assert RunFolder.of(CONFIG) is None


def test_what_was_finished_is_read_from_anywhere(tmp_path: Path) -> None:
    text = fastsae.HeldOutText(
        [torch.tensor([1, 5, 6]), torch.tensor([1, 7])], [0, 1], [1], "some text", "rows"
    )
    written = finished(tmp_path / "runs", text)
    moved = (tmp_path / "runs/run").rename(tmp_path / "moved")
    folder = RunFolder.read(moved)
    expected = dataclasses.replace(CONFIG, aux_coefficient=18.75, out=str(tmp_path / "runs"))
    assert folder.config == expected and folder.path == moved
    assert folder.history == written.history and folder.summary() == SUMMARY
    found = folder.held_out()
    assert isinstance(found, fastsae.HeldOutText)
    assert all(map(torch.equal, found.rows, text.rows)) and len(found) == 2
    assert (found.documents, found.name, found.documents_are) == ([0, 1], "some text", "rows")
    assert found.special_ids.equal(text.special_ids) and found.tokens == 3
    sae, x = folder.load_sae("cpu"), torch.randn(5, 12)
    torch.testing.assert_close(sae(x), small_sae(k=4)(x))
    with folder.opened():  # nothing of its metrics goes
        pass
    assert len(read_metrics(moved)) == 1


def test_an_older_run_had_what_was_then_the_default(tmp_path: Path) -> None:
    """Settings that came later are not those of today's default, but what it was trained with."""
    finished(tmp_path, None)
    content = read_json(tmp_path / "run/run.json")
    for name in ("adam_betas", "decoder_lr_ratio"):
        del content["config"][name]
    write_json(tmp_path / "run/run.json", content)
    config = RunFolder.read(tmp_path / "run").config
    assert (config.adam_betas, config.decoder_lr_ratio) == ((0.9, 0.999), 1.0)


def test_activations_are_kept_where_there_is_no_text(tmp_path: Path) -> None:
    rows = torch.randn(7, 12)
    assert torch.equal(finished(tmp_path / "a", rows).held_out(), rows)
    assert finished(tmp_path / "b", None).held_out() is None


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": {"k": 0}}'])
def test_what_is_no_run_is_said_to_be_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(fastsae.ConfigError, match="not the folder of a finished run"):
        RunFolder.read(tmp_path)
