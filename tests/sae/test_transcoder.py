"""Transcoders: what they compute, and that other programs read them so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_saes import activations, largest_difference
from tolerances import FOLDED_FLOAT64, OTHER_PROGRAM

import fastsae
from fastsae import Transcoder


def small_transcoder(
    skip: bool = False,
    d_out: int = 9,
    dtype: torch.dtype = torch.float32,
    layer: int = 3,
    seed: int = 0,
) -> Transcoder:
    """With nothing left at its initial value, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    metadata = {
        "model_name": "some/model", "hook_name": f"blocks.{layer}.mlp.hook_in",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out", "hf_hook_name_out": f"model.layers.{layer}.mlp",
    }  # fmt: skip
    transcoder = Transcoder(
        12, d_out, 40, 3.6, skip=skip, normalize="scalar", generator=g, metadata=metadata
    )
    with torch.no_grad():
        for tensor in (*transcoder.parameters(), transcoder.center):
            tensor += 0.3 * torch.randn(tensor.shape, generator=g)
        transcoder.W_dec /= transcoder.W_dec.norm(dim=1, keepdim=True)
        transcoder.scale.fill_(0.3)
        transcoder.target_scale.fill_(0.7)
        transcoder.activation.threshold.fill_(0.6)
        transcoder.activation.threshold_updates.fill_(12)
    return transcoder.to(dtype).eval()


each_kind = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


@each_kind
@torch.no_grad()
def test_it_computes_its_definition(skip: bool) -> None:
    t, x = small_transcoder(skip, dtype=torch.float64), activations(4, 9, 12, dtype=torch.float64)
    scaled = (x - t.center) * t.scale
    pre = scaled @ t.W_enc + t.b_enc
    z = pre * (pre > t.activation.threshold)
    y = z @ t.W_dec + t.b_dec + (scaled @ t.W_skip.T if skip else 0)
    assert largest_difference(t(x), y / t.target_scale) < FOLDED_FLOAT64
    assert largest_difference(t.encode(x), z / t.target_scale) < FOLDED_FLOAT64
    assert largest_difference(t.decode(t.encode(x)) + t.skip(x), t(x)) < FOLDED_FLOAT64
    assert (t.d_in, t.d_out, t.d_sae, t(x).shape) == (12, 9, 40, (4, 9, 9))


@each_kind
@torch.no_grad()
def test_folding_changes_no_output(skip: bool) -> None:
    t, x = small_transcoder(skip, dtype=torch.float64), activations(50, 12, dtype=torch.float64)
    for inference in ("threshold", "topk", "batch"):
        before = t.encode(x, inference), t(x, inference), t.threshold.clone()
        folded = small_transcoder(skip, dtype=torch.float64).fold_scaling()
        after = folded.encode(x, inference), folded(x, inference), folded.threshold
        for a, b in zip(after, before, strict=True):
            assert largest_difference(a, b) < FOLDED_FLOAT64
    assert folded.normalize == "none" and folded.center.abs().max() == 0
    assert (folded.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@each_kind
@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path: Path, skip: bool) -> None:
    t, x = small_transcoder(skip), activations(50, 12)
    back = fastsae.load(fastsae.save(t, tmp_path))
    assert isinstance(back, Transcoder) and (back.W_skip is not None) == skip
    assert (back.k, back.inference, back.target_hook_name) == (
        3.6,
        "threshold",
        "blocks.3.hook_mlp_out",
    )
    assert largest_difference(back(x), t(x)) < OTHER_PROGRAM
    assert largest_difference(back.encode(x, "topk"), t.encode(x, "topk")) < OTHER_PROGRAM


@each_kind
@pytest.mark.parametrize("d_out", [12, 9])
@torch.no_grad()
def test_saelens_loads_it(tmp_path: Path, skip: bool, d_out: int) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    t, x = small_transcoder(skip, d_out), activations(50, 12)
    theirs = sae_lens.SAE.load_from_disk(fastsae.save(t, tmp_path))
    assert type(theirs).__name__ == f"JumpReLU{'Skip' * skip}Transcoder"
    assert largest_difference(theirs.encode(x), t.encode(x)) < OTHER_PROGRAM
    assert largest_difference(theirs(x), t(x)) < OTHER_PROGRAM
    assert 0 < (t.encode(x) > 0).float().mean() < 1
    assert theirs.cfg.metadata.hook_name == "blocks.3.mlp.hook_in"
    assert theirs.cfg.metadata.hook_name_out == "blocks.3.hook_mlp_out"
    theirs.save_model(tmp_path / "again")
    assert largest_difference(fastsae.load(tmp_path / "again")(x), t(x)) < OTHER_PROGRAM


