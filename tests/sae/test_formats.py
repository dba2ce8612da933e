"""Saving and loading: round trips, equal bytes, whole files, and refusals that say why."""

import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import huggingface_hub.utils
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_saes import MODEL, activations, largest_difference, small_sae
from tolerances import FOLDED_FLOAT64, OTHER_PROGRAM
from torch import Tensor, nn

import fastsae
from fastsae import SAE, BatchTopK, ConfigError, FormatError, JumpReLU, TopK
from fastsae.sae import io as formats

FILES = {
    "saelens": ("cfg.json", "sae_weights.safetensors", "sae_weights.pt"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
}
FORMS = [
    ("saelens", "topk"),
    ("saelens", "threshold"),
    ("dictionary_learning", "topk"),
    ("dictionary_learning", "threshold"),
    ("sparsify", "topk"),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_json(path: Path, **changes) -> None:
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, **changes: Tensor | None) -> None:
    tensors = load_file(directory / "sae_weights.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        directory / "sae_weights.safetensors",
    )


# --- round trips ---


@st.composite
def saes(draw) -> SAE:
    d_in, d_sae = draw(st.integers(2, 9)), draw(st.integers(1, 20))
    return small_sae(
        d_in,
        d_sae,
        k=draw(st.one_of(st.integers(1, d_sae), st.floats(0.01, d_sae))),
        normalize=draw(st.sampled_from(["scalar", "none", "layer_norm"])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 1000)),
        metadata=draw(
            st.dictionaries(
                st.sampled_from([*MODEL, "seqpos_slice", "training_architecture", "note"]),
                st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans())),
            )
        ),
    )


@given(sae=saes(), form=st.sampled_from(FORMS))
@settings(deadline=None, max_examples=120)
@pytest.mark.slow
def test_what_is_saved_comes_back(tmp_path_factory, sae, form):
    format, inference = form
    directory = tmp_path_factory.mktemp("sae")
    if sae.normalize == "layer_norm" and format != "saelens":
        with pytest.raises(FormatError, match="layer_norm"):
            fastsae.save(sae, directory, inference, format=format)
        return
    assert fastsae.save(sae, directory, inference, format=format) == directory
    again = fastsae.load(directory)

    assert isinstance(again.activation, BatchTopK) and not again.training
    assert again.k == sae.k and again.inference == inference
    assert again.activation.threshold_updates == sae.activation.threshold_updates
    assert again.metadata == sae.metadata
    assert again.normalize == ("none" if sae.normalize == "scalar" else sae.normalize)
    assert torch.equal(again.W_enc, sae.W_enc) and torch.equal(again.W_dec, sae.W_dec)
    assert again.W_enc.T.is_contiguous() and again.W_dec.is_contiguous()

    untouched = sae.normalize != "scalar"
    if untouched:
        assert torch.equal(again.threshold, sae.threshold)
    x = activations(11, sae.d_in, dtype=sae.W_enc.dtype)
    for mode in ("topk", "threshold", "batch"):
        before = sae.encode(x, mode), sae(x, mode)
        after = again.encode(x, mode), again(x, mode)
        if untouched:
            assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
        elif sae.W_enc.dtype == torch.float64:
            # In fp32 folding could move a pre-activation across the threshold.
            assert torch.allclose(after[0], before[0], rtol=0, atol=FOLDED_FLOAT64 * 100)
            assert largest_difference(after[1], before[1]) < FOLDED_FLOAT64
    # And once more, without any loss.
    before = contents(directory)
    fastsae.save(again, directory, format=format)
    assert contents(directory) == before


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_folding_scalar_scaling_keeps_outputs(tmp_path, inference):
    sae = small_sae(16, 64, normalize="scalar")
    again = fastsae.load(fastsae.save(sae, tmp_path, inference))
    x = activations(6, 50, 16)
    for mode in ("topk", "threshold", "batch"):
        assert largest_difference(again.encode(x, mode), sae.encode(x, mode)) < OTHER_PROGRAM
        assert largest_difference(again(x, mode), sae(x, mode)) < OTHER_PROGRAM
    assert largest_difference(again.threshold, sae.threshold) < OTHER_PROGRAM


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format, inference", FORMS)
def test_other_dtypes_come_back(tmp_path, format, inference, dtype):
    sae = small_sae(dtype=dtype)
    again = fastsae.load(fastsae.save(sae, tmp_path, inference, format=format))
    x = activations(30, 12, dtype=dtype)
    for mode in ("topk", "threshold"):
        assert again.encode(x, mode).dtype == dtype
        assert torch.equal(again.encode(x, mode), sae.encode(x, mode))


