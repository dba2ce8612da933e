"""All that there is, from text to report, at hooks of other kinds and widths than the residual stream."""

import dataclasses
import json
import shutil
from pathlib import Path

import models
import pytest

import fastsae
from fastsae.cli import main
from fastsae.config import Site
from fastsae.data import cache
from fastsae.data import stream as streams
from fastsae.evaluation.contrast import contrast, pool
from fastsae.lm.hooked import SplicedModel
from fastsae.lm.hooks import site_of
from fastsae.training import checkpoint

FLAGS = [
    "--quantization", "none", "--context-length", "32", "--harvest-batch", "4", "--tokens", "2048", "--batch-size",
    "256", "--pool-tokens", "1024", "--eval-tokens", "600", "--d-sae", "96", "--k", "4", "--device", "cpu",
    # What is dropped at one place is dropped at all.
    "--outlier-norm", "inf", "--wandb", "disabled", "--checkpoint-every-tokens", "512", "--log-every-tokens", "512",
]  # fmt: skip
PLACES = ["--layer", "1", "2", "--hook", "mlp_out", "mlp.down_proj.input", "model.layers.0.input"]
NAMES = {
    "L1-mlp_out": ("blocks.1.hook_mlp_out", "model.layers.1.mlp", 64),
    "L1-mlp.down_proj.input": ("model.layers.1.mlp.down_proj.input",) * 2 + (128,),
    "L0-resid_pre": ("blocks.0.hook_resid_pre", "model.layers.0.input", 64),
    "L2-mlp_out": ("blocks.2.hook_mlp_out", "model.layers.2.mlp", 64),
    "L2-mlp.down_proj.input": ("model.layers.2.mlp.down_proj.input",) * 2 + (128,),
}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = models.prose(tmp_path_factory.mktemp("text"), words=4000, each=20)
    return ["--model", models.llama(), "--text-files", str(text), *FLAGS]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    out = tmp_path_factory.mktemp("together")
    assert main(["train", *common, *PLACES, "--out", str(out)]) == 0
    return out


def run_of(out: Path, place: str) -> Path:
    return out / f"llama-scope-v1-{place}-batchtopk-k4-seed17"


def weights(run: Path) -> bytes:
    return (run / "sae_weights.safetensors").read_bytes()


def test_every_layer_with_every_hook_and_a_full_path_once(together: Path) -> None:
    assert {path.name for path in together.iterdir()} == {run_of(together, n).name for n in NAMES}
    for place, (name, path, width) in NAMES.items():
        run = run_of(together, place)
        sae, summary = fastsae.load(run), json.loads((run / "summary.json").read_text())
        assert (sae.hook_name, sae.metadata["hf_hook_name"], sae.d_in) == (name, path, width)
        assert site_of(sae.hook_name).layer == int(place[1]) and summary["d_in"] == width
        found = json.loads((run / "evaluation.json").read_text())
        scores = found["modes"]["topk"]
        assert 0 < scores["explained_variance"]["value"] <= 1 and (run / "report.html").is_file()
        # Replaced at this place, the model changes.
        assert scores["kl"]["value"] > 0 and found["losses"]["kl_zero"]["value"] > 0


@pytest.mark.parametrize("place", ["L1-mlp_out", "L2-mlp.down_proj.input"])
def test_each_is_the_one_trained_alone(place: str, together: Path, tmp_path: Path, common) -> None:
    alone = ["--layer", place[1], "--hook", place[3:], "--report", "none", "--out", str(tmp_path)]
    assert main(["train", *common, *alone]) == 0
    assert weights(run_of(tmp_path, place)) == weights(run_of(together, place))


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    together: Path, tmp_path: Path, common: list[str]
) -> None:
    shutil.copytree(together, tmp_path / "out")
    for place in NAMES:
        run = run_of(tmp_path / "out", place)
        (run / "summary.json").unlink()
        for step in checkpoint.steps(run / "checkpoints")[1:]:
            shutil.rmtree(run / "checkpoints" / f"step_{step}")
        (run / "sae_weights.safetensors").write_bytes(b"")
    assert (
        main(["train", *common, *PLACES, "--report", "none", "--out", str(tmp_path / "out")]) == 0
    )
    for place in NAMES:
        assert weights(run_of(tmp_path / "out", place)) == weights(run_of(together, place))


