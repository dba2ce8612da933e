"""Sharing on the hub: against a stand-in of it on this machine, which fails when it is told to."""

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import huggingface_hub.constants
import models
import pytest
import torch
import yaml

import fastsae
from fastsae.cli import main
from fastsae.errors import Interrupted
from fastsae.reporting import publish as hub
from fastsae.reporting.model_card import model_card
from fastsae.reporting.tracking import read_metrics

CONFIG = fastsae.TrainConfig(
    d_sae=32, k=2, batch_size=32, tokens=640, log_every_tokens=64, checkpoint_every_tokens=160,
    device="cpu", wandb="disabled", name="run", hub_repo="me/mine",
)  # fmt: skip
FILES = {
    "README.md", "cfg.json", "sae_weights.safetensors", "sae_weights.pt", "metrics.jsonl",
    "run/cfg.json", "run/sae_weights.safetensors",
}  # fmt: skip


def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=g) for _ in range(20)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.01)
    # Of the client's own patience nothing is left: what is tested is ours.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    with hub_stand_in.hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        yield running


def environment(server: hub_stand_in.Hub, home: Path) -> dict[str, str]:
    wanted = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return os.environ | wanted | {"HF_TOKEN": "hf_" + "a" * 34}


def assert_whole(repository: hub_stand_in.Repository, run: Path, finished: bool = True) -> None:
    """The repository holds the run, one state of it in all files."""
    files = repository.files
    assert set(files) == FILES | ({"summary.json", "training.png"} if finished else set())
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert files[name] == files[f"run/{name}"]
    if finished:
        for name in ("cfg.json", "sae_weights.safetensors", "metrics.jsonl", "summary.json"):
            assert files[name] == (run / name).read_bytes(), name
        assert b"Training goes on" not in files["README.md"]


def test_pushed_at_each_checkpoint_and_at_the_end(server, tmp_path: Path) -> None:
    pushed, first_done = [], threading.Event()

    def note(request: str) -> None:
        if "/commit/" in request:
            first_done.set()

    def slowly() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches()):
            if i == 8:  # between the first checkpoint and the second
                assert first_done.wait(30)
                while not server.repositories["me/mine"].commits:
                    first_done.wait(0.01)
                pushed.append(dict(server.repositories["me/mine"].files))
            yield batch

    server.fail = note
    config = dataclasses.replace(CONFIG, out=str(tmp_path), hub_private=True)
    fastsae.train(slowly(), config)
    repository = server.repositories["me/mine"]
    assert repository.private and repository.commits[-1] == "Add the report of run"
    assert repository.commits[0] == "run: checkpoint at 160 tokens"
    assert set(pushed[0]) == FILES and b"Training goes on" in pushed[0]["README.md"]
    assert_whole(repository, tmp_path / "run")
    # Each of the files is what the run had at that checkpoint.
    checkpoint = tmp_path / "run/checkpoints/step_20/sae_weights.safetensors"
    assert pushed[0]["sae_weights.safetensors"] != checkpoint.read_bytes()
    assert repository.files["sae_weights.safetensors"] == checkpoint.read_bytes()
    assert not list((tmp_path / "run").glob(".hub-*"))


FAILURES = {
    "refused": lambda count, request: 500 if count <= 3 else None,
    "broken connection": lambda count, request: 0 if count <= 3 else None,
    "busy": lambda count, request: 429 if count <= 2 else None,
    "during the large files": lambda count, request: (
        503 if "/lfs/" in request and count < 14 else None
    ),
    "at the commit": lambda count, request: 500 if "/commit/" in request and count < 12 else None,
}


@pytest.mark.parametrize(
    "failure",
    [n if n == "refused" else pytest.param(n, marks=pytest.mark.slow) for n in FAILURES],
)
def test_a_failure_that_passes_is_retried(server, tmp_path: Path, failure: str) -> None:
    server.fail = lambda request: FAILURES[failure](len(server.requests), request)
    config = dataclasses.replace(CONFIG, out=str(tmp_path), checkpoint_every_tokens=10**6)
    fastsae.train(batches(), config)
    assert_whole(server.repositories["me/mine"], tmp_path / "run")


