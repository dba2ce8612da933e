"""dictionary_learning's and sparsify's formats: held to their definitions, and to the packages.

The definitions, in plain torch, always run; the packages are compared where they are installed.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_saes import activations, largest_difference, small_sae
from tolerances import OTHER_PROGRAM
from torch import Tensor
from torch.nn.functional import linear, relu

import fastsae
from fastsae import SAE, BatchTopK, ConfigError, JumpReLU, TopK
from fastsae.lm.hooks import site_of


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dictionary_learning():
    pytest.importorskip("dictionary_learning")
    import dictionary_learning.trainers.batch_top_k
    import dictionary_learning.trainers.top_k
    import dictionary_learning.utils

    return dictionary_learning


@pytest.fixture(scope="module")
def sparsify():
    # Read when it is imported; its Triton decoder needs a GPU wherever Triton is installed.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return pytest.importorskip("sparsify")


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]):
    latents = expected[0]
    assert 0 < (latents > 0).float().mean() < 1
    for a, b in zip(found, expected, strict=True):
        assert largest_difference(a, b) < OTHER_PROGRAM


def ours(sae: SAE, x: Tensor, inference=None) -> tuple[Tensor, Tensor]:
    return sae.encode(x, inference), sae(x, inference)


def keep_topk(latents: Tensor, k: int) -> Tensor:
    top = latents.topk(k, dim=-1)
    return torch.zeros_like(latents).scatter(-1, top.indices, top.values)


# --- dictionary_learning ---


def dictionary_by_definition(state: dict[str, Tensor], dict_class: str, x: Tensor):
    """Latents and reconstruction of ``AutoEncoderTopK`` or ``BatchTopKSAE``."""
    latents = relu(linear(x - state["b_dec"], state["encoder.weight"], state["encoder.bias"]))
    if dict_class == "AutoEncoderTopK":
        latents = keep_topk(latents, int(state["k"]))
    else:
        latents = latents * (latents > state["threshold"])
    return latents, linear(latents, state["decoder.weight"]) + state["b_dec"]


DICT_CLASS = {"topk": "AutoEncoderTopK", "threshold": "BatchTopKSAE"}


@pytest.mark.parametrize("shape", [(50, 12), (4, 9, 12)])
@pytest.mark.parametrize("normalize", ["scalar", "none"])
@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_dictionary_learning_files_by_definition(tmp_path, normalize, inference, shape):
    sae, x = small_sae(normalize=normalize), activations(*shape)
    fastsae.save(sae, tmp_path, inference, format="dictionary_learning")
    config = json.loads((tmp_path / "config.json").read_text())
    trainer = config["trainer"]
    assert trainer["dict_class"] == DICT_CLASS[inference]
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["k"]) == (12, 40, 4)
    assert (trainer["lm_name"], trainer["layer"]) == ("some/model", 3)
    assert config["buffer"]["ctx_len"] == 128
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert_close(dictionary_by_definition(state, trainer["dict_class"], x), ours(sae, x, inference))


@pytest.mark.parametrize("shape", [(50, 12), (4, 9, 12)])
@pytest.mark.parametrize("normalize", ["scalar", "none"])
@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_dictionary_learning_loads_what_is_saved(
    tmp_path, dictionary_learning, normalize, inference, shape
):
    sae, x = small_sae(normalize=normalize), activations(*shape)
    fastsae.save(sae, tmp_path, inference, format="dictionary_learning")
    theirs, _ = dictionary_learning.utils.load_dictionary(str(tmp_path), "cpu")
    assert type(theirs).__name__ == DICT_CLASS[inference]
    assert_close((theirs.encode(x), theirs(x)), ours(sae, x, inference))
    if inference == "topk":
        # Its top-k class selects by the threshold on request.
        assert_close(
            (theirs.encode(x, use_threshold=True), theirs(x)),
            (sae.encode(x, "threshold"), sae(x, "topk")),
        )


def write_dictionary(directory, dict_class: str, threshold: float = 0.6, **changes):
    """The files that dictionary_learning's trainSAE leaves, written by hand."""
    generator = torch.Generator().manual_seed(4)
    state = {
        "b_dec": torch.randn(12, generator=generator),
        "k": torch.tensor(5, dtype=torch.int),
        "threshold": torch.tensor(threshold),
        "decoder.weight": torch.randn(12, 40, generator=generator),
        "encoder.weight": torch.randn(40, 12, generator=generator),
        "encoder.bias": torch.randn(40, generator=generator),
    }
    trainer = {
        "dict_class": dict_class,
        "activation_dim": 12,
        "dict_size": 40,
        "k": 5,
        "lm_name": "EleutherAI/pythia-70m",
        "layer": 3,
    }
    trainer |= {name: value for name, value in changes.items() if name in trainer}
    state |= {name: value for name, value in changes.items() if name not in trainer}
    state = {name: value for name, value in state.items() if value is not None}
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "ae.pt")
    config = {"trainer": trainer, "buffer": {"ctx_len": 64}}
    (directory / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.6])