def test_a_cache_of_several_places(tmp_path: Path, common: list[str], monkeypatch) -> None:
    flags = dict(zip(common[::2], common[1::2], strict=True))
    config = fastsae.TrainConfig(
        model=flags["--model"], text_files=(flags["--text-files"],), quantization="none", context_length=32,
        harvest_batch=4, tokens=1024, batch_size=256, pool_tokens=1024, eval_tokens=200, k=4, device="cpu",
    )  # fmt: skip
    places = (Site(1, "mlp.down_proj.input"), Site(2), Site(1, "mlp_out"))
    live = streams.open_stream(config, places)
    expected = [live.next_batch() for _ in range(4)]
    cached = dataclasses.replace(config, cache_dir=str(tmp_path / "c"))
    streams.open_stream(cached, places)

    def refuse(*_arguments):
        raise AssertionError("the language model was opened")

    for module in (streams, cache):
        monkeypatch.setattr(module, "open_text_chunks", refuse)
    again = streams.open_stream(cached, places)
    assert again.source.widths == (128, 64, 64) and again.metadata == live.metadata
    for batch in expected:
        assert all(a.equal(b) for a, b in zip(again.next_batch(), batch, strict=True))
    part = streams.open_stream(cached, places[2:])
    assert all(part.next_batch()[0].equal(batch[2]) for batch in expected)
    with pytest.raises(
        fastsae.StreamError, match=r"1.mlp.down_proj.input, 2, 1.mlp_out in the cache, 1 wanted"
    ):
        streams.open_stream(cached, (1,))


def test_contrast_and_evaluation_read_where_the_sae_says(together: Path, tmp_path: Path) -> None:
    sae = fastsae.load(run_of(together, "L2-mlp.down_proj.input"))
    model = SplicedModel.load(models.llama(), site_of(sae.hook_name))
    sides = [[f"{word} and tide {i} " * 3 for i in range(12)] for word in ("time", "man")]
    found = contrast(*(pool(sae, model, side, 32) for side in sides), fdr=0.5)
    assert found["latents"] is not None
    (tmp_path / "a.txt").write_text("time and tide wait for no man. " * 60)
    given = [
        "evaluate",
        str(run_of(together, "L1-mlp_out")),
        "--text-files",
        str(tmp_path / "a.txt"),
    ]
    given += ["--tokens", "300", "--no-report", "--out"]
    assert main([*given, str(tmp_path / "own")]) == 0
    assert main([*given, str(tmp_path / "told"), "--layer", "1", "--hook", "mlp"]) == 0
    own, told = ((tmp_path / name / "evaluation.json").read_text() for name in ("own", "told"))
    assert own == told
    assert (
        main([*given, str(tmp_path / "no"), "--layer", "1", "--hook", "mlp.down_proj.input"]) != 0
    )


def test_places_in_settings() -> None:
    config = fastsae.TrainConfig(hook="model.layers.3.mlp.down_proj.input")
    assert (config.layer, config.hook) == config.site == (3, "mlp.down_proj.input")
    assert config.run_name == "gemma-4-e2b-scope-v1-L3-mlp.down_proj.input-batchtopk-k64-seed17"
    assert fastsae.TrainConfig(hook="blocks.4.hook_resid_post") == fastsae.TrainConfig(layer=4)
    sweep = fastsae.Sweep(fastsae.TrainConfig(name="a"), (1, 2), hooks=("mlp_in", "model.layers.0"))
    assert sweep.sites == (Site(1, "mlp_in"), Site(0), Site(2, "mlp_in"))
    assert [run.run_name for run in sweep.runs] == [
        "a-L1-mlp_in-k64-seed17", "a-L0-k64-seed17", "a-L2-mlp_in-k64-seed17",
    ]  # fmt: skip
    for wrong in ("mlp out", "mlp/down", "blocks.3.attn.hook_z", ""):
        with pytest.raises(fastsae.ConfigError, match="is not a place in a decoder layer"):
            fastsae.TrainConfig(hook=wrong)
    with pytest.raises(fastsae.ConfigError, match="each of them once"):
        fastsae.Sweep(fastsae.TrainConfig(), hooks=("mlp_in", "mlp_in"))