@pytest.mark.parametrize(
    "activation", [TopK(5), JumpReLU(torch.rand(40)), JumpReLU(torch.tensor(0.7))]
)
def test_other_activations_come_back(tmp_path, activation):
    sae = small_sae(k=None, activation=activation, normalize="layer_norm")
    again = fastsae.load(fastsae.save(sae, tmp_path))
    x = activations(30, 12)
    assert type(again.activation) is type(activation)
    assert torch.equal(again(x), sae(x)) and again.metadata == MODEL


def test_default_is_the_saes_own_mode(tmp_path):
    sae = small_sae(inference="threshold")
    assert fastsae.load(fastsae.save(sae, tmp_path / "own")).inference == "threshold"
    assert fastsae.load(fastsae.save(sae, tmp_path / "asked", "topk")).inference == "topk"
    sae.inference = "batch"
    with pytest.raises(FormatError, match="save with inference='topk' or 'threshold'"):
        fastsae.save(sae, tmp_path / "batch")
    assert not (tmp_path / "batch").exists()


def test_the_pt_file_alone_is_read(tmp_path):
    sae = small_sae()
    fastsae.save(sae, tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    assert torch.equal(fastsae.load(tmp_path).W_enc, sae.W_enc)


def test_loading_does_not_touch_the_callers_random_numbers(tmp_path):
    fastsae.save(small_sae(), tmp_path)
    state = torch.get_rng_state()
    fastsae.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_sae_can_be_trained_on_after_loading(tmp_path):
    sae = fastsae.load(fastsae.save(small_sae(), tmp_path)).train()
    with torch.enable_grad():
        sae.loss(activations(50, 12)).loss.backward()
    assert sae.W_enc.grad is not None and sae.activation.threshold_updates == 124


# --- what is written ---


@pytest.mark.parametrize("normalize", ["scalar", "none"])
@pytest.mark.parametrize("format, inference", FORMS)
def test_saving_leaves_the_sae_as_it_is(tmp_path, format, inference, normalize):
    sae, before = small_sae(normalize=normalize), small_sae(normalize=normalize).state_dict()
    sae.train()
    fastsae.save(sae, tmp_path, inference, format=format)
    after = sae.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (sae.normalize, sae.inference, sae.training) == (normalize, "topk", True)
    assert sae.metadata == MODEL


@pytest.mark.parametrize("format, inference", FORMS)
def test_equal_saes_give_equal_bytes(tmp_path, format, inference):
    first = contents(fastsae.save(small_sae(normalize="scalar"), tmp_path / "a", inference, format))
    second = contents(
        fastsae.save(small_sae(normalize="scalar"), tmp_path / "b", inference, format)
    )
    assert first == second and set(first) == set(FILES[format])
    # An earlier SAE in the folder, or a longer file, leaves nothing behind.
    fastsae.save(small_sae(30, 90), tmp_path / "c", "topk", format)
    third = fastsae.save(small_sae(normalize="scalar"), tmp_path / "c", inference, format)
    assert contents(third) == first


@pytest.mark.parametrize(
    "format, name", [("saelens", "sae_weights"), ("dictionary_learning", "ae")]
)
def test_pt_files_hold_neither_times_nor_temporary_names(tmp_path, format, name):
    fastsae.save(small_sae(), tmp_path, format=format)
    with zipfile.ZipFile(tmp_path / f"{name}.pt") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 0, 0, 0, 0, 0)}
        assert {entry.filename.partition("/")[0] for entry in archive.infolist()} == {name}


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_saelens_weights(tmp_path, inference):
    sae = small_sae(normalize="scalar")
    fastsae.save(sae, tmp_path, inference)
    safe = load_file(tmp_path / "sae_weights.safetensors")
    pickled = torch.load(tmp_path / "sae_weights.pt", weights_only=True)
    shapes = {"W_enc": (12, 40), "W_dec": (40, 12), "b_enc": (40,), "b_dec": (12,)}
    if inference == "threshold":
        shapes["threshold"] = (40,)
        assert torch.equal(safe["threshold"], sae.threshold.expand(40))
    assert {name: tuple(tensor.shape) for name, tensor in safe.items()} == shapes
    assert list(pickled) == list(shapes)
    for name in shapes:
        assert pickled[name].is_contiguous() and torch.equal(pickled[name], safe[name])
    assert torch.equal(safe["W_enc"], sae.W_enc) and torch.equal(safe["W_dec"], sae.W_dec)
    assert torch.equal(safe["b_dec"], sae.b_dec / sae.scale)
    assert torch.equal(safe["b_enc"], sae.b_enc / sae.scale)


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path):
    sae = small_sae()
    expected = contents(fastsae.save(sae, tmp_path / "plain"))
    shared = torch.zeros(1000, 12)
    shared[:40], shared[40:80] = sae.W_dec, sae.W_enc.T
    sae.W_dec, sae.W_enc = nn.Parameter(shared[:40]), nn.Parameter(shared[40:80].T)
    assert contents(fastsae.save(sae, tmp_path / "view")) == expected