@pytest.mark.parametrize(
    "kind", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"]
)
@torch.no_grad()
def test_transcoders_of_saelens_are_read(tmp_path: Path, kind: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes import transcoder

    config = getattr(transcoder, f"{kind}Config")(
        d_in=12, d_out=9, d_sae=40, apply_b_dec_to_input=False,
        metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.ln2.hook_normalized"),
    )  # fmt: skip
    theirs = getattr(transcoder, kind)(config)
    g = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(
            0.3 * torch.randn(parameter.shape, generator=g).abs()
            if parameter.dim() == 1
            else torch.randn(parameter.shape, generator=g)
        )
    theirs.save_model(tmp_path)
    ours, x = fastsae.load(tmp_path), activations(50, 12)
    assert isinstance(ours, Transcoder)
    assert largest_difference(ours.encode(x), theirs.encode(x)) < OTHER_PROGRAM
    assert largest_difference(ours(x), theirs(x)) < OTHER_PROGRAM


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    t = small_transcoder()
    with pytest.raises(fastsae.FormatError, match="no transcoder that selects k latents"):
        fastsae.save(t, tmp_path, "topk")
    for format in ("dictionary_learning", "sparsify"):
        with pytest.raises(fastsae.FormatError, match=f"{format}'s format holds autoencoders"):
            fastsae.save(t, tmp_path, "topk", format)
    with pytest.raises(fastsae.ConfigError, match="layer_norm.*belongs to autoencoders"):
        Transcoder(12, 9, 40, 4, normalize="layer_norm")
    with pytest.raises(ValueError, match=r"reconstructs \[..., 9\], got \(5, 8\)"):
        t.loss(torch.randn(5, 12), target=torch.randn(5, 8))


@each_kind
@torch.no_grad()
def test_circuit_tracers_folder_by_definition(tmp_path: Path, skip: bool) -> None:
    """What its TranscoderSet makes of the folder: relu and a threshold, W_enc by rows, the skip added."""
    of_layers = [small_transcoder(skip, 12, layer=i, seed=i) for i in range(3)]
    folder = fastsae.save_for_circuit_tracer(of_layers[::-1], tmp_path / "set")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors",
    }  # fmt: skip
    config = json.loads((folder / "config.yaml").read_text())
    assert config == {
        "model_name": "some/model", "model_kind": "transcoder_set", "scan": "set",
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out",
    }  # fmt: skip
    x = activations(50, 12)
    for i, t in enumerate(of_layers):
        w = load_file(folder / f"layer_{i}.safetensors")
        assert w["W_enc"].shape == w["W_dec"].shape == (40, 12) and ("W_skip" in w) == skip
        pre = torch.nn.functional.linear(x, w["W_enc"], w["b_enc"])
        z = pre * (pre > w["activation_function.threshold"])
        y = z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)
        assert largest_difference(z, t.encode(x)) < OTHER_PROGRAM
        assert largest_difference(y, t(x)) < OTHER_PROGRAM


def test_a_set_with_a_gap_is_refused(tmp_path: Path) -> None:
    of = lambda layer, d_out=12: small_transcoder(d_out=d_out, layer=layer)
    for wrong in ([of(0), of(2)], [of(0), of(0)], [of(1)], []):
        with pytest.raises(fastsae.FormatError, match="for each layer from 0 on"):
            fastsae.save_for_circuit_tracer(wrong, tmp_path)
    with pytest.raises(fastsae.FormatError, match=r"blocks.0.mlp.hook_in of width 12.*of width 9"):
        fastsae.save_for_circuit_tracer([of(0, 9)], tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_evaluation_on_pairs_is_of_the_target() -> None:
    t, x = small_transcoder(True), activations(60, 12)
    y = t(x) + 0.1 * activations(60, 9, seed=2)
    found = fastsae.evaluate(t, (x, y))
    expected = 1 - (y - t(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert float(found["threshold"].explained_variance) == pytest.approx(float(expected), rel=1e-5)
    assert found.pca_explained_variance is None and set(found.scores) == {
        "threshold",
        "topk",
        "batch",
    }
    for wrong in (x, (x, y, y), (x, y[:, :5]), (x, y[:3])):
        with pytest.raises(fastsae.ConfigError, match=r"expected activations \[N, "):
            fastsae.evaluate(t, wrong)
