"""Warm starts: a run begins with the latents, and the reconstructions, of the SAE it came from."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sae_lens
import torch
from small_saes import activations, largest_difference, small_sae
from tolerances import OTHER_PROGRAM, UNIT_NORM

import fastsae
from fastsae.evaluation.evaluate import evaluate
from fastsae.sae.io import save
from fastsae.training.initialize import initialize_sae, load_origin

CONFIG = fastsae.TrainConfig(
    k=4, lr=3e-3, batch_size=64, tokens=64 * 100, dead_after_tokens=600, device="cpu", seed=1,
    wandb="disabled",
)  # fmt: skip


def started(config: fastsae.TrainConfig, rows: torch.Tensor) -> fastsae.SAE:
    """The SAE of a run that was just started on ``rows``, in eval mode."""
    origin = load_origin(fastsae.Sweep(config))
    return initialize_sae(config, rows, origin, {"model_name": "another/model"}).eval()


@pytest.fixture
def not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random SAEs fit no activations: what a test sees is the origin as it is."""
    monkeypatch.setattr("fastsae.training.initialize.REFIT_GAIN", math.inf)


@pytest.mark.usefixtures("not_refitted")
@pytest.mark.parametrize("normalize", ["scalar", "none"])
@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_first_outputs_are_those_of_the_origin(tmp_path: Path, format: str, normalize: str) -> None:
    origin = small_sae(k=4, normalize="scalar")
    save(origin, tmp_path / "sae", format=format)
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"), normalize=normalize)
    x = activations(200, 12)
    sae = started(config, x)
    assert (sae.scale != 1) == (normalize == "scalar")
    assert largest_difference(sae(x), origin(x)) < OTHER_PROGRAM
    assert largest_difference(sae.encode(x), origin.encode(x)) < OTHER_PROGRAM
    torch.testing.assert_close(sae.threshold, origin.threshold)
    torch.testing.assert_close(sae.W_dec, origin.W_dec, rtol=0, atol=UNIT_NORM)
    assert sae.metadata["model_name"] == "another/model"
    told = sae.metadata["warm_start"]
    assert (told["source"], told["k"], told["model_name"]) == (config.init_from, 4, "some/model")
    json.dumps(sae.metadata)


def standard_sae(directory: Path) -> sae_lens.SAE:
    """A SAELens SAE with ReLU, and decoder rows of any length, one of them zero."""
    theirs = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(d_in=12, d_sae=40, metadata=sae_lens.saes.sae.SAEMetadata())
    )
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        theirs.W_dec.copy_(torch.randn(40, 12, generator=g) * torch.rand(40, 1, generator=g) * 3)
        theirs.W_dec[7] = 0
        theirs.W_enc.copy_(torch.randn(12, 40, generator=g))
        theirs.b_enc.normal_(generator=g)
        theirs.b_dec.normal_(generator=g)
    theirs.save_model(str(directory))
    return theirs


@pytest.mark.usefixtures("not_refitted")
def test_decoder_rows_of_any_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = standard_sae(tmp_path / "sae")
    # With k = d_sae every positive pre-activation is kept, as a ReLU keeps them.
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"), k=40)
    x = activations(200, 12)
    with caplog.at_level(logging.INFO):
        sae = started(config, x)
    told = (
        "40 latents",
        "JumpReLU",
        "normalised",
        "1 with a zero decoder row",
        "its threshold is not",
    )
    assert all(words in caplog.text for words in told), caplog.text
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=UNIT_NORM)
    z = sae.encode(x)
    assert z[:, 7].any(), "the latent without a decoder row did not start anew"
    z[:, 7] = 0
    assert largest_difference(sae.decode(z), theirs(x)) < OTHER_PROGRAM
    assert sae.activation.threshold_updates == 0


def test_another_k_tracks_a_threshold_of_its_own(tmp_path: Path) -> None:
    fastsae.save(small_sae(k=5), tmp_path / "sae")
    sae = started(dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae")), activations(50, 12))
    assert sae.k == 4 and sae.activation.threshold_updates == 0 and sae.threshold == 0


class Mixtures:
    """Sparse mixtures of directions; ``shift`` moves all activations and turns the directions."""

    def __init__(self, shift: float, seed: int) -> None:
        g = torch.Generator().manual_seed(5)
        base, turn = torch.randn(30, 12, generator=g), torch.randn(30, 12, generator=g)
        self.directions = torch.nn.functional.normalize(base + shift * turn, dim=1)
        self.offset = 2 + 4 * shift
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, n: int) -> torch.Tensor:
        g = self.generator
        z = torch.rand(n, 30, generator=g) * (torch.rand(n, 30, generator=g) < 0.1)
        return 10 * z @ self.directions + self.offset

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield self.rows(64)