def test_files_are_for_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        fastsae.save(small_sae(), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes.values()) == {"-rw-r-----"}, modes


def test_some_files_alone(tmp_path):
    files = ("cfg.json", "sae_weights.safetensors")
    fastsae.save(small_sae(), tmp_path, files=files)
    assert set(contents(tmp_path)) == set(files)
    assert fastsae.load(tmp_path).k == 3.6


def test_what_cannot_be_saved_is_refused(tmp_path):
    class Other(nn.Module):
        def forward(self, pre):
            return pre.relu()

    diverged = small_sae()
    diverged.b_enc[3] = torch.nan
    no_threshold = small_sae()
    no_threshold.activation.threshold.fill_(torch.inf)
    mixed = small_sae()
    mixed.b_dec.data = mixed.b_dec.data.half()
    cases = [
        (small_sae(), {"format": "goodfire"}, "format = 'goodfire' is not one of 'saelens'"),
        (small_sae(), {"inference": "batch"}, "no format can hold"),
        (small_sae(), {"inference": "top"}, "cannot be saved with inference = 'top'"),
        (small_sae(k=None, activation=Other()), {}, "selects by Other"),
        (small_sae(k=None, activation=TopK(3)), {"inference": "threshold"}, "TopK as 'topk'"),
        (small_sae(k=None, activation=JumpReLU(torch.rand(40))), {"inference": "topk"}, "JumpReLU"),
        (diverged, {}, "b_enc has 1 of 40 values that are not finite"),
        (no_threshold, {}, "threshold has 1 of 1 values that are not finite"),
        (mixed, {}, "torch.float16, torch.float32.*all be one of"),
        (small_sae(metadata={"dataset": {1, 2}}), {}, "metadata cannot be written as JSON"),
        (small_sae(metadata={"loss": float("nan")}), {}, "metadata cannot be written as JSON"),
    ]
    for sae, settings_, message in cases:
        with pytest.raises(FormatError, match=message):
            fastsae.save(sae, tmp_path / "sae", **settings_)
        assert not (tmp_path / "sae").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="is a file; give a folder"):
        fastsae.save(small_sae(), tmp_path / "file")


def test_a_folder_keeps_to_one_format(tmp_path):
    fastsae.save(small_sae(), tmp_path, format="sparsify")
    before = contents(tmp_path)
    with pytest.raises(FormatError, match="already holds an SAE in sparsify format"):
        fastsae.save(small_sae(), tmp_path)
    assert contents(tmp_path) == before


# --- interruptions ---


@pytest.mark.parametrize(
    "failing", ["torch.save", "os.fsync", "fastsae.sae.formats.files.save_tensors"]
)
def test_a_failure_while_writing_leaves_the_old_sae(tmp_path, monkeypatch, failing):
    fastsae.save(small_sae(seed=1), tmp_path)
    before = contents(tmp_path)

    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        fastsae.save(small_sae(seed=2), tmp_path, "threshold")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interruption_while_replacing_is_noticed(tmp_path, monkeypatch, moved):
    """New weights never meet an old config: without cfg.json the folder is refused."""
    fastsae.save(small_sae(seed=1), tmp_path, "topk")
    replace, calls = os.replace, []

    def replace_some(source, target):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        fastsae.save(small_sae(seed=2), tmp_path, "threshold")
    assert set(contents(tmp_path)) == {"sae_weights.safetensors", "sae_weights.pt"}
    with pytest.raises(FormatError, match=r"cfg.json is missing; it must lie beside the weights"):
        fastsae.load(tmp_path)


# --- detection ---


