"""What follows a training: every number on held-out text, whatever happens, and again when asked."""

import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch

import fastsae
from fastsae import progress
from fastsae.cli import main
from fastsae.data.stream import Stream
from fastsae.lm import loading
from fastsae.reporting import report
from fastsae.reporting.model_card import model_card
from fastsae.reporting.run_folder import RunFolder
from fastsae.training import trainer

SCORES = (
    "explained_variance", "pca_explained_variance", "l0", "alive_fraction", "evaluated_on", "inference",
    "threshold_explained_variance", "threshold_l0",
)  # fmt: skip
FILES = {
    "cfg.json", "sae_weights.safetensors", "run.json", "held_out.safetensors", "metrics.jsonl",
    "summary.json", "evaluation.json", "training.png", "report.html", "report_data", "checkpoints",
}  # fmt: skip


def config(folder: Path, **changes: object) -> fastsae.TrainConfig:
    text = folder / "prose.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking.\n\n" * 200)
    settings: dict = {
        "model": models.llama(), "text_files": (str(text),), "layer": 2, "quantization": "none",
        "context_length": 32, "harvest_batch": 4, "d_sae": 128, "k": 4, "batch_size": 64, "tokens": 1280,
        "pool_tokens": 1024, "eval_tokens": 256, "log_every_tokens": 640, "device": "cpu",
        "wandb": "disabled", "out": str(folder / "runs"), "name": "run",
    }  # fmt: skip
    return fastsae.TrainConfig(**settings | changes)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.slow
def test_a_group_is_evaluated_with_one_model_when_its_training_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, loaded = [], []

    def open_stream(*arguments: object) -> Stream:
        stream = trainer_open_stream(*arguments)
        opened.extend(map(weakref.ref, (stream, stream.source.model, stream.buffer._pools[0])))
        return stream

    def load(*arguments: object, **options: object):
        assert opened and not any(reference() for reference in opened), (
            "the training is still there"
        )
        loaded.append(arguments)
        return loading.load_pretrained(*arguments, **options)

    trainer_open_stream = trainer.open_stream
    monkeypatch.setattr(trainer, "open_stream", open_stream)
    monkeypatch.setattr(report, "load_pretrained", load)
    sweep = fastsae.Sweep(config(tmp_path), layers=(3, 1), ks=(2, 4))
    saes = trainer.train_and_report(sweep)
    assert loaded == [(models.llama(),)]
    for sae, run in zip(saes, sweep.runs, strict=True):
        folder = tmp_path / "runs" / run.run_name
        assert {path.name for path in folder.iterdir()} >= FILES
        summary, evaluation = (
            summary_of(folder),
            json.loads((folder / "evaluation.json").read_text()),
        )
        assert summary["k"] == run.k == evaluation["pca"]["components"]
        modes = evaluation["modes"]
        assert summary["explained_variance"] == modes["topk"]["explained_variance"]["value"]
        assert summary["threshold_l0"] == modes["threshold"]["l0"]["value"]
        assert summary["evaluated_on"] == f"{evaluation['tokens']} held-out activations"
        assert evaluation["tokens"] >= run.eval_tokens and evaluation["losses"]
        # On the layer that the SAE is of: by the activations of a model of our own.
        model = fastsae.SplicedModel.load(run.model, run.layer)
        text = RunFolder.read(folder).held_out()
        found = fastsae.evaluate(sae, text, "topk", model=model, losses=False)["topk"]
        assert summary["explained_variance"] == pytest.approx(found.explained_variance, rel=1e-5)


@pytest.mark.slow
def test_a_report_is_repeated_with_the_same_numbers(tmp_path: Path) -> None:
    trainer.train_and_report(config(tmp_path, matryoshka=(16, 128)))
    run = tmp_path / "runs/run"
    inner = json.loads((run / "evaluation.json").read_text())["modes"]["topk"]["levels"]
    by_level = summary_of(run)["explained_variance_by_level"]
    assert by_level == {m: level["value"] for m, level in inner.items()}
    assert [*by_level] == ["16", "128"]
    folder = RunFolder.read(run)
    card = model_card(folder.config, fastsae.load(run), folder.history, [], summary_of(run))
    assert "active latents per token; its first 16 latents reconstruct by themselves" in card
    assert f"| by the first 16 latents | {by_level['16']:.4g}" in card
    before, page = summary_of(run), (run / "report.html").read_bytes()
    for name in ("report.html", "training.png", "evaluation.json"):
        (run / name).unlink()
    evaluation = report.report_run(RunFolder.read(run))
    assert evaluation is not None
    assert summary_of(run) == before and (run / "report.html").read_bytes() == page
    assert evaluation["topk"].explained_variance == before["explained_variance"]


@pytest.mark.slow
def test_a_failure_costs_a_warning_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("no memory for the whole model")

    monkeypatch.setattr(report, "load_pretrained", fail)
    with caplog.at_level(logging.INFO):
        trainer.train_and_report(config(tmp_path))
    run = tmp_path / "runs/run"
    assert "no memory for the whole model" in caplog.text
    assert f"  fastsae evaluate {run}" in caplog.text
    summary = summary_of(run)
    assert summary["tokens_seen"] == 1280 and not {"inference", "report"} & summary.keys()
    assert summary["evaluated_on"] == "the last logged training batch"
    assert (run / "training.png").exists() and not (run / "report.html").exists()
    assert fastsae.load(run).d_sae == 128
    monkeypatch.undo()
    report.report_run(RunFolder.read(run))
    assert {*SCORES, "report"} <= summary_of(run).keys()


