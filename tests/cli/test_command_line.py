"""`fastsae train` as a new user gives it: right ones work, wrong ones get one clear sentence."""

import json
import shutil
from pathlib import Path

import models
import pytest
import torch

import fastsae
from fastsae.cli import main
from fastsae.lm import loading
from fastsae.training import checkpoint

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen.\n\n"
SMALL = (
    "--layer", "2", "--quantization", "none", "--context-length", "32", "--harvest-batch", "4",
    "--d-sae", "128", "--k", "4", "--batch-size", "64", "--tokens", "1280", "--pool-tokens", "1024",
    "--eval-tokens", "256", "--log-every-tokens", "640", "--device", "cpu", "--wandb", "disabled",
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 200, encoding="utf-8")
    return str(path)


class Result:
    def __init__(self, code: int, errors: str, out: Path) -> None:
        self.code, self.errors, self.out = code, errors, out


@pytest.fixture
def run(
    tmp_path: Path,
    text: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    """Give the command with small settings, a tiny model and local text; later flags override."""

    def give(*flags: str, base: tuple[str, ...] = SMALL) -> Result:
        out = tmp_path / "runs"
        common = (
            "--model",
            models.llama(),
            "--text-files",
            text,
            "--out",
            str(out),
            "--name",
            "run",
        )
        code = main(["train", *common, *base, *flags])
        errors = capfd.readouterr().err + caplog.text
        caplog.clear()
        assert "Traceback" not in errors, errors
        return Result(code, errors, out)

    return give


def test_the_right_command(run) -> None:
    result = run()
    assert result.code == 0, result.errors
    summary = json.loads((result.out / "run/summary.json").read_text())
    wanted = {
        "explained_variance",
        "pca_explained_variance",
        "l0",
        "alive_fraction",
        "tokens_seen",
        "tokens_per_second",
        "harvested",
        "special",
        "nonfinite",
        "outliers",
    }
    assert 1e8 < summary["peak_memory_bytes"] < 1e11
    assert wanted <= set(summary)
    assert summary["l0"] == 4 and summary["tokens_seen"] == 1280
    sae = fastsae.load(result.out / "run")
    assert (sae.d_in, sae.d_sae, sae.hook_name) == (64, 128, "blocks.2.hook_resid_post")
    assert "fastsae.load(" in result.errors


WRONG = {
    "layer out of range": (("--layer", "4"), ["layer = 4", "has 4 layers", "--layer 0 to 3"]),
    "negative layer": (("--layer", "-1"), ["layer", "-1"]),
    "k beyond the dictionary": (("--k", "129"), ["k = 129", "d_sae = 128"]),
    "k zero": (("--k", "0"), ["k must be", "0"]),
    "d_sae negative": (("--d-sae", "-3"), ["d_sae", "-3"]),
    "batch size zero": (("--batch-size", "0"), ["batch_size", "0"]),
    "no tokens": (("--tokens", "0"), ["tokens", "0"]),
    "lr not finite": (("--lr", "inf"), ["lr", "inf"]),
    "text file missing": (("--text-files", "nowhere.txt"), ["nowhere.txt"]),
    "context too long": (("--context-length", "9999"), ["9999", "256"]),
    "cuda absent": (("--device", "cuda:99"), ["cuda:99", "--device cpu"]),
    "a typo": (("--bach-size", "3"), ["--bach-size", "--batch-size"]),
    "a value that is no number": (("--tokens", "many"), ["many"]),
    "another text ending": (("--text-files", __file__), [".txt", ".jsonl", ".parquet"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(run, case: str) -> None:
    flags, said = WRONG[case]
    result = run(*flags)
    assert result.code == 2
    for words in said:
        assert words in result.errors, result.errors
    assert not result.out.exists(), "a run directory was left behind"


def test_unknown_model_without_a_network(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("--model", "nobody/no-such-model")
    assert result.code == 2 and not result.out.exists()
    assert "nobody/no-such-model" in result.errors
    assert "--model DIR" in result.errors and "--demo" in result.errors


def test_unknown_data_set_without_a_network(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("--text-files", "--dataset", "nobody/no-such-text")
    assert result.code == 2 and not result.out.exists()
    assert "nobody/no-such-text" in result.errors and "--text-files FILE" in result.errors


@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 50, (), ["UTF-8", "latin.txt"]),
        ("empty.txt", b"", (), ["empty"]),
        ("blank.txt", b" \n\n \n", (), ["empty"]),
        ("short.txt", b"Too short.", (), ["nothing is left to train on", "--eval-tokens"]),
        ("a.jsonl", b'{"body": "words"}\n' * 9, (), ["text", "body"]),
        ("b.jsonl", b"{not json\n", (), ["b.jsonl", "line 1"]),
    ],
)
def test_unusable_text(
    run, tmp_path: Path, name: str, content: bytes, flags: tuple, said: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("--text-files", str(tmp_path / name), *flags)
    assert result.code == 2 and not result.out.exists()
    for words in said:
        assert words in result.errors, result.errors


@pytest.mark.slow
def test_the_right_column_beside_the_wrong_one(run, tmp_path: Path) -> None:
    records = tmp_path / "a.jsonl"
    records.write_text("\n".join(json.dumps({"body": PROSE}) for _ in range(200)))
    result = run("--text-files", str(records), "--text-column", "body")
    assert result.code == 0, result.errors


def test_bitsandbytes_missing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.importlib.util.find_spec
    find = lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    monkeypatch.setattr(loading.importlib.util, "find_spec", find)
    result = run("--quantization", "nf4")
    assert result.code == 2 and not result.out.exists()
    assert "bitsandbytes" in result.errors and "--quantization none" in result.errors


@pytest.mark.slow
def test_nf4_works_where_bitsandbytes_does(run) -> None:
    result = run("--quantization", "nf4")
    assert result.code == 0, result.errors


def test_activations_that_are_all_non_finite(run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(models.llama(), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = run("--model", str(broken))
    assert result.code == 2 and not result.out.exists()
    assert "layer 2" in result.errors and "float32" in result.errors


@pytest.mark.slow
def test_text_that_ends_early_loses_nothing(run) -> None:
    result = run("--tokens", "1000000")
    assert result.code == 2
    assert "the text ended after" in result.errors and "--tokens" in result.errors
    saved = checkpoint.load(checkpoint.newest(result.out / "run/checkpoints"))
    seen = saved.meta["tokens_seen"]
    assert f"--tokens {seen}" in result.errors
    finished = run("--tokens", str(seen))
    assert finished.code == 0, finished.errors
    assert json.loads((result.out / "run/summary.json").read_text())["tokens_seen"] == seen


@pytest.mark.slow
class TestAnExistingRun:
    def test_a_corrupt_checkpoint(self, run) -> None:
        result = run("--tokens", "640")
        (result.out / "run/checkpoints/step_10/state.safetensors").write_bytes(b"garbage")
        again = run()
        assert again.code == 2
        assert "step_10 is damaged" in again.errors and "Delete that folder" in again.errors
        shutil.rmtree(result.out / "run/checkpoints/step_10")
        assert run().code == 0

    def test_a_checkpoint_of_another_model(self, run) -> None:
        result = run("--tokens", "640")
        other = run("--model", models.gemma4_text())
        assert other.code == 2
        assert "model: " in other.errors and "gemma4-text" in other.errors
        assert checkpoint.steps(result.out / "run/checkpoints") == [10]

    def test_resume_never(self, run) -> None:
        assert run("--resume", "never").code == 0
        again = run("--resume", "never")
        assert again.code == 2 and "--resume is never" in again.errors

    def test_a_finished_run_is_finished(self, run) -> None:
        first = run()
        before = (first.out / "run/sae_weights.safetensors").read_bytes()
        again = run()
        assert again.code == 0 and "trained already, and saved in" in again.errors
        assert (first.out / "run/sae_weights.safetensors").read_bytes() == before


def test_a_place_that_cannot_be_written(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("--out", str(tmp_path / "file"))
    assert result.code == 2
    assert "cannot write to" in result.errors and "--out" in result.errors


@pytest.mark.parametrize("checkpoint_class", ["gemma4_text", "gemma4_multimodal"])
@pytest.mark.slow
def test_gemma_4_in_nf4(run, checkpoint_class: str) -> None:
    result = run(
        "--model", getattr(models, checkpoint_class)(), "--quantization", "nf4", "--layer", "5"
    )
    assert result.code == 0, result.errors
    sae = fastsae.load(result.out / "run")
    prefix = "model.layers" if checkpoint_class == "gemma4_text" else "model.language_model.layers"
    assert sae.metadata["hf_hook_name"] == f"{prefix}.5" and sae.d_in == 128
    assert sae.W_dec.isfinite().all() and torch.allclose(sae.W_dec.norm(dim=1), torch.ones(128))


@pytest.mark.slow
def test_saelens_reads_what_a_run_writes(run) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    result = run()
    ours, theirs = (
        fastsae.load(result.out / "run"),
        sae_lens.SAE.load_from_disk(str(result.out / "run")),
    )
    x = 3 * torch.randn(200, 64)
    for mine, its in ((ours.encode(x), theirs.encode(x)), (ours(x), theirs(x))):
        assert (mine - its).abs().max() <= 1e-5 * mine.abs().max()