@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_reads_dictionary_learning_by_definition(tmp_path, dict_class, threshold):
    state, x = write_dictionary(tmp_path, dict_class, threshold), activations(50, 12)
    sae = fastsae.load(tmp_path)
    assert_close(ours(sae, x), dictionary_by_definition(state, dict_class, x))
    assert sae.k == 5 and not sae.training
    assert sae.metadata == {"model_name": "EleutherAI/pythia-70m", "context_size": 64}
    if dict_class == "BatchTopKSAE":
        assert isinstance(sae.activation, BatchTopK) and sae.inference == "threshold"
        assert sae.threshold == torch.tensor(max(threshold, 0))
    else:
        assert isinstance(sae.activation, TopK)


@pytest.mark.parametrize(
    ("submodule", "io", "hook", "layer"),
    [
        ("resid_post_layer_3", "out", "resid_post_layer_3", 3),
        ("gpt_neox.layers.3", None, "gpt_neox.layers.3", 3),
        ("gpt_neox.layers.3", "in", "blocks.3.hook_resid_pre", 3),
        ("gpt_neox.layers.3.mlp", "in", "gpt_neox.layers.3.mlp.input", 3),
        ("mlp_out_layer_3", "out", "mlp_out_layer_3", None),
        ("gpt_neox.layers.3", "in_and_out", "gpt_neox.layers.3, in_and_out", None),
    ],
)
def test_dictionary_learning_says_which_module_it_read(tmp_path, submodule, io, hook, layer):
    write_dictionary(tmp_path, "BatchTopKSAE")
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"]["submodule_name"] = submodule
    config["buffer"] |= {"io": io}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = fastsae.load(tmp_path)
    assert sae.hook_name == hook
    if layer is None:
        with pytest.raises(ConfigError, match="is not a place in a decoder layer"):
            site_of(sae.hook_name)
    else:
        assert site_of(sae.hook_name).layer == layer


@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_reads_dictionary_learning_as_it_does(tmp_path, dictionary_learning, dict_class):
    write_dictionary(tmp_path, dict_class)
    theirs, _ = dictionary_learning.utils.load_dictionary(str(tmp_path), "cpu")
    x = activations(50, 12)
    assert_close(ours(fastsae.load(tmp_path), x), (theirs.encode(x), theirs(x)))


