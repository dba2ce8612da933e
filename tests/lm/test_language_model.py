"""The frozen model: the residual of the whole model bit for bit, from the part that is kept alone."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import models
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tolerances import COMPILED, NF4_DEQUANTIZED, SEPARATE_DOCUMENTS
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastsae.errors import ConfigError, StreamError
from fastsae.lm import hub_access as access
from fastsae.lm import loading
from fastsae.lm.hooked import CutModel
from fastsae.lm.loading import load_config, load_pretrained, resolve_device

CHECKPOINTS = {
    "llama": (models.llama, models.LLAMA_LAYERS, "model.layers"),
    "gemma4-text": (models.gemma4_text, models.GEMMA_LAYERS, "model.layers"),
    "gemma4": (models.gemma4_multimodal, models.GEMMA_LAYERS, "model.language_model.layers"),
}
each_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
each_quantization = pytest.mark.parametrize("quantization", ["none", "nf4"])


def tokens(n: int = 3, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, 260, (n, length), generator=generator)


def whole_model(directory: str, quantization: str):
    options = {}
    if quantization == "nf4":
        options = {
            "dtype": torch.bfloat16,
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float16,
                llm_int8_skip_modules=["lm_head", "per_layer_model_projection"],
            ),
        }
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.inference_mode()
def residuals(model, ids: Tensor) -> list[Tensor]:
    """After every layer of an untouched model, the last one before its final norm."""
    last: list[Tensor] = []
    model.get_decoder().layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return [*hidden[1:-1], last[0]]


@each_quantization
@each_checkpoint
def test_bit_equal_at_every_layer(checkpoint: str, quantization: str):
    build, num_layers, path = CHECKPOINTS[checkpoint]
    whole = whole_model(build(), quantization)
    untouched = copy.deepcopy(whole)
    expected = residuals(whole, tokens())
    assert len(expected) == num_layers
    for layer in range(num_layers):
        part = CutModel(
            copy.deepcopy(untouched), models.tokenizer(), (layer,), name=checkpoint,
            quantization=quantization,
        )  # fmt: skip
        assert part.hooks[0].path == f"{path}.{layer}"
        assert part.num_layers == num_layers
        (found,) = part.residuals(tokens())
        assert found.dtype == part.dtype
        assert torch.equal(found, expected[layer]), layer
        assert found.float().std() > 0


@each_quantization
@each_checkpoint
def test_loaded_from_disk(checkpoint: str, quantization: str):
    build, num_layers, path = CHECKPOINTS[checkpoint]
    layer = num_layers - 2
    loaded = CutModel.load(build(), (layer,), quantization=quantization)
    expected = residuals(whole_model(build(), quantization), tokens())[layer]
    assert torch.equal(loaded.residuals(tokens())[0], expected)
    assert (loaded.sites, loaded.widths) == (((layer, "resid_post"),), (expected.shape[-1],))
    assert loaded.model_class_name == "AutoModelForCausalLM"
    assert loaded.hooks[0].hf_name == f"{path}.{layer}"
    assert loaded.special_ids.tolist() == [0, 1, 2, 3]


@each_quantization
@each_checkpoint
def test_several_layers_from_one_pass(checkpoint: str, quantization: str):
    build, num_layers, path = CHECKPOINTS[checkpoint]
    layers = (num_layers - 2, 0, num_layers // 2)  # in the order asked for
    expected = residuals(whole_model(build(), quantization), tokens())
    part = CutModel.load(build(), layers, quantization=quantization)
    assert len(part._decoder.layers) == num_layers - 1
    passes = []
    part._decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    found = part.residuals(tokens())
    assert len(passes) == 1
    assert [hook.path for hook in part.hooks] == [f"{path}.{layer}" for layer in layers]
    for layer, residual in zip(layers, found, strict=True):
        assert torch.equal(residual, expected[layer]), layer


@each_quantization
@each_checkpoint
@torch.inference_mode()
def test_the_whole_model(checkpoint: str, quantization: str):
    build, num_layers, _ = CHECKPOINTS[checkpoint]
    model, tokenizer = load_pretrained(build(), quantization=quantization)
    assert tokenizer("a")["input_ids"] == models.tokenizer()("a")["input_ids"]
    assert len(model.get_decoder().layers) == num_layers
    expected = whole_model(build(), quantization)(tokens(), use_cache=False).logits
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@each_checkpoint
def test_hook_name_is_a_path_in_the_class_users_load(checkpoint: str):
    build, _, _ = CHECKPOINTS[checkpoint]
    whole = whole_model(build(), "none")
    part = CutModel.load(build(), (1,))
    kept: list[Tensor] = []
    module = dict(whole.named_modules())[part.hooks[0].path]
    module.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.inference_mode():
        whole(tokens(), use_cache=False)
    assert torch.equal(part.residuals(tokens())[0], kept[0])


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool):
    whole_model(models.llama(), "none").bfloat16().save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_cpu_has_bf16", lambda: fast)
    dtype = torch.bfloat16 if fast else torch.float32
    part = CutModel.load(str(tmp_path), (1,))
    assert part.dtype == dtype
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(part.residuals(tokens())[0], residuals(whole, tokens())[1])


def parameters(model: CutModel) -> int:
    return sum(p.numel() for p in model._decoder.parameters())


@pytest.mark.parametrize("checkpoint", ["gemma4-text", "gemma4"])
def test_memory_holds_the_layers_that_run_alone(checkpoint: str):
    build, num_layers, _ = CHECKPOINTS[checkpoint]
    part = CutModel.load(build(), (2,))
    decoder = part._decoder
    whole = whole_model(build(), "none").get_decoder()
    assert len(decoder.layers) == 3
    table, full_table = decoder.embed_tokens_per_layer.weight, whole.embed_tokens_per_layer.weight
    assert (
        table.untyped_storage().nbytes() * num_layers == full_table.untyped_storage().nbytes() * 3
    )
    projection = decoder.per_layer_model_projection.weight
    full_projection = whole.per_layer_model_projection.weight
    assert projection.shape[0] * num_layers == full_projection.shape[0] * 3
    dropped = sum(p.numel() for layer in whole.layers[3:] for p in layer.parameters())
    cut = (full_table.numel() + full_projection.numel()) * (num_layers - 3) // num_layers
    assert parameters(part) == sum(p.numel() for p in whole.parameters()) - dropped - cut


def test_towers_and_head_are_not_loaded():
    part = CutModel.load(models.gemma4_multimodal(), (models.GEMMA_LAYERS - 1,))
    names = {name.split(".")[0] for name, _ in part._decoder.named_parameters()}
    assert names == {
        "embed_tokens", "embed_tokens_per_layer", "layers", "norm", "per_layer_model_projection",
        "per_layer_projection_norm",
    }  # fmt: skip


def test_quantized_and_frozen():
    import bitsandbytes

    part = CutModel.load(models.gemma4_multimodal(), (2,), quantization="nf4")
    linears = {n: m for n, m in part._decoder.named_modules() if isinstance(m, torch.nn.Linear)}
    plain = {n for n, m in linears.items() if not isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert plain == {"per_layer_model_projection"}
    assert len(linears) > 10
    assert {m.weight.quant_type for n, m in linears.items() if n not in plain} == {"nf4"}
    assert {m.compute_dtype for n, m in linears.items() if n not in plain} == {torch.float16}
    assert part.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in part._decoder.parameters())
    assert not part._decoder.training
    assert part.residuals(tokens())[0].is_inference()


@each_checkpoint
def test_padding_changes_nothing_before_it(checkpoint: str):
    part = CutModel.load(CHECKPOINTS[checkpoint][0](), (2,))
    ids = tokens(2, 40)
    padded = ids.clone()
    padded[1, 25:] = 0
    (before,), (after,) = part.residuals(ids), part.residuals(padded)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :25], after[1, :25])
    assert not torch.equal(before[1, 25:], after[1, 25:])


# --- dequantized once ---


@each_checkpoint
def test_dequantized_is_bit_equal_to_the_products_that_bitsandbytes_forms(checkpoint: str):
    """As it does for many tokens wherever it has no kernel of its own."""
    import bitsandbytes

    build, num_layers, _ = CHECKPOINTS[checkpoint]
    layers = tuple(range(num_layers))
    model, tokenizer = load_pretrained(build(), quantization="nf4")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    packed = CutModel(model, tokenizer, layers, name=checkpoint, quantization="nf4")
    plain = CutModel.load(build(), layers, quantization="nf4-dequantized")
    linears = [m for m in plain._decoder.modules() if isinstance(m, loading.DequantizedLinear)]
    assert len(linears) > 10
    assert {m.weight.dtype for m in linears} == {torch.float16}
    found, expected = plain.residuals(tokens()), packed.residuals(tokens())
    for layer in layers:
        assert torch.equal(found[layer], expected[layer]), layer
    whole, _ = load_pretrained(build(), quantization="nf4-dequantized")
    assert torch.equal(residuals(whole, tokens())[-1], found[-1])


def test_dequantized_is_near_the_kernel_for_cpus():
    packed = load_pretrained(models.gemma4_text(), quantization="nf4")[0]
    plain = load_pretrained(models.gemma4_text(), quantization="nf4-dequantized")[0]
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for one, other in zip(packed.get_decoder().layers, plain.get_decoder().layers, strict=True):
        expected = one.mlp.up_proj(x).float()
        error = (other.mlp.up_proj(x).float() - expected).norm()
        assert error <= NF4_DEQUANTIZED * expected.norm()


# --- options ---


@each_checkpoint
@pytest.mark.parametrize("quantization", ["none", "nf4-dequantized"])
def test_a_document_is_as_if_it_were_alone(checkpoint: str, quantization: str):
    build, num_layers, _ = CHECKPOINTS[checkpoint]
    layers = (0, num_layers - 1)
    apart, across = (
        CutModel.load(build(), layers, quantization=quantization, separate_documents=separate)
        for separate in (True, False)
    )
    documents = [torch.cat([torch.tensor([2]), tokens(1, n)[0] + n]) for n in (9, 1, 21, 6)]
    row = torch.cat(documents)[None]
    starts = [0, 10, 12, 34]
    for found, joined, *alone in zip(
        apart.residuals(row), across.residuals(row), *(across.residuals(d[None]) for d in documents),
        strict=True,
    ):  # fmt: skip
        for start, expected in zip(starts, alone, strict=True):
            rows = slice(start, start + expected.shape[1])
            bound = SEPARATE_DOCUMENTS[quantization] * expected.float().norm()
            assert (found[:, rows].float() - expected.float()).norm() <= bound
            if start:
                assert (joined[:, rows].float() - expected.float()).norm() > 3 * bound


def test_documents_without_bos_end_with_eos():
    part = CutModel(
        load_pretrained(models.llama())[0], models.tokenizer(bos=False), (1,), name="llama",
        separate_documents=True,
    )  # fmt: skip
    part._try_out()
    positions = part._positions(torch.tensor([[5, 6, 1, 7, 1, 8, 9], [1, 4, 4, 4, 4, 4, 1]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]


def test_a_model_that_cannot_separate_documents_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CutModel, "_positions", lambda *_: None)
    with pytest.raises(StreamError, match=r"attends across documents.*--separate-documents"):
        CutModel.load(models.llama(), (2,), separate_documents=True)


@pytest.mark.slow
def test_compiled():
    plain = CutModel.load(models.llama(), (0,))
    compiled = CutModel.load(models.llama(), (0,), compile=True)
    assert compiled._run is not compiled._decoder
    for _ in range(2):
        for found, expected in zip(
            compiled.residuals(tokens()), plain.residuals(tokens()), strict=True
        ):
            assert (found - expected).abs().max() <= COMPILED * expected.abs().max()


@each_checkpoint
def test_memory_is_that_of_the_weights_that_are_kept(checkpoint: str):
    build, num_layers, _ = CHECKPOINTS[checkpoint]
    sizes = {}
    for quantization in ("none", "nf4", "nf4-dequantized"):
        for layer in (0, num_layers - 1):
            part = CutModel.load(build(), (layer,), quantization=quantization)
            weights = sum(p.numel() * p.element_size() for p in part._decoder.parameters())
            buffers = sum(b.numel() * b.element_size() for b in part._decoder.buffers())
            scales = sum(
                p.quant_state.absmax.nbytes
                for p in part._decoder.parameters()
                if hasattr(p, "quant_state")
            )
            assert bool(scales) == (quantization == "nf4")
            assert weights + scales <= part.memory_bytes <= weights + scales + buffers
            sizes[quantization, layer] = part.memory_bytes
    for quantization in ("none", "nf4", "nf4-dequantized"):
        assert sizes[quantization, 0] < sizes[quantization, num_layers - 1]
    last = num_layers - 1
    assert sizes["nf4", last] < sizes["nf4-dequantized", last] < sizes["none", last]


# --- what users get wrong ---


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], str]:
    """A copy of the multimodal checkpoint without the weights whose name contains a text."""

    def build(without: str) -> str:
        directory = tmp_path / "broken"
        shutil.copytree(models.gemma4_multimodal(), directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        kept = {name: tensor for name, tensor in weights.items() if without not in name}
        assert len(kept) < len(weights)
        save_file(kept, path, {"format": "pt"})
        return str(directory)

    return build


def test_missing_weights_are_fatal(broken: Callable[[str], str]):
    with pytest.raises(StreamError, match=r"lacks 1 weights.*layers\.3\.mlp\.up_proj.*random"):
        CutModel.load(broken("layers.3.mlp.up_proj"), (1,))


def test_a_missing_head_is_fatal_where_it_is_needed(tmp_path: Path):
    shutil.copytree(models.llama(), tmp_path / "headless")
    path = tmp_path / "headless" / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, {"format": "pt"})
    assert CutModel.load(str(tmp_path / "headless"), (1,)).d_model == 64
    with pytest.raises(StreamError, match="the first is 'lm_head.weight'"):
        load_pretrained(str(tmp_path / "headless"))


def test_missing_towers_are_not(broken: Callable[[str], str]):
    assert CutModel.load(broken("vision_tower"), (1,)).d_model == 128


@pytest.mark.parametrize("layer", [-1, models.LLAMA_LAYERS])
def test_layer_out_of_range(layer: int):
    with pytest.raises(ConfigError, match="has 4 layers; use --layer 0 to 3"):
        load_config(models.llama(), (layer,))
    assert load_config(models.llama(), (3,))


def test_context_too_long():
    with pytest.raises(ConfigError, match=r"context_length = 257.*at most 256 positions"):
        load_config(models.llama(), (0,), 257)
    assert load_config(models.llama(), (0,), 256)


def test_cuda_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"'{device}'.*sees 0 CUDA devices.*--device cpu"):
            CutModel.load("a model that is not even looked up", (0,), device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="sees 1 CUDA"):
        resolve_device("cuda:1")


def test_bitsandbytes_missing(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "bitsandbytes" else find(name, *a),
    )
    with pytest.raises(StreamError, match=r"not installed.*--quantization none"):
        CutModel.load(models.llama(), (0,), quantization="nf4")


def test_bitsandbytes_unusable(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str):
        raise OSError("libbitsandbytes.so: cannot open shared object file")

    monkeypatch.setattr(loading.importlib, "import_module", broken)
    with pytest.raises(
        StreamError, match=r"does not work here: libbitsandbytes.*--quantization none"
    ):
        CutModel.load(models.llama(), (0,), quantization="nf4")


def test_a_model_that_cannot_run_in_nf4_says_so(monkeypatch: pytest.MonkeyPatch):
    import bitsandbytes

    def refuse(*_):
        raise RuntimeError("blocksize is not supported")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", refuse)
    with pytest.raises(StreamError, match=r"does not run on cpu: blocksize.*--quantization none"):
        CutModel.load(models.llama(), (0,), quantization="nf4")


def test_directory_without_a_model(tmp_path: Path):
    with pytest.raises(StreamError, match=r"the model '.*' cannot be opened"):
        CutModel.load(str(tmp_path), (0,))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(StreamError, match=r"cannot be opened.*no-such-model"):
        CutModel.load(str(tmp_path), (0,))


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    with pytest.raises(StreamError, match=r"cannot be reached.*--model DIR.*--demo"):
        CutModel.load("google/no-such-gemma", (17,))


def refusal(kind: type, message: str, status: int) -> OSError:
    """An error of the hub's client, wrapped as transformers does."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = OSError(f"wrapped: {message[:10]}")
    error.__cause__ = kind(message, response=response)
    return error


