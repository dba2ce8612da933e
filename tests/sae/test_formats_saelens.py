"""SAELens itself reads what fastsae writes, and fastsae reads what SAELens writes."""

import dataclasses
import json

import pytest
import sae_lens
import torch
from safetensors.torch import load_file
from small_saes import MODEL, activations, largest_difference, small_sae
from tolerances import OTHER_PROGRAM

import fastsae
from fastsae import SAE, BatchTopK, JumpReLU, TopK

SHAPES = [(50, 12), (4, 9, 12)]
NORMALIZE = ["scalar", "none", "layer_norm"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_same_function(theirs, ours: SAE, inference=None):
    for shape in SHAPES:
        x = activations(*shape)
        latents = ours.encode(x, inference)
        assert largest_difference(theirs.encode(x), latents) < OTHER_PROGRAM
        assert largest_difference(theirs(x), ours(x, inference)) < OTHER_PROGRAM
        assert 0 < (latents > 0).float().mean() < 1


# --- what fastsae writes ---


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_saelens_loads_what_is_saved(tmp_path, normalize, inference):
    sae = small_sae(normalize=normalize)
    # The layout of a hub repository: one folder per SAE.
    fastsae.save(sae, tmp_path / "release" / "layer_3", inference)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "release" / "layer_3")
    expected = {"topk": sae_lens.TopKSAE, "threshold": sae_lens.JumpReLUSAE}[inference]
    assert type(theirs) is expected
    assert_same_function(theirs, sae, inference)


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_saelens_loads_a_matryoshka_sae_and_keeps_its_levels(tmp_path, inference):
    details = {"k": 3.6, "matryoshka_widths": [5, 17, 40]}
    metadata = {"training_architecture": "matryoshka_batchtopk"}
    sae = small_sae(metadata=MODEL | metadata | {"training_architecture_details": details})
    fastsae.save(sae, tmp_path / "ours", inference)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert_same_function(theirs, sae, inference)
    assert theirs.cfg.metadata.training_architecture_details == details
    theirs.save_model(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = fastsae.load(tmp_path / folder)
        assert again.levels == (5, 17, 40) and again.k == 3.6 and again.metadata == sae.metadata


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_every_format_keeps_levels_and_refuses_impossible_ones(tmp_path, format):
    details = {"matryoshka_widths": [5, 17, 40]}
    sae = small_sae(metadata={"training_architecture_details": details})
    fastsae.save(sae, tmp_path, format=format)
    assert fastsae.load(tmp_path).levels == (5, 17, 40)
    details["matryoshka_widths"] = [5, 17]
    fastsae.save(sae, tmp_path, format=format)
    with pytest.raises(fastsae.FormatError, match="ends with 17, but the dictionary has 40"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("k, per_token", [(0.3, 1), (2.5, 2), (3.6, 4), (40, 40)])
def test_topk_form_keeps_k_rounded_latents_per_token(tmp_path, k, per_token):
    sae = small_sae(k=k)
    fastsae.save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.k == per_token and type(theirs.cfg.k) is int
    assert_same_function(theirs, sae, "topk")


@pytest.mark.parametrize(
    "activation", [TopK(5), JumpReLU(torch.rand(40)), JumpReLU(torch.tensor(0.7))]
)
def test_other_activations_are_saved_as_they_are(tmp_path, activation):
    sae = small_sae(k=None, activation=activation, normalize="scalar")
    fastsae.save(sae, tmp_path)
    assert_same_function(sae_lens.SAE.load_from_disk(tmp_path), sae)
    assert_same_function(sae_lens.SAE.load_from_disk(tmp_path), fastsae.load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_saelens_loads_other_dtypes(tmp_path, dtype, inference):
    sae = small_sae(dtype=dtype)
    fastsae.save(sae, tmp_path, inference)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    # Not the latents: in 16 bits equal pre-activations are common, and torch.topk breaks ties freely.
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert getattr(theirs, name).dtype == dtype
        assert torch.equal(getattr(theirs, name), getattr(sae, name))
    if inference == "threshold":
        assert torch.equal(theirs.threshold, sae.threshold.to(dtype).expand(40))


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_metadata_reaches_saelens(tmp_path, inference):
    sae = small_sae(normalize="scalar")
    fastsae.save(sae, tmp_path, inference)
    metadata = sae_lens.SAE.load_from_disk(tmp_path).cfg.metadata
    expected = MODEL | {"hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "model.layers.3"}
    for name, value in expected.items():
        assert metadata[name] == value
    assert metadata.training_architecture == "batchtopk"
    assert metadata.training_architecture_details == {"k": 3.6}
    assert metadata.sae_lens_training_version is None
    # SAELens's evaluation unpacks these without asking whether they are there.
    assert metadata.model_from_pretrained_kwargs == {} and metadata.seqpos_slice == [None]
    assert metadata.fastsae["k"] == 3.6
    assert metadata.fastsae["threshold"] == sae.threshold.item()
    assert metadata.fastsae["threshold_updates"] == 123
    assert metadata.fastsae["inference"] == inference
    assert metadata.fastsae["fastsae_version"] == fastsae.__version__


@pytest.mark.parametrize(
    ("hook", "written"),
    [
        ("model.language_model.layers.17", "blocks.17.hook_resid_post"),
        ("transformer.h.2", "blocks.2.hook_resid_post"),
        ("blocks.4.hook_resid_pre", "blocks.4.hook_resid_pre"),
        ("model.layers.17.mlp", "model.layers.17.mlp"),
    ],
)
def test_the_hook_has_transformerlens_name_and_comes_back_as_the_path(tmp_path, hook, written):
    fastsae.save(small_sae(metadata={"hook_name": hook}), tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == written
    assert metadata.get("hf_hook_name", hook) == hook
    assert fastsae.load(tmp_path).metadata == {"hook_name": hook}
    # What was written before has the path alone; what is edited since has the last word.
    config = json.loads((tmp_path / "cfg.json").read_text())
    for edited in ({"hook_name": hook}, {"hook_name": "blocks.9.hook_resid_post"}):
        config["metadata"] = metadata | edited
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        assert fastsae.load(tmp_path).hook_name == edited["hook_name"]


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_an_sae_that_saelens_saved_again_comes_back(tmp_path, inference):
    sae = small_sae(normalize="scalar")
    fastsae.save(sae, tmp_path / "ours", inference)
    sae_lens.SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    again = fastsae.load(tmp_path / "theirs")
    assert isinstance(again.activation, BatchTopK) and again.k == 3.6
    assert again.inference == inference and again.threshold == sae.threshold
    assert again.metadata == MODEL


def test_the_format_is_the_one_of_the_installed_saelens(tmp_path):
    """Every setting SAELens writes for such an SAE is written, and nothing it does not know."""
    for inference, config in (
        ("topk", sae_lens.TopKSAEConfig),
        ("threshold", sae_lens.JumpReLUSAEConfig),
    ):
        fastsae.save(small_sae(), tmp_path, inference)
        written = json.loads((tmp_path / "cfg.json").read_text())
        known = {field.name for field in dataclasses.fields(config)} | {"architecture"}
        assert set(written) == known
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        assert set(load_file(tmp_path / "sae_weights.safetensors")) == set(theirs.state_dict())


# --- what SAELens writes ---


def saelens_sae(architecture: str, seed: int = 3, **settings):
    """An inference SAE of SAELens with random parameters and decoder rows of differing norms."""
    sae_class, config_class = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    }[architecture]
    sae = sae_class(config_class(d_in=12, d_sae=40, **settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if architecture == "jumprelu":
        # Some are below 0, where SAELens's ReLU still holds.
        sae.threshold.copy_(torch.randn(40, generator=generator))
    return sae


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "architecture, settings, activation",
    [
        ("standard", {}, JumpReLU),
        ("topk", {"k": 5}, TopK),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}, TopK),
        ("jumprelu", {}, JumpReLU),
    ],
)
def test_reads_saelens_saes(
    tmp_path, architecture, settings, activation, normalize, apply_b_dec_to_input
):
    theirs = saelens_sae(
        architecture,
        normalize_activations=normalize,
        apply_b_dec_to_input=apply_b_dec_to_input,
        **settings,
    )
    theirs.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs.save_model(tmp_path)
    ours = fastsae.load(tmp_path)
    assert type(ours.activation) is activation and not ours.training
    assert ours.hook_name == "blocks.2.hook_resid_post"
    assert_same_function(theirs, ours)


def trained(config) -> "sae_lens.TrainingSAE":
    """A SAELens training SAE after a few steps of its own forward pass, with moved parameters."""
    sae = sae_lens.TrainingSAE.from_dict(config.to_dict())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(noise.abs() if name == "threshold" else noise)
    coefficients = {name: 1.0 for name in sae.get_coefficients()}
    for step in range(3):
        rows = activations(50, 12, seed=step)
        sae.training_forward_pass(
            sae_lens.saes.sae.TrainStepInput(rows, coefficients, None, step, False)
        )
    return sae


@pytest.mark.parametrize(
    "config, activation",
    [
        (sae_lens.StandardTrainingSAEConfig(d_in=12, d_sae=40), JumpReLU),
        (sae_lens.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=5), TopK),
        (sae_lens.JumpReLUTrainingSAEConfig(d_in=12, d_sae=40), JumpReLU),
        (sae_lens.BatchTopKTrainingSAEConfig(d_in=12, d_sae=40, k=4.5), BatchTopK),
        (
            sae_lens.BatchTopKTrainingSAEConfig(
                d_in=12, d_sae=40, k=4.5, rescale_acts_by_decoder_norm=False
            ),
            BatchTopK,
        ),
        (
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
                d_in=12, d_sae=40, k=4.5, matryoshka_widths=[5, 40]
            ),
            BatchTopK,
        ),
    ],
)
def test_reads_what_saelens_trains(tmp_path, config, activation):
    training = trained(config)
    training.save_inference_model(tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), fastsae.load(tmp_path)
    assert type(ours.activation) is activation
    assert_same_function(theirs, ours)
    assert ours.levels == tuple(getattr(config, "matryoshka_widths", (40,)))
    if activation is BatchTopK:
        assert ours.k == 4.5 and ours.inference == "threshold"
        assert ours.threshold > 0 and ours.threshold.dtype == torch.float32
        # What it says of its training is kept, and written again.
        assert ours.metadata["training_architecture_details"]["topk_threshold_lr"] == 0.01
        fastsae.save(ours, tmp_path / "again")
        assert_same_function(sae_lens.SAE.load_from_disk(tmp_path / "again"), ours)


def test_training_checkpoint_of_saelens_is_refused(tmp_path):
    trained(sae_lens.BatchTopKTrainingSAEConfig(d_in=12, d_sae=40, k=4.5)).save_model(tmp_path)
    with pytest.raises(fastsae.FormatError, match="write the SAE with save_inference_model"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"normalize_activations": "constant_norm_rescale"}, "fastsae reads 'none'"),
        ({"normalize_activations": "expected_average_only_in"}, "folds scaling"),
        ({"normalize_activations": "covariance_whitening"}, "whitening by constants"),
        ({"reshape_activations": "hook_z"}, "flatten the heads"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(tmp_path, settings, message):
    saelens_sae("jumprelu", **settings).save_model(tmp_path)
    with pytest.raises(fastsae.FormatError, match=message):
        fastsae.load(tmp_path)


def test_other_architectures_are_refused(tmp_path):
    sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=12, d_sae=40)).save_model(tmp_path)
    with pytest.raises(fastsae.FormatError, match="architecture = 'gated'"):
        fastsae.load(tmp_path)