def test_reads_what_dictionary_learning_trains(tmp_path, dictionary_learning):
    """After a few steps of its own trainer, saved as its trainSAE saves."""
    trainer = dictionary_learning.trainers.batch_top_k.BatchTopKTrainer(
        steps=4, activation_dim=12, dict_size=40, k=5, layer=3, lm_name="some/model", device="cpu",
        threshold_start_step=0, warmup_steps=0, seed=0,
    )  # fmt: skip
    with torch.enable_grad():
        for step in range(4):
            trainer.update(step, activations(50, 12, seed=step))
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    sae, x = fastsae.load(tmp_path), activations(50, 12)
    assert sae.threshold > 0
    assert_close(ours(sae, x), (trainer.ae.encode(x), trainer.ae(x)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dict_class": "GatedAutoEncoder"}, "dict_class = 'GatedAutoEncoder'.*AutoEncoderTopK"),
        ({"dict_size": 41}, "dict_size = 41 but ae.pt has 40"),
        ({"k": 6}, "k = 6 but ae.pt has 5"),
        ({"threshold": None}, "lack threshold"),
        ({"encoder.weight": None}, "lack encoder.weight"),
        ({"encoder.weight": torch.zeros(40)}, r"encoder.weight has shape \(40,\)"),
        (
            {"decoder.weight": torch.zeros(40, 12)},
            r"decoder.weight has shape \(40, 12\).*\(12, 40\)",
        ),
        ({"b_dec": torch.full((12,), torch.nan)}, "b_dec has 12 of 12 values that are not finite"),
        ({"threshold": torch.zeros(40)}, r"threshold has shape \(40,\), expected \(\)"),
        ({"group_sizes": torch.ones(2)}, "group_sizes besides"),
        ({"optimizer": {"state": {}}}, "'optimizer' that are not tensors, as a training backup"),
    ],
)
def test_damaged_dictionaries_are_refused(tmp_path, changes, message):
    if isinstance(changes.get("threshold"), Tensor) or "threshold" in changes:
        write_dictionary(tmp_path, "BatchTopKSAE")
        state = torch.load(tmp_path / "ae.pt") | changes
        torch.save({n: v for n, v in state.items() if v is not None}, tmp_path / "ae.pt")
    else:
        write_dictionary(tmp_path, **{"dict_class": "BatchTopKSAE", **changes})
    with pytest.raises(fastsae.FormatError, match=message):
        fastsae.load(tmp_path)


def test_impossible_k_is_refused(tmp_path):
    for k in (0, 41):
        write_dictionary(tmp_path, "AutoEncoderTopK", k=k)
        state = torch.load(tmp_path / "ae.pt") | {"k": torch.tensor(k, dtype=torch.int)}
        torch.save(state, tmp_path / "ae.pt")
        with pytest.raises(fastsae.FormatError, match=f"k = {k} active latents of d_sae = 40"):
            fastsae.load(tmp_path)


def test_what_dictionary_learning_cannot_hold_is_refused(tmp_path):
    for sae, inference, message in (
        (small_sae(normalize="layer_norm"), "topk", "no place for normalize = 'layer_norm'"),
        (small_sae(normalize="layer_norm"), "threshold", "no place for normalize = 'layer_norm'"),
        (small_sae(k=None, activation=JumpReLU(torch.rand(40))), None, "has no k"),
    ):
        with pytest.raises(fastsae.FormatError, match=message):
            fastsae.save(sae, tmp_path / "sae", inference, format="dictionary_learning")
        assert not (tmp_path / "sae").exists()


def test_untracked_threshold_is_marked_unknown(tmp_path):
    sae = small_sae()
    sae.activation.threshold_updates.zero_()
    fastsae.save(sae, tmp_path / "batch", "topk", format="dictionary_learning")
    assert torch.load(tmp_path / "batch" / "ae.pt")["threshold"] == -1
    fastsae.save(
        small_sae(k=None, activation=TopK(5)), tmp_path / "token", format="dictionary_learning"
    )
    assert torch.load(tmp_path / "token" / "ae.pt")["threshold"] == -1


# --- sparsify ---