@pytest.mark.slow
def test_a_hub_that_is_gone_costs_nothing_and_the_command_completes_the_push(
    server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub goes away during the first push and comes back after the run."""
    away = False

    def going(request: str) -> int | None:
        nonlocal away
        away = away or "/lfs/" in request
        return 0 if away else None

    server.fail = going
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "a folder"))
    with caplog.at_level(logging.INFO):
        sae = fastsae.train(batches(), config)
    run = tmp_path / "a folder/run"
    assert server.repositories["me/mine"].commits == []
    x = batches()[0]
    torch.testing.assert_close(fastsae.load(run)(x), sae(x), rtol=0, atol=1e-6)
    assert len(read_metrics(run)) == 10 and (run / "summary.json").exists()
    server.fail = lambda request: None
    (command,) = set(re.findall(r"^  (hf upload .*)$", caplog.text, re.MULTILINE))
    assert shlex.split(command)[2:] == ["me/mine", str(run / "hub"), "."]
    program = str(Path(sys.executable).parent / "hf")
    done = subprocess.run(
        [program, *shlex.split(command)[1:]], env=environment(server, tmp_path), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_whole(server.repositories["me/mine"], run)


@pytest.mark.slow
def test_the_next_checkpoint_completes_a_push_that_failed(server, tmp_path: Path) -> None:
    """The first push fails for good; a later one carries all it held."""
    failed = threading.Event()

    def once(request: str) -> int | None:
        if failed.is_set() or "/commit/" not in request:
            return None
        failed.set()
        return 403

    server.fail = once

    def slowly() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches()):
            if i == 8:
                assert failed.wait(30)
            yield batch

    fastsae.train(slowly(), dataclasses.replace(CONFIG, out=str(tmp_path)))
    assert failed.is_set()
    assert_whole(server.repositories["me/mine"], tmp_path / "run")


@pytest.mark.slow
def test_a_slow_hub_holds_nobody_up_and_old_pushes_give_way(server, tmp_path: Path) -> None:
    trained, slow = threading.Event(), []

    def wait(request: str) -> None:
        if "/commit/" in request:
            slow.append(request)
            assert trained.wait(60), "the training waited for the push"

    def counting() -> Iterator[torch.Tensor]:
        yield from batches()[:19]
        trained.set()
        yield batches()[19]

    server.fail = wait
    fastsae.train(counting(), dataclasses.replace(CONFIG, out=str(tmp_path)))
    commits = server.repositories["me/mine"].commits
    assert commits[-1] == "Add the report of run" and len(commits) < 5
    assert_whole(server.repositories["me/mine"], tmp_path / "run")


@pytest.mark.slow
def test_no_permission_is_said_once_and_not_tried_again(
    server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail = lambda request: 403 if "/commit/" in request else None
    config = dataclasses.replace(CONFIG, out=str(tmp_path), checkpoint_every_tokens=10**6)
    fastsae.train(batches(), config)
    # At the last checkpoint, unless the end took its place, and at the end.
    assert sum("/commit/" in request for request in server.requests) <= 2
    assert "403" in caplog.text and "hf upload me/mine" in caplog.text


@pytest.mark.slow
def test_a_hub_that_hangs_does_not_keep_the_program(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    server.fail = lambda request: released.wait(60) and None if "/commit/" in request else None
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(hub, "QUIET_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "fastsae")
    fastsae.train(batches(), dataclasses.replace(CONFIG, out=str(tmp_path)))
    released.set()
    assert "waiting for the push to me/mine" in caplog.text
    assert "the push to me/mine is not finished" in caplog.text
    assert f"  hf upload me/mine {tmp_path}/run/hub ." in caplog.text


@pytest.mark.slow
def test_a_signal_while_a_push_is_waited_for(
    server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released, config = threading.Event(), dataclasses.replace(CONFIG, out=str(tmp_path))
    server.fail = lambda request: released.wait(60) and None if "/commit/" in request else None
    wait, waits = hub.Publisher._is_pushing, []

    def signalled(self: hub.Publisher, deadline: float) -> bool:
        waits.append(deadline)
        if len(waits) == 2:
            signal.raise_signal(signal.SIGTERM)
        return wait(self, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.Publisher, "_is_pushing", signalled)
        patch.setattr(hub, "QUIET_SECONDS", 0.1)
        with pytest.raises(Interrupted, match="stopped after the training; .*same command again"):
            fastsae.train(batches(), config)
    assert "the push to me/mine is not finished: give the same command again" in caplog.text
    released.set()
    server.fail = lambda request: None
    fastsae.train(batches(), config)
    assert_whole(server.repositories["me/mine"], tmp_path / "run")


@pytest.mark.slow
def test_pushes_that_fail_are_counted(
    server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fastsae.train(batches(), dataclasses.replace(CONFIG, out=str(tmp_path), hub_repo=None))
    server.fail = lambda request: 403 if "/commit/" in request else None
    with hub.Publisher(run, "me/mine", False) as publisher:
        for i in range(3):
            publisher.publish(run, "---\nlicense: apache-2.0\n---\n", f"push {i}")
            while publisher._failed == i:
                time.sleep(0.01)
    assert caplog.text.count("could not push to me/mine") == 1 and "403" in caplog.text
    assert "the last 3 pushes to me/mine failed" in caplog.text
    assert len(set(re.findall(r"^  (hf upload .*)$", caplog.text, re.MULTILINE))) == 1


@pytest.mark.slow
def test_no_login_shows_at_the_start(
    server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = threading.Event()

    def refuse(request: str) -> int | None:
        if "create" not in request:
            return None
        refused.set()
        return 401

    def waiting() -> Iterator[torch.Tensor]:
        yield from batches()[:2]
        assert refused.wait(30)
        assert not list((tmp_path / "run/checkpoints").glob("*"))
        yield from batches()[2:]

    server.fail = refuse
    fastsae.train(waiting(), dataclasses.replace(CONFIG, out=str(tmp_path)))
    assert "me/mine cannot be pushed to as things are" in caplog.text and "401" in caplog.text
    assert fastsae.load(tmp_path / "run").d_sae == 32


@pytest.mark.slow
def test_a_finished_run_is_pushed_when_asked_later(server, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, out=str(tmp_path), hub_repo=None)
    fastsae.train(batches(), config)
    fastsae.train(batches(), dataclasses.replace(config, hub_repo="me/mine"))
    assert_whole(server.repositories["me/mine"], tmp_path / "run")


# --- the card ---


def numbers(text: str) -> set[str]:
    """The numbers of a text that measure something: with a point, a percent sign or a thousand."""
    return set(re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?", text))


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[hub_stand_in.Hub, Path]]:
    """A run on a language model, pushed at its checkpoints and at its end."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "prose.txt").write_text("It was a bright cold day, and the clocks struck.\n\n" * 400)
    flags = (
        "--layer", "2", "--quantization", "none", "--context-length", "32", "--harvest-batch", "4",
        "--d-sae", "128", "--k", "4", "--batch-size", "64", "--tokens", "2560", "--pool-tokens", "1024",
        "--eval-tokens", "256", "--log-every-tokens", "320", "--checkpoint-every-tokens", "640",
        "--device", "cpu", "--wandb", "disabled", "--hub-repo", "me",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, hub_stand_in.hub() as running:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        given = ["--model", models.llama(), "--text-files", str(folder / "prose.txt"), *flags]
        assert main(["train", *given, "--out", str(folder / "runs")]) == 0
        yield running, folder / "runs/llama-scope-v1-L2-batchtopk-k4-seed17"


@pytest.mark.slow
def test_every_number_of_the_card_was_recorded(published) -> None:
    server, run = published
    (name,) = server.repositories
    assert name == "me/llama-scope-v1-L2-batchtopk-k4-seed17"
    card = server.repositories[name].files["README.md"].decode()
    metrics, summary = read_metrics(run), json.loads((run / "summary.json").read_text())
    state = json.loads((run / "checkpoints/step_40/state.json").read_text())
    assert [saved["tokens_seen"] for saved in state["history"]] == [640, 1280, 1920, 2560]

    def told(m: dict) -> list[str]:
        objective = "–" if m.get("objective") is None else f"{m['objective']:.4g}"
        return [
            f"{m['tokens_seen']:,}", objective, *(f"{m[n]:.4g}" for n in ("mse", "aux", "explained_variance")),
            f"{m['l0']:.2f}", f"{m['alive_fraction']:.1%}", f"{m['dead']:,}", f"{m['threshold']:.4g}",
        ]  # fmt: skip

    lines = section(card, "Training metrics").strip().splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    by_tokens = {m["tokens_seen"]: m for m in metrics}
    for row, saved in zip(cells[:-1], state["history"], strict=True):
        assert row == [f"{saved['tokens_seen']:,}", *told(by_tokens[saved["tokens_seen"]])]
    peak = max(metrics, key=lambda m: m["explained_variance"])
    assert cells[-1] == ["**peak explained variance**", *told(peak)]

    progress = section(card, "Training progress")
    for value in ("2,560", "100.0%", "40", state["history"][-1]["time"][11:19]):
        assert f" {value} |" in progress or value in progress
    modes = json.loads((run / "evaluation.json").read_text())["modes"]
    intervals = {
        f"{modes[mode][score][side]:{form}}"
        for mode in (summary["inference"], "threshold")
        for score, form in (("explained_variance", ".4g"), ("l0", ".2f"))
        for side in ("low", "high")
    }
    told_of_evaluation = section(card, "Evaluation").partition("\n\n")[2]
    assert intervals <= numbers(told_of_evaluation)
    assert numbers(told_of_evaluation) - {"0"} <= intervals | {  # of L0
        f"{summary['explained_variance']:.4g}", f"{summary['threshold_explained_variance']:.4g}",
        f"{summary['pca_explained_variance']:.4g}", f"{summary['l0']:.2f}",
        f"{summary['threshold_l0']:.2f}", f"{summary['alive_fraction']:.1%}",
    }  # fmt: skip
    settings = dict(re.findall(r"\| `(\w+)` \| `(.*)` \|", section(card, "Hyper-parameters")))
    for name, value in state["config"].items():
        if value is not None and name in settings and name not in ("precision", "text_files"):
            assert settings[name] == str(value), name
    assert (settings["d_in"], settings["k_aux"], settings["precision"]) == ("64", "8", "fp32")
    assert settings["text_files"] == "['prose.txt']"
    assert len(settings) >= 25 and not {"out", "wandb", "hub_repo"} & settings.keys()


def test_the_header_is_what_the_hub_reads(published) -> None:
    server, run = published
    card = server.repositories[f"me/{run.name}"].files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "saelens"
    assert {
        "sparse-autoencoder",
        "mechanistic-interpretability",
        "sae-lens",
        "llama",
        "batch-topk",
    } < set(header["tags"])
    assert "arxiv:2412.06410" in header["tags"]
    # A local model and local text are nothing the hub could link to.
    assert "base_model" not in header and "datasets" not in header
    assert card.split("---\n", 2)[2].lstrip().startswith(f"# {run.name}\n")


def test_a_number_that_is_missing() -> None:
    config = dataclasses.replace(CONFIG, hub_repo=None)
    history = [{"tokens_seen": 64, "step": 2, "time": "2026-01-02T03:04:05+00:00"}]
    names = (
        "objective",
        "mse",
        "aux",
        "explained_variance",
        "l0",
        "alive_fraction",
        "dead",
        "threshold",
    )
    metrics = [{"tokens_seen": 64} | dict.fromkeys(names)]
    summary = {"inference": "topk", "evaluated_on": "2 held-out activations"} | dict.fromkeys(
        (
            "explained_variance",
            "l0",
            "threshold_explained_variance",
            "threshold_l0",
            "alive_fraction",
        ),
    )
    summary["pca_explained_variance"] = None
    card = model_card(config, fastsae.SAE(8, 32, 2), history, metrics, summary)
    (row,) = section(card, "Training metrics").strip().splitlines()[4:]
    assert row == "| 64 | 64 |" + " – |" * 8
    assert section(card, "Evaluation").count("| – |") == 6


def test_the_header_of_the_recipe() -> None:
    config = fastsae.TrainConfig(hub_repo="me")
    sae = fastsae.SAE(
        1536, 64, 64, metadata={"model_name": config.model, "hook_name": "model.layers.17"}
    )
    history = [{"tokens_seen": 16_000_000, "step": 15_625, "time": "2026-01-02T03:04:05+00:00"}]
    card = model_card(config, sae, history, [])
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "google/gemma-4-E2B" and "gemma-4" in header["tags"]
    assert (header["datasets"], header["language"]) == ("HuggingFaceFW/fineweb-edu", "en")
    assert "# gemma-4-e2b-scope-v1-L17-batchtopk-k64-seed17\n" in card
    for told in (
        "| 16,000,000 |",
        "| 100,000,000 |",
        "| 16.0% |",
        "| 15,625 |",
        "2026-01-02 03:04:05",
    ):
        assert told in card
    assert "Training goes on" in card and "Training has not ended" in card


@pytest.mark.parametrize("of_language_model", [True, False])
def test_the_card_tells_settings_as_they_were_used(of_language_model: bool) -> None:
    """Also those that follow the length of the run, and the width, where they were not given."""
    config = fastsae.TrainConfig(
        tokens=1_000_000, seed=5, name="mine", adam_betas=(0.8, 0.98), hub_repo="me/mine"
    )
    names = {"model_name": config.model, "hook_name": "model.layers.17"}
    sae = fastsae.SAE(1536, 24576, 64, metadata=names if of_language_model else {})
    history = [{"tokens_seen": 1_024, "step": 1, "time": "2026-01-02T03:04:05+00:00"}]
    card = model_card(config, sae, history, [])
    told = dict(re.findall(r"\| `(\w+)` \| `(.*)` \|", section(card, "Hyper-parameters")))
    used = {
        "lr": config.peak_lr(24576, 1536), "decoder_lr_ratio": 2.0, "adam_betas": [0.8, 0.98],
        "lr_warmup_tokens": 20_000, "lr_decay_tokens": 333_333, "dead_after_tokens": 100_000,
        "aux_coefficient": 18.75, "k_aux": 128,
    }  # fmt: skip
    of_stream = {"stream_seed": 5, "outlier_norm": 10.0}
    expected = used | (of_stream if of_language_model else {})
    assert {name: told[name] for name in expected} == {n: str(v) for n, v in expected.items()}
    assert of_language_model or not of_stream.keys() & told.keys()
    assert "k_anneal_tokens" not in told, "k was not annealed"
    assert "0.999" not in card


def test_the_card_of_a_transcoder_says_what_it_reads_and_gives() -> None:
    config = fastsae.TrainConfig(hook="mlp_in", target="mlp_out", skip=True)
    sae = fastsae.Transcoder(
        1536, 1536, 64, 64, skip=True,
        metadata={
            "model_name": config.model, "hook_name": "blocks.17.mlp.hook_in", "hook_name_out": "blocks.17.hook_mlp_out",
            "hf_hook_name": "model.language_model.layers.17.mlp.input",
        },
    )  # fmt: skip
    history = [{"tokens_seen": 16_000_000, "step": 15_625, "time": "2026-01-02T03:04:05+00:00"}]
    card = model_card(config, sae, history, [])
    for told in (
        "A BatchTopK transcoder with 64 latents",
        "`mlp_in` of layer 17 of",
        "reconstructs `mlp_out` of the same layer (`blocks.17.hook_mlp_out`, with a skip connection)",
        'get_submodule("model.language_model.layers.17.mlp")',
        "register_forward_pre_hook(read, with_kwargs=True)",
        "reconstruction = sae(x)",
        "Latents of single tokens are those above the threshold.",
    ):
        assert told in card, told
    assert "The weights alone" not in card and "largest of each" not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")


def test_everything_written_is_strict_json(published) -> None:
    """Parsers other than Python's know neither NaN nor Infinity."""
    server, run = published

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    def read(text: str) -> object:
        return json.loads(text, parse_constant=refuse)

    read_so_far = set()
    for path in run.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".js"):
            lines = [text := path.read_text(encoding="utf-8")]
            if path.suffix == ".jsonl":
                lines = text.splitlines()
            elif path.suffix == ".js":
                lines = re.fullmatch(r"fastsaeData\((\".*?\"),(.*)\);\n", text).groups()
            assert len(list(map(read, lines))) >= 1
            read_so_far.add(path.name)
    (data,) = re.findall(
        r"<script [^>]*application/json[^>]*>(.*?)</script>", (run / "report.html").read_text()
    )
    read(data)
    assert {
        "cfg.json",
        "state.json",
        "metrics.jsonl",
        "summary.json",
        "latents-0.js",
    } <= read_so_far
    for name, content in server.repositories[f"me/{run.name}"].files.items():
        if name.endswith(".json"):
            read(content.decode())


@pytest.mark.slow
def test_the_snippets_run_and_agree(published, tmp_path: Path) -> None:
    """Every snippet of the card, one after the other as a reader would, and all read the same SAE."""
    server, run = published
    card = server.repositories[f"me/{run.name}"].files["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 4
    check = textwrap.dedent(f"""
        import fastsae
        found = [x, *results]
        ours = fastsae.load({str(run)!r}).eval()
        assert x.shape[1] == 64 and len(x) > 5
        for latents, reconstruction in results:
            assert (latents - ours.encode(x)).abs().max() < 1e-4 * ours.encode(x).abs().max()
            assert (reconstruction - ours(x)).abs().max() < 1e-4 * ours(x).abs().max()
        print("agree", len(results))
    """)
    keep = "\nresults.append((latents.detach(), reconstruction.detach()))\n"
    program = snippets[0] + "\nresults = []\n" + "".join(s + keep for s in snippets[1:]) + check
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(server, tmp_path), capture_output=True, text=True
    )  # fmt: skip
    assert "agree 3" in done.stdout, done.stderr[-2000:]