def test_formats_are_detected(tmp_path):
    for format in FILES:
        fastsae.save(small_sae(), tmp_path / format, format=format)
        assert formats.detect_format(tmp_path / format) == format
        assert torch.equal(fastsae.load(str(tmp_path / format)).W_dec, small_sae().W_dec)
    assert fastsae.load is formats.load


def test_what_is_not_one_sae_is_refused(tmp_path):
    fastsae.save(small_sae(), tmp_path / "run" / "layer_3")
    with pytest.raises(FormatError, match=r"holds no SAE.*its folders layer_3 do, name one"):
        fastsae.load(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"none of sae_weights.safetensors, .*ae.pt.* is there$"):
        fastsae.load(tmp_path / "empty")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert fastsae.load(tmp_path / "run" / "layer_3" / name).d_sae == 40
    (tmp_path / "run" / "mine.pt").write_bytes(b"")
    with pytest.raises(
        FormatError, match="is a file of a name fastsae does not know.*sae.safetensors"
    ):
        fastsae.load(tmp_path / "run" / "mine.pt")
    with pytest.raises(FormatError, match="does not exist; give a folder"):
        fastsae.load(tmp_path / "nowhere")
    fastsae.save(small_sae(), tmp_path / "both")
    fastsae.save(small_sae(), tmp_path / "other", format="dictionary_learning")
    (tmp_path / "other" / "ae.pt").rename(tmp_path / "both" / "ae.pt")
    with pytest.raises(FormatError, match=r"several formats \(saelens, dictionary_learning\)"):
        fastsae.load(tmp_path / "both")


# --- damaged and foreign files ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": None}, "architecture = None; fastsae reads 'standard', 'topk'"),
        ({"architecture": "gated"}, "architecture = 'gated'"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "jumprelu"}, "lack threshold"),
        ({"metadata": None}, "SAELens of unknown version.*save it again"),
        ({"metadata": {"sae_lens_version": "5.11.0"}}, "SAELens 5.11.0; before 6.0"),
        ({"metadata": ["x"]}, "metadata is a list, expected an object"),
        ({"dtype": None}, "dtype = None in cfg.json is not one of float32"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"d_in": 13}, r"W_enc has shape \(12, 40\), expected \(13, 40\); config and weights"),
        ({"d_sae": "40"}, "d_sae is '40', expected a whole number of at least 1"),
        ({"d_in": 0}, "d_in is 0, expected a whole number"),
        ({"k": None}, "k is None, expected a whole number"),
        ({"k": 3.6}, "k is 3.6, expected a whole number"),
        ({"k": 41}, "k = 41 active latents of d_sae = 40 is not possible"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "fastsae reads 'none' and 'layer_norm'",
        ),
        ({"reshape_activations": "hook_z"}, "flatten the heads"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, changes, message):
    fastsae.save(small_sae(), tmp_path)
    edit_json(tmp_path / "cfg.json", **changes)
    with pytest.raises(FormatError, match=message) as error:
        fastsae.load(tmp_path)
    assert str(error.value).startswith(f"the saelens SAE in {tmp_path} cannot be read: ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b_enc": None}, "lack b_enc; they have W_dec, W_enc, b_dec, threshold"),
        ({"threshold": None}, "lack threshold"),
        ({"num_tokens_since_fired": torch.zeros(40)}, "hold num_tokens_since_fired besides"),
        (
            {"W_enc": torch.zeros(40, 12)},
            r"W_enc has shape \(40, 12\), expected \(12, 40\).*transposed",
        ),
        ({"threshold": torch.zeros(())}, r"threshold has shape \(\), expected \(40,\)"),
        (
            {"W_dec": torch.full((40, 12), torch.nan)},
            "W_dec has 480 of 480 values that are not finite",
        ),
        ({"threshold": torch.full((40,), torch.inf)}, "threshold has 40 of 40 values"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, changes, message):
    fastsae.save(small_sae(), tmp_path, "threshold")
    edit_weights(tmp_path, **changes)
    with pytest.raises(FormatError, match=message):
        fastsae.load(tmp_path)


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("k", "four", "'k' is 'four', expected a finite number"),
        ("k", 0, "k must be a finite number above 0"),
        ("threshold", -1.5, "'threshold' is -1.5, expected a finite number of at least 0"),
        ("threshold_updates", [1], r"'threshold_updates' is \[1\]"),
    ],
)
def test_damaged_provenance_is_refused(tmp_path, entry, value, message):
    fastsae.save(small_sae(), tmp_path, "threshold")
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["fastsae"][entry] = value
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message) as error:
        fastsae.load(tmp_path)
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x80"])
@pytest.mark.parametrize("format", FILES)
def test_damaged_json_is_refused(tmp_path, format, text):
    fastsae.save(small_sae(), tmp_path, format=format)
    config = FILES[format][0]
    (tmp_path / config).write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=f"{config} (is not readable JSON|holds a list)"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
