"""The examples, run as their first lines say, with a tiny language model and the standard library's prose."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import models
import pytest
import torch

import fastsae
from fastsae.evaluation.evaluate import text_activations

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name: str):
    """The module of an example, loaded from its file and not run."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on and text to evaluate on."""
    folder = tmp_path_factory.mktemp("examples")
    pages = [page for _, page in sorted(topics.items())]
    (folder / "training.txt").write_text("\n".join(pages[:40]), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n".join(pages[40:])[:8_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    """The run that the first example leaves behind; those after it read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = load("train_on_a_model").main(models.llama(), "2", "training.txt", "held_out.txt")
        return folder / found


def test_there_are_seven_and_each_is_short() -> None:
    assert len(SCRIPTS) == 7
    for name in SCRIPTS:
        lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) < 60, name
        assert f"    python examples/{name}.py" in "\n".join(lines[:6]), "the command comes first"


@pytest.mark.slow
def test_train_on_a_model(run_folder: Path) -> None:
    sae = fastsae.load(run_folder)
    assert (sae.d_in, sae.d_sae, sae.hook_name) == (64, 512, "blocks.2.hook_resid_post")
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["tokens_seen"] >= 100_000 and summary["explained_variance"] > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
@pytest.mark.parametrize("library", ["saelens", "dictionary_learning"])
def test_train_on_a_store(library: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if library == "dictionary_learning":
        pytest.importorskip("dictionary_learning", exc_type=ImportError)
    sae = load("train_on_a_store").main(library, models.llama(), "2", str(folder / "training.txt"))
    assert (sae.d_in, sae.d_sae) == (64, 512)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{library}: explained variance 0.") and "L0 16.0" in printed


def test_a_store_of_a_package_that_is_absent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dictionary_learning", None)
    with pytest.raises(SystemExit, match="pip install .* benchmarks/peers.txt"):
        load("train_on_a_store").dictionary_learning("model", 2, ["text"], 64)


def test_load_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load("load_anywhere").main(str(tmp_path))
    assert "saelens" in found and max(found.values()) < 1e-5
    names = {"saelens", "dictionary_learning", "sparsify"}
    assert {path.name for path in tmp_path.iterdir()} == names
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert all(said.count(name) == 1 for name in names)  # sparsify itself may say something, too


def test_evaluate_a_peers_sae(capsys: pytest.CaptureFixture[str]) -> None:
    result = load("evaluate_a_peers_sae").main()
    assert result.pca_explained_variance is not None
    assert result["topk"].explained_variance > result.pca_explained_variance
    assert "PCA with 4 components" in capsys.readouterr().out


@pytest.mark.slow
def test_contrast(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = load("contrast").main(str(run_folder))
    assert result["documents"] == {"positive": 90, "negative": 90}
    assert result["probes"]["sparse"] > 0.9  # a question mark is easily told from a full stop
    assert "latents tested differ" in capsys.readouterr().out


@pytest.mark.slow
def test_steer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the demo's language model, with an SAE of its layer that saw little."""
    model = fastsae.SplicedModel.load("glassllm", 2)
    pages = (folder / "training.txt").read_text(encoding="utf-8").splitlines()
    text = fastsae.HeldOutText.tokenize(pages, model.tokenizer, 128, tokens=30_000)
    x = torch.cat([x for _, _, x in text_activations(model, text)])
    config = fastsae.TrainConfig(d_sae=256, k=8, lr=1e-3, tokens=len(x), device="cpu")
    sae = fastsae.train(x.split(512), config)
    sae.metadata |= {"model_name": "glassllm", "hook_name": "model.layers.2"}
    found = load("steer").main(str(fastsae.save(sae, folder / "steered")))
    assert 0 < found["clean"] < 1 and 0 < found["random"] < found["largest_random"]
    assert abs(found["clamped"] - found["clean"]) > 1e-4
    assert "probability of plot, figure, axis" in capsys.readouterr().out


@pytest.mark.slow
def test_transcoders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load("transcoders").main(models.llama(), "2", str(folder / "training.txt"), "set")
    assert [sae.hook_name for sae in found] == ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"]
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors",
    }  # fmt: skip


def test_what_an_example_takes_is_what_its_command_gives() -> None:
    """A command line of N words calls ``main`` with N arguments."""
    for name in SCRIPTS:
        module = load(name)
        command = next(line for line in module.__doc__.splitlines() if "python examples/" in line)
        words = command.split("    ")[1].split()[2:]
        inspect.signature(module.main).bind(*words)