@pytest.mark.slow
def test_a_run_on_a_cache_is_evaluated_on_its_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("no language model is needed")

    monkeypatch.setattr(report, "load_pretrained", refuse)
    cached = config(tmp_path, cache_dir=str(tmp_path / "cache"))
    trainer.train_and_report(cached)
    summary = summary_of(tmp_path / "runs/run")
    assert summary["evaluated_on"] == "256 held-out activations"
    assert summary["evaluated_tokens"] == summary["held_out_tokens"] == 256
    assert {*SCORES, "report"} <= summary.keys()


@pytest.mark.slow
def test_every_stage_tells_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "fastsae")
    trainer.train_and_report(config(tmp_path, d_sae=512))
    cached = config(tmp_path, name="other", d_sae=512, cache_dir=str(tmp_path / "cache"))
    trainer.train_and_report(cached)
    told = [record.getMessage() for record in caplog.records]
    for stage in (
        f"loading {models.llama()}", "filling the pool: ", "evaluating: ", "report: pages: ",
        "held-out activations: ", "writing the cache: ",
    ):  # fmt: skip
        assert any(line.startswith(stage) for line in told), stage
    caplog.clear()
    caplog.set_level(logging.WARNING, "fastsae")
    trainer.train_and_report(config(tmp_path, name="unheard"))
    assert not caplog.records


@pytest.mark.slow
def test_a_short_run_has_a_short_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsae")
    short = config(tmp_path, eval_tokens=2048)
    trainer.train_and_report(short)
    run = tmp_path / "runs/run"
    evaluation, summary = json.loads((run / "evaluation.json").read_text()), summary_of(run)
    assert evaluation["rows"] == report.FEWEST_ROWS == 16
    held_out = RunFolder.read(run).held_out()
    measured = held_out.part(1, fewest=16).tokens
    assert summary["evaluated_tokens"] == evaluation["tokens"] == measured < 16 * 32
    assert summary["held_out_tokens"] == held_out.tokens >= 2048
    assert f"on {measured} of {held_out.tokens:,} held-out tokens" in caplog.text
    # A longer training pays for more, in proportion to the work of both.
    model = fastsae.SplicedModel.load(models.llama(), 2)
    cut, whole = model.work
    share = report._affordable_share(model, ["topk", "threshold", "batch"])
    assert share * (cut + 6 * whole) == pytest.approx(0.1 * cut)
    monkeypatch.setattr(report, "SHARE", 0.1 * 1000 / (1280 * share))
    report.report_run(RunFolder.read(run))
    assert summary_of(run)["evaluated_tokens"] == pytest.approx(1000, abs=2 * 32)
    monkeypatch.setattr(report, "SHARE", 1e9)
    report.report_run(RunFolder.read(run))
    assert summary_of(run)["evaluated_tokens"] == summary["held_out_tokens"]


@pytest.mark.slow
def test_the_command_evaluates_as_much_of_the_held_out_text_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train_and_report(config(tmp_path, eval_tokens=2048, report="quick"))
    run = tmp_path / "runs/run"
    held_out = RunFolder.read(run).held_out()
    for tokens, rows in ((1000, len(held_out.part(1000))), (10**6, len(held_out))):
        assert main(["evaluate", str(run), "--tokens", str(tokens), "--no-report"]) == 0
        assert json.loads((run / "evaluation.json").read_text())["rows"] == rows
    assert "loss recovered" in capsys.readouterr().out


@pytest.mark.slow
def test_what_follows_the_training_can_be_chosen_and_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsae")
    run, settings = tmp_path / "runs/run", config(tmp_path)
    trainer.train_and_report(replace(settings, report="none"))
    later = {"evaluation.json", "report.html", "report_data", "training.png"}
    assert {path.name for path in run.iterdir()} & FILES == FILES - later
    assert f"--report none); that is\n  fastsae evaluate {run}" in caplog.text
    trainer.train_and_report(replace(settings, report="quick"))
    assert {path.name for path in run.iterdir()} & later == {"evaluation.json", "training.png"}
    quick = summary_of(run)
    assert {*SCORES} <= quick.keys() and "report" not in quick
    trainer.train_and_report(settings)
    assert {path.name for path in run.iterdir()} >= FILES
    assert summary_of(run) == quick | {"report": "report.html"}
    monkeypatch.setattr(report, "report_run", None)  # it is made once
    trainer.train_and_report(settings)
    assert f"run has its report; for another one\n  fastsae evaluate {run}" in caplog.text


def test_fit_ends_with_the_sae_and_the_facts_of_its_training(tmp_path: Path) -> None:
    (sae,) = fastsae.Trainer(config(tmp_path)).fit()
    run = tmp_path / "runs/run"
    assert {path.name for path in run.iterdir()} & FILES == {
        "cfg.json", "sae_weights.safetensors", "run.json", "held_out.safetensors", "metrics.jsonl",
        "summary.json", "checkpoints",
    }  # fmt: skip
    summary = summary_of(run)
    assert summary["tokens_seen"] == 1280 and "inference" not in summary
    torch.testing.assert_close(fastsae.load(run).W_dec, sae.W_dec)