@pytest.mark.parametrize(
    "format, name",
    [
        ("saelens", "sae_weights.safetensors"),
        ("saelens", "sae_weights.pt"),
        ("dictionary_learning", "ae.pt"),
        ("sparsify", "sae.safetensors"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, format, name, damage):
    fastsae.save(small_sae(), tmp_path, format=format, files=(FILES[format][0], name))
    whole = (tmp_path / name).read_bytes()
    left = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x93" * len(whole)}[damage]
    (tmp_path / name).write_bytes(left)
    with pytest.raises(FormatError, match=f"{name} is damaged.*get it again"):
        fastsae.load(tmp_path)


class _Attack:
    def __reduce__(self):
        return exec, ("import builtins; builtins.fastsae_was_attacked = True",)


@pytest.mark.parametrize("write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_code_in_a_weights_file_is_not_run(tmp_path, write):
    import builtins

    fastsae.save(small_sae(), tmp_path, format="dictionary_learning")
    write({"encoder.weight": _Attack()}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=r"holds more than tensors.*running code"):
        fastsae.load(tmp_path)
    assert not hasattr(builtins, "fastsae_was_attacked")


def test_a_pt_file_of_something_else_is_refused(tmp_path):
    fastsae.save(small_sae(), tmp_path, format="dictionary_learning")
    torch.save([torch.zeros(3)], tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="holds a list, not a dict of tensors"):
        fastsae.load(tmp_path)
    torch.save({"encoder.weight": torch.zeros(4, 3, dtype=torch.int8)}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=r"lack encoder\.bias"):
        fastsae.load(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    fastsae.save(small_sae(), tmp_path, format="sparsify")
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file({n: t.to(torch.int8) for n, t in tensors.items()}, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match=r"the weights are torch.int8, expected one of float32"):
        fastsae.load(tmp_path)


# --- the hub ---


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache on the disk, and no network; returns a function that adds a repository."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(repository: str) -> Path:
        home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("a" * 40)
        snapshot = home / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        return snapshot

    # Names on the hub and folders here look alike; none of these is a folder.
    monkeypatch.chdir(tmp_path)
    return add


def test_loads_from_the_hub_cache_offline(hub_cache):
    snapshot = hub_cache("some-one/my.saes")
    fastsae.save(small_sae(seed=1), snapshot)
    fastsae.save(small_sae(seed=2), snapshot / "layers" / "3", format="sparsify")
    assert torch.equal(fastsae.load("some-one/my.saes").W_enc, small_sae(seed=1).W_enc)
    for name in ("some-one/my.saes/layers/3", "some-one/my.saes/layers/3/"):
        assert torch.equal(fastsae.load(name).W_enc, small_sae(seed=2).W_enc)
    with pytest.raises(FormatError, match=r"some-one/my\.saes on the .* hub has no SAE in layers;"):
        fastsae.load("some-one/my.saes/layers")


def test_without_the_hub_the_reason_is_given(hub_cache):
    with pytest.raises(FormatError, match=r"nobody/nothing cannot be had from.*download it where"):
        fastsae.load("nobody/nothing")
    for name in ("nothing", "../nothing/here", "/nothing/here", "a b/c"):
        with pytest.raises(FormatError, match="does not exist; give a folder"):
            fastsae.load(name)


def test_only_the_files_of_one_sae_are_downloaded(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked[repository] = allow_patterns
        fastsae.save(small_sae(), tmp_path / "layers[3]")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fastsae.load("some/repository/layers[3]")
    files = sorted(
        huggingface_hub.utils.filter_repo_objects(
            [
                f"{folder}{name}"
                for folder in ("", "layers[3]/", "layers3/", "layers[3]/deeper/")
                for name in (
                    "cfg.json",
                    "sae_weights.safetensors",
                    "sae_weights.pt",
                    "ae.pt",
                    "x.png",
                )
            ],
            allow_patterns=asked["some/repository"],
        )
    )
    assert files == ["layers[3]/ae.pt", "layers[3]/cfg.json", "layers[3]/sae_weights.safetensors"]