def sparse_coder_by_definition(tensors: dict[str, Tensor], k: int, x: Tensor):
    """Dense latents and reconstruction of sparsify's top-k ``SparseCoder``."""
    pre = linear(x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"])
    latents = keep_topk(relu(pre), k)
    return latents, latents @ tensors["W_dec"] + tensors["b_dec"]


@pytest.mark.parametrize("normalize", ["scalar", "none"])
def test_sparsify_files_by_definition(tmp_path, normalize):
    sae, x = small_sae(normalize=normalize), activations(50, 12)
    fastsae.save(sae, tmp_path, format="sparsify")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"]) == (12, 40, 4)
    tensors = load_file(tmp_path / "sae.safetensors")
    assert tensors["W_dec"].shape == tensors["encoder.weight"].shape == (40, 12)
    assert_close(sparse_coder_by_definition(tensors, 4, x), ours(sae, x))


@pytest.mark.parametrize("normalize", ["scalar", "none"])
def test_sparsify_loads_what_is_saved(tmp_path, sparsify, normalize):
    sae, x = small_sae(normalize=normalize), activations(50, 12)
    # The layout of its runs: one folder per hook point.
    fastsae.save(sae, tmp_path / "layers.3", format="sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.3")
    assert theirs.cfg.k == 4 and theirs.num_latents == 40
    found = theirs.encode(x)
    latents = torch.zeros(50, 40).scatter(-1, found.top_indices, found.top_acts)
    assert_close((latents, theirs(x).sae_out), ours(sae, x))


def write_sparse_coder(directory, **changes):
    """The files that sparsify's save_to_disk leaves, written by hand."""
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "encoder.weight": torch.randn(36, 12, generator=generator),
        "encoder.bias": torch.randn(36, generator=generator),
        "W_dec": torch.randn(36, 12, generator=generator),
        "b_dec": torch.randn(12, generator=generator),
    }
    config = {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 5,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": 12,
    }
    for name, value in changes.items():
        (tensors if isinstance(value, Tensor) or name in tensors else config)[name] = value
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, directory / "sae.safetensors")
    (directory / "cfg.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("num_latents", [0, 36])
def test_reads_sparsify_by_definition(tmp_path, num_latents):
    tensors, x = write_sparse_coder(tmp_path, num_latents=num_latents), activations(50, 12)
    sae = fastsae.load(tmp_path)
    assert isinstance(sae.activation, TopK) and sae.k == 5 and sae.d_sae == 36
    assert_close(ours(sae, x), sparse_coder_by_definition(tensors, 5, x))


def test_sparsify_says_which_module_it_read_by_the_folder(tmp_path):
    for folder, hook in (
        ("layers.3", "layers.3"),
        ("layers.3.mlp", "layers.3.mlp"),
        ("my.3", None),
    ):
        fastsae.save(small_sae(metadata={}), tmp_path / folder, "topk", format="sparsify")
        assert fastsae.load(tmp_path / folder).hook_name == hook


def test_reads_what_sparsify_saves(tmp_path, sparsify):
    coder = sparsify.SparseCoder(12, sparsify.SparseCoderConfig(expansion_factor=3, k=5))
    for parameter in coder.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    coder.save_to_disk(tmp_path)
    x = activations(50, 12)
    found = coder.encode(x)
    latents = torch.zeros(50, 36).scatter(-1, found.top_indices, found.top_acts)
    assert_close(ours(fastsae.load(tmp_path), x), (latents, coder(x).sae_out))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "groupmax"}, "activation = 'groupmax'.*plain top-k autoencoders"),
        ({"transcode": True}, "transcode = True"),
        ({"skip_connection": True}, "skip_connection = True"),
        ({"signed": True}, "signed = True"),
        ({"W_skip": torch.zeros(12, 12)}, "hold W_skip besides"),
        ({"k": 4.5}, "k is 4.5, expected a whole number"),
        ({"k": True}, "k is True, expected a whole number"),
        ({"k": 37}, "k = 37 active latents of d_sae = 36"),
        ({"d_in": None}, "d_in is None"),
        ({"num_latents": 40}, r"encoder.weight has shape \(36, 12\), expected \(40, 12\)"),
        ({"W_dec": torch.zeros(12, 36)}, r"W_dec has shape \(12, 36\), expected \(36, 12\)"),
        ({"W_dec": None}, "lack W_dec"),
        ({"b_dec": torch.full((12,), torch.inf)}, "b_dec has 12 of 12 values that are not finite"),
    ],
)
def test_other_sparse_coders_are_refused(tmp_path, changes, message):
    write_sparse_coder(tmp_path, **changes)
    with pytest.raises(fastsae.FormatError, match=message):
        fastsae.load(tmp_path)


def test_what_sparsify_cannot_hold_is_refused(tmp_path):
    for sae, inference, message in (
        (small_sae(), "threshold", "no thresholds"),
        (small_sae(k=None, activation=JumpReLU(torch.tensor(0.5))), None, "no thresholds"),
        (small_sae(normalize="layer_norm"), "topk", "no place for normalize = 'layer_norm'"),
    ):
        with pytest.raises(fastsae.FormatError, match=message):
            fastsae.save(sae, tmp_path / "sae", inference, format="sparsify")
        assert not (tmp_path / "sae").exists()
