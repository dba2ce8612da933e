"""Transcoders from text to report: input and target of the same tokens from one pass."""

import json
import shutil
from pathlib import Path

import models
import pytest
import torch

import fastsae
from fastsae import Transcoder
from fastsae.cli import main
from fastsae.config import Site
from fastsae.data import stream as streams
from fastsae.lm.hooked import SplicedModel
from fastsae.training import checkpoint
from fastsae.training.initialize import initialize_sae

FLAGS = [
    "--quantization", "none", "--context-length", "32", "--harvest-batch", "4", "--tokens", "2048", "--batch-size",
    "256", "--pool-tokens", "1024", "--eval-tokens", "600", "--d-sae", "96", "--k", "8", "--device", "cpu",
    "--outlier-norm", "inf", "--wandb", "disabled", "--checkpoint-every-tokens", "512", "--log-every-tokens", "512",
    "--target", "mlp_out", "--skip",
]  # fmt: skip
SET = ["--layer", "0", "1", "2", "3", "--hook", "mlp_in"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = models.prose(tmp_path_factory.mktemp("text"), words=4000, each=20)
    return ["--model", models.llama(), "--text-files", str(text), *FLAGS]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    out = tmp_path_factory.mktemp("together")
    assert main(["train", *common, *SET, "--out", str(out)]) == 0
    return out


def run_of(out: Path, layer: int) -> Path:
    return out / f"llama-scope-v1-L{layer}-mlp_in-to-mlp_out-skip-batchtopk-k8-seed17"


def weights(run: Path) -> bytes:
    return (run / "sae_weights.safetensors").read_bytes()


def test_a_set_trains_on_one_pass_and_is_evaluated_at_the_target(together: Path) -> None:
    assert {path.name for path in together.iterdir()} == {
        run_of(together, i).name for i in range(4)
    }
    for layer in range(4):
        run = run_of(together, layer)
        sae, summary = fastsae.load(run), json.loads((run / "summary.json").read_text())
        assert isinstance(sae, Transcoder) and sae.W_skip is not None and (sae.W_skip != 0).any()
        assert (sae.hook_name, sae.target_hook_name) == (
            f"blocks.{layer}.mlp.hook_in",
            f"blocks.{layer}.hook_mlp_out",
        )
        assert sae.metadata["hf_hook_name_out"] == f"model.layers.{layer}.mlp"
        assert (summary["d_in"], summary["d_out"], summary["inference"]) == (64, 64, "threshold")
        assert summary["pca_explained_variance"] is None and summary["explained_variance"] > 0
        assert (run / "report.html").is_file()
    assert fastsae.save_for_circuit_tracer(
        [fastsae.load(run_of(together, i)) for i in range(4)], together / "set"
    )
    shutil.rmtree(together / "set")


def test_the_numbers_of_an_evaluation_are_those_of_the_model_with_its_mlp_replaced(
    together: Path,
) -> None:
    run = run_of(together, 2)
    sae = fastsae.load(run)
    model = SplicedModel.load(models.llama(), Site(2, "mlp_in"), target=Site(2, "mlp_out"))
    text = fastsae.HeldOutText.tokenize(["time and tide wait " * 4] * 3, models.tokenizer(), 32)
    found = fastsae.evaluate(sae, text, "threshold", model=model)
    mlp = model._model.model.layers[2].mlp
    batch = next(iter(text.batches(len(text), model.device)))
    plain = mlp.forward

    def loss(forward) -> float:
        mlp.forward = forward
        with torch.no_grad():
            logits = model._model(batch.tokens, use_cache=False).logits.log_softmax(-1)
        mlp.forward = plain
        nll = -logits[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
        followed = torch.arange(nll.shape[1]) < batch.lengths[:, None] - 1
        return float(nll[batch.text[:, :-1] & followed].mean())

    def replaced(x):
        return torch.where(batch.text[..., None], sae(x), plain(x))

    clean, zero = loss(plain), loss(lambda x: torch.zeros_like(plain(x)))
    assert float(found.losses["clean"]) == pytest.approx(clean, rel=1e-5)
    assert float(found.losses["zero"]) == pytest.approx(zero, rel=1e-5)
    scores = found["threshold"]
    assert float(scores.cross_entropy) == pytest.approx(loss(replaced), rel=1e-5)
    x, y = (a[batch.text] for a in model.activations(batch.tokens))
    error = (y - sae(x).detach()).square().sum() / (y - y.mean(0)).square().sum()
    assert float(scores.explained_variance) == pytest.approx(1 - float(error), rel=1e-4)


def test_each_is_the_one_trained_alone(together: Path, tmp_path: Path, common: list[str]) -> None:
    alone = ["--layer", "1", "--hook", "mlp_in", "--report", "none", "--out", str(tmp_path)]
    assert main(["train", *common, *alone]) == 0
    assert weights(run_of(tmp_path, 1)) == weights(run_of(together, 1))


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    together: Path, tmp_path: Path, common: list[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(together, out)
    for layer in range(4):
        run = run_of(out, layer)
        (run / "summary.json").unlink()
        for step in checkpoint.steps(run / "checkpoints")[1:]:
            shutil.rmtree(run / "checkpoints" / f"step_{step}")
        (run / "sae_weights.safetensors").write_bytes(b"")
    assert main(["train", *common, *SET, "--report", "none", "--out", str(out)]) == 0
    for layer in range(4):
        assert weights(run_of(out, layer)) == weights(run_of(together, layer))


def test_evaluate_and_contrast_of_a_finished_one(together: Path, tmp_path: Path, common) -> None:
    run, text = str(run_of(together, 1)), common[3]
    assert (
        main(["evaluate", run, "--text-files", text, "--tokens", "300", "--out", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"zero", "mean", "clean"} <= set(found["losses"])
    assert {"threshold", "topk", "batch"} == set(found["modes"])
    sets = {}
    for name, word in (("positive", "time"), ("negative", "man")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": f"{word} and tide {i} " * 2}) + "\n" for i in range(12))
        )
        sets |= {f"--{name}": str(path)}
    flags = [part for pair in sets.items() for part in pair]
    assert main(["contrast", run, *flags, "--out", str(tmp_path)]) == 0


def test_on_batches_of_your_own(tmp_path: Path) -> None:
    """Pairs of tensors of different widths; nothing but that they are pairs is asked of them."""
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(21_504, 16, generator=g) + 2
    y = torch.relu(x @ torch.randn(16, 48, generator=g)) @ torch.randn(48, 12, generator=g) + 5
    pairs = list(zip(x[:20_480].split(256), y[:20_480].split(256), strict=True))
    found = {}
    for skip in (False, True):
        config = fastsae.TrainConfig(
            hook="mlp_in", target="mlp_out", skip=skip, d_sae=256, k=8, tokens=20_480, batch_size=256,
            device="cpu", out=str(tmp_path), wandb="disabled",
        )  # fmt: skip
        sae = fastsae.train(pairs, config)
        result = fastsae.evaluate(sae, (x[20_480:], y[20_480:]), "threshold")
        found[skip] = float(result["threshold"].explained_variance)
        assert (sae.d_in, sae.d_out, tuple(sae(x[:3]).shape)) == (16, 12, (3, 12))
        run = tmp_path / config.run_name
        assert fastsae.load(run)(x[:3]).equal(sae(x[:3]))
    assert found[True] > found[False] > 0.3
    with pytest.raises(fastsae.StreamError, match="for each of 2 layers"):
        fastsae.train(
            list(x.split(256)), config.__class__(target="mlp_out", hook="mlp_in", d_sae=64, k=4)
        )


@torch.no_grad()
def test_it_begins_at_the_mean_of_the_target_with_scales_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = 5 * torch.randn(2000, 16, generator=g) + 2, 0.2 * torch.randn(2000, 12, generator=g) - 3
    config = fastsae.TrainConfig(
        hook="mlp_in", target="mlp_out", skip=True, d_sae=64, k=4, device="cpu"
    )
    sae = initialize_sae(config, x, target=y)
    assert isinstance(sae, Transcoder) and not sae.W_skip.any()
    scaled = sae.scale_input(x)[0]
    assert float(scaled.norm(dim=1).mean()) == pytest.approx(1, rel=1e-4)
    assert float(((y * sae.target_scale) - sae.b_dec).norm(dim=1).mean()) == pytest.approx(
        1, rel=1e-4
    )
    torch.testing.assert_close(sae.center, x.mean(0), rtol=0, atol=0.3)
    # Before anything is learnt, latents aside, the target's median is what comes out.
    torch.testing.assert_close(sae.decode(torch.zeros(1, 64))[0], y.mean(0), rtol=0, atol=0.02)


def test_the_buffer_carries_both_and_drops_from_both(common: list[str]) -> None:
    flags = dict(zip(common[::2], common[1::2], strict=False))
    config = fastsae.TrainConfig(
        model=flags["--model"], text_files=(flags["--text-files"],), quantization="none", context_length=32,
        harvest_batch=4, tokens=512, batch_size=128, pool_tokens=1024, eval_tokens=200, k=4, device="cpu",
        activation_dtype="fp32", layer=1, hook="mlp_in", target="mlp_out", outlier_norm=1.05,
    )  # fmt: skip
    stream = streams.open_stream(config, config.sites)
    mlp = SplicedModel.load(models.llama(), 1)._model.model.layers[1].mlp
    for _ in range(3):
        x, y = stream.next_batch()
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), y)
    # Behind a norm without gains all inputs are equally long: these are outliers of the target.
    assert stream.counts["outliers"] > 0
    alone = streams.open_stream(config, config.sites[:1])
    alone.next_batch()
    assert alone.counts["outliers"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": True}, "skip belongs to a transcoder"),
        ({"target": "mlp_out", "hook": "mlp_out"}, "another place of the same layer"),
        ({"target": "model.layers.3.mlp", "layer": 2}, "another place of the same layer"),
        ({"target": "mlp out"}, "is not a place in a decoder layer"),
        (
            {"target": "mlp_out", "normalize": "layer_norm"},
            "normalize = 'layer_norm' belongs to autoencoders",
        ),
        ({"target": "mlp_out", "init_from": "a"}, "init_from = 'a' belongs to autoencoders"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(fastsae.ConfigError, match=message):
        fastsae.TrainConfig(**settings)


def test_a_model_that_is_hooked_otherwise_is_refused(together: Path) -> None:
    sae = fastsae.load(run_of(together, 1))
    text = fastsae.HeldOutText.tokenize(["time and tide"], models.tokenizer(), 32)
    with pytest.raises(
        fastsae.ConfigError, match="Transcoder needs a model that is hooked at 2 places"
    ):
        fastsae.evaluate(sae, text, model=SplicedModel.load(models.llama(), Site(1, "mlp_in")))
    wide = SplicedModel.load(
        models.llama(), Site(1, "mlp_in"), target=Site(1, "mlp.down_proj.input")
    )
    with pytest.raises(
        fastsae.ConfigError,
        match=r"reconstructs activations of width 64, but layer 1, mlp.down_proj",
    ):
        fastsae.evaluate(sae, text, model=wide)