@pytest.mark.parametrize("normalize", ["scalar", "none"])
def test_other_activations_get_a_scale_and_a_bias_of_their_own(
    tmp_path: Path, normalize: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The origin's activations, 40 times as large and elsewhere: as it is it explains less than nothing."""
    trained = fastsae.train(Mixtures(0, 0), dataclasses.replace(CONFIG, d_sae=48))
    fastsae.save(trained, tmp_path / "sae")
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"), normalize=normalize)
    x = Mixtures(0, 1).rows(800)
    before = evaluate(trained, x, "batch")["batch"].explained_variance
    with caplog.at_level(logging.INFO):
        same = started(config, x)
    assert "refitted_scale" not in same.metadata["warm_start"]
    assert largest_difference(same(x), trained(x)) < OTHER_PROGRAM
    moved = 40 * x + 300
    with caplog.at_level(logging.INFO):
        sae = started(config, moved)
    told = sae.metadata["warm_start"]
    assert told["explained_variance"] < 0 < before - 0.05 < told["refitted_explained_variance"]
    assert told["refitted_scale"] in (1 / 32, 1 / 64) and "estimated on them" in caplog.text
    assert sae.activation.threshold_updates == 0
    found = evaluate(sae, moved, "batch")["batch"].explained_variance
    assert found == pytest.approx(told["refitted_explained_variance"], abs=1e-4)
    torch.testing.assert_close(sae.W_dec, trained.W_dec, rtol=0, atol=UNIT_NORM)


@pytest.mark.slow
def test_continuing_elsewhere_keeps_the_latents_and_improves(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, d_sae=48, tokens=64 * 400)
    fastsae.save(fastsae.train(Mixtures(0, 0), config), tmp_path / "sae")
    origin = fastsae.load(tmp_path / "sae")
    held_out = Mixtures(0.3, 9).rows(2000)
    before = evaluate(origin, held_out)["topk"].explained_variance
    warm = dataclasses.replace(config, d_sae=None, init_from=str(tmp_path / "sae"), tokens=64 * 100)
    after = fastsae.train(Mixtures(0.3, 1), warm)
    cold = fastsae.train(Mixtures(0.3, 1), dataclasses.replace(config, tokens=64 * 100))
    assert evaluate(after, held_out)["topk"].explained_variance > before + 0.05
    assert (
        evaluate(after, held_out)["topk"].explained_variance
        > evaluate(cold, held_out)["topk"].explained_variance
    )
    same = torch.nn.functional.cosine_similarity(after.W_dec, origin.W_dec)
    assert same.median() > 0.9


@pytest.mark.slow
def test_a_resumed_run_does_not_need_its_origin(tmp_path: Path) -> None:
    fastsae.save(small_sae(k=4), tmp_path / "sae")
    config = dataclasses.replace(
        CONFIG, init_from=str(tmp_path / "sae"), out=str(tmp_path / "runs"), name="run", tokens=640
    )
    fastsae.train(Mixtures(0, 0), config)
    shutil.rmtree(tmp_path / "sae")
    sae = fastsae.train(Mixtures(0, 0), dataclasses.replace(config, tokens=1280))
    assert sae.metadata["warm_start"]["source"] == config.init_from
    assert fastsae.load(tmp_path / "runs/run").metadata["warm_start"] == sae.metadata["warm_start"]
    with pytest.raises(fastsae.CheckpointError, match="init_from"):
        fastsae.train(Mixtures(0, 0), dataclasses.replace(config, init_from=None, d_sae=40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 48}, "has 40 latents, d_sae = 48"),
        ({"expansion": 2}, "has 40 latents, expansion = 2 asks for 24"),
        ({"k": 41}, "k = 41 is more than the 40 latents"),
        ({"ks": (4, 41)}, "k = 41 is more than the 40 latents"),
        ({"normalize": "layer_norm"}, "give --normalize scalar"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    fastsae.save(small_sae(k=4), tmp_path / "sae")
    grid = {"ks": changes.pop("ks")} if "ks" in changes else {}
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"), **changes)
    config = fastsae.Sweep(config, **grid)
    with pytest.raises(fastsae.ConfigError, match=message):
        fastsae.Trainer(config, Mixtures(0, 0))


def test_another_width_names_both(tmp_path: Path) -> None:
    fastsae.save(small_sae(d_in=10, k=4), tmp_path / "sae")
    config = dataclasses.replace(
        CONFIG, init_from=str(tmp_path / "sae"), out=str(tmp_path / "runs")
    )
    with pytest.raises(fastsae.ConfigError, match="of width 10, this run's have width 12"):
        fastsae.train(Mixtures(0, 0), config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("not_refitted")
def test_layer_norm_goes_on_as_layer_norm(tmp_path: Path) -> None:
    origin = small_sae(k=4, normalize="layer_norm")
    fastsae.save(origin, tmp_path / "sae")
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"))
    with pytest.raises(fastsae.ConfigError, match="give --normalize layer_norm"):
        fastsae.Trainer(config, Mixtures(0, 0))
    x = activations(200, 12)
    sae = started(dataclasses.replace(config, normalize="layer_norm"), x)
    assert largest_difference(sae(x), origin(x)) < OTHER_PROGRAM


def test_no_sae_there() -> None:
    config = dataclasses.replace(CONFIG, init_from="/nowhere")
    with pytest.raises(fastsae.FormatError, match="/nowhere does not exist"):
        fastsae.Trainer(config, Mixtures(0, 0))


@pytest.mark.parametrize("warm", [False, True])
def test_a_part_begins_as_in_the_whole(tmp_path: Path, warm: bool) -> None:
    config, x = dataclasses.replace(CONFIG, d_sae=60), activations(200, 12)
    if warm:
        save(small_sae(k=4), tmp_path / "sae")
        config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "sae"))
    origin = load_origin(fastsae.Sweep(config)) if warm else None
    whole = initialize_sae(config, x, origin)
    part = initialize_sae(config, x, origin, part=range(11, whole.d_sae - 4))
    expected = whole.state_dict()
    expected["W_enc"] = expected["W_enc"][:, 11:-4]
    expected |= {name: expected[name][11:-4] for name in ("W_dec", "b_enc")}
    assert part.d_sae == whole.d_sae - 15 and part.scale != 1
    assert part.metadata == whole.metadata
    for name, tensor in part.state_dict().items():
        assert tensor.equal(expected[name]), name