def test_zero_decoder_row_under_rescaling_is_refused(tmp_path):
    theirs = saelens_sae("topk", k=5, rescale_acts_by_decoder_norm=True)
    theirs.W_dec[7] = 0
    theirs.save_model(tmp_path)
    with pytest.raises(fastsae.FormatError, match="decoder row 7 is zero"):
        fastsae.load(tmp_path)


def test_edits_made_in_saelens_win_over_provenance(tmp_path):
    sae = small_sae()
    fastsae.save(sae, tmp_path / "topk", "topk")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "topk")
    theirs.cfg.k = 7
    theirs.save_model(tmp_path / "k")
    assert fastsae.load(tmp_path / "k").k == 7
    assert isinstance(fastsae.load(tmp_path / "k").activation, TopK)

    fastsae.save(sae, tmp_path / "threshold", "threshold")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "threshold")
    theirs.threshold.mul_(2)
    theirs.save_model(tmp_path / "doubled")
    assert fastsae.load(tmp_path / "doubled").threshold == 2 * sae.threshold
    theirs.threshold[3] = 9
    theirs.save_model(tmp_path / "uneven")
    ours = fastsae.load(tmp_path / "uneven")
    assert isinstance(ours.activation, JumpReLU)
    assert_same_function(theirs, ours)