UNKNOWN = "Repository Not Found. If you are trying to access a private or gated repo, authenticate."


@pytest.mark.parametrize(
    ("raised", "token", "message"),
    [
        (OSError("x/y is not a local folder and is not a valid model identifier"), None, "no model 'x/y'.*spelling.*--model DIR"),
        (OSError("You are trying to access a gated repo."), None, "gated.*no access token was found.*hf auth login.*licence"),
        (OSError("You are trying to access a gated repo."), "hf_x", "gated.*was not granted.*licence"),
        (refusal(errors.RepositoryNotFoundError, UNKNOWN, 401), None, "no model 'x/y'.*spelling"),
        (refusal(errors.GatedRepoError, "Access is restricted", 403), "hf_x", "gated.*was not granted"),
        (refusal(errors.HfHubHTTPError, "Unauthorized", 401), None, "no access token was found"),
        (refusal(errors.HfHubHTTPError, "Forbidden", 403), "hf_x", "was not granted"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), None, "cannot be reached.*--demo"),
        (OSError("disk on fire"), None, "cannot be opened: disk on fire"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, token: str | None, message: str
):
    def refuse(*_args, **_options):
        raise raised

    monkeypatch.setattr(loading, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(StreamError, match=message):
        CutModel.load("x/y", (0,))


def test_offline_mode_and_a_lost_network_are_noticed_at_once(monkeypatch: pytest.MonkeyPatch):
    calls = []

    class Session:
        def head(self, url: str, timeout: float):
            calls.append((url, timeout))
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not access.hub_is_reachable()
    assert not calls
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not access.hub_is_reachable()
    assert calls == [(huggingface_hub.constants.ENDPOINT, 10)]
    monkeypatch.setattr(Session, "head", lambda *_args, **_options: None)
    assert access.hub_is_reachable()
