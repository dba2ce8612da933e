"""Where a model is read: every hook of every family is a plain forward hook on the whole model, bit for bit."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastsae import ConfigError, StreamError
from fastsae.config import TRANSFORMER_LENS, Site
from fastsae.lm.hooked import CutModel, SplicedModel
from fastsae.lm.hooks import site_of

LAYER = 1
LLAMA = {"attn_out": "self_attn", "mlp_in": "mlp.input", "mlp_out": "mlp"}
NORMED = LLAMA | {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
OPT = {"attn_out": "self_attn", "mlp_in": "fc1.input", "mlp_out": "fc2"}
GPT = {"attn_out": "attn", "mlp_in": "mlp.input", "mlp_out": "mlp"}
PLACES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo", "mixtral", "granite"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3-multimodal", "gemma4-text", "gemma4", "olmo2"), NORMED),
    **dict.fromkeys(("gpt2", "gptj", "gpt-neo", "modernbert-decoder"), GPT),
    "neox": GPT | {"attn_out": "attention"},
    "glm4": LLAMA | {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},
    "mpt": {"attn_out": "attn", "mlp_in": "ffn.input", "mlp_out": "ffn.down_proj"},
    "bloom": {"attn_out": "self_attention.dense", "mlp_in": "mlp.input", "mlp_out": "mlp.dense_4h_to_h"},
    **dict.fromkeys(("opt", "opt-350m"), OPT),
    "rwkv": {"attn_out": "attention", "mlp_in": "feed_forward.input", "mlp_out": "feed_forward"},
    "mamba": {},
}  # fmt: skip
"""What the names mean in a layer of each family: written out by hand, from its forward."""
BUILT = {"gemma4-text": models.gemma4_text, "gemma4": models.gemma4_multimodal}
MORE = {
    name: (config, models.GATED | {"max_position_embeddings": 128} | more)
    for name, config, more in (
        ("mistral", "MistralConfig", {}),
        ("qwen2", "Qwen2Config", {}),
        ("qwen3", "Qwen3Config", {"head_dim": 16}),
        ("phi", "PhiConfig", {}),
        ("phi3", "Phi3Config", {}),
        ("olmo", "OlmoConfig", {}),
        ("olmo2", "Olmo2Config", {}),
        ("gemma2", "Gemma2Config", {"head_dim": 16}),
        ("glm4", "Glm4Config", {"head_dim": 16}),
        ("granite", "GraniteConfig", {"residual_multiplier": 0.5}),
        ("mixtral", "MixtralConfig", {"num_local_experts": 2}),
    )
}
MORE["gpt-neo"] = (
    "GPTNeoConfig",
    {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 128, "attention_types": [[["global"], 3]]},
)  # fmt: skip


def whole(family: str) -> transformers.PreTrainedModel:
    """A random model of the family, built in code."""
    torch.manual_seed(3)
    if family in BUILT:
        return transformers.AutoModelForCausalLM.from_pretrained(BUILT[family]()).eval()
    special = {
        "vocab_size": models.VOCABULARY,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "gemma3-multimodal":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        text = special | models.FAMILIES["gemma3"][1]
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    name, options = MORE.get(family) or models.FAMILIES[family]
    config = getattr(transformers, name)(**special | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(length: int = 12) -> Tensor:
    return torch.randint(4, 260, (2, length), generator=torch.Generator().manual_seed(0))


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return next(
        (path, module) for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and "vision" not in path
    )  # fmt: skip


@torch.inference_mode()
def plainly(model: nn.Module, path: str) -> Tensor:
    """What a forward hook at ``path`` of the whole model sees, as ``[n, t, D]``."""
    kept: list = []
    module = model.get_submodule(path.removesuffix(".input"))
    if path.endswith(".input"):
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: kept.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda _m, _i, out: kept.append(out if isinstance(out, Tensor) else out[0])
        )
    model(tokens(), use_cache=False)
    handle.remove()
    return kept[0].clone().view(2, 12, -1)


@pytest.mark.parametrize("family", PLACES)
def test_every_hook_is_a_plain_hook_on_the_whole_model(family: str) -> None:
    model = whole(family)
    path, layers = layers_of(model)
    inner = {"resid_pre": ".input", "resid_post": ""}
    inner |= {hook: f".{place}" for hook, place in PLACES[family].items()}
    paths = {hook: f"{path}.{LAYER}{place}" for hook, place in inner.items()}
    expected = {hook: plainly(model, place) for hook, place in paths.items()}
    assert len({float(x.double().sum()) for x in expected.values()}) == len(expected)
    with torch.inference_mode():
        clean = model(tokens(), use_cache=False).logits
    for hook, place in paths.items():
        spliced = SplicedModel(model, models.tokenizer(), Site(LAYER, hook), family)
        assert spliced.hooks[0].hf_name == place
        assert spliced.residual(tokens()).equal(expected[hook]), hook
        theirs = f"blocks.{LAYER}.{TRANSFORMER_LENS[hook]}"
        scaled = family == "granite" and hook.endswith("_out")
        assert spliced.hooks[0].name == (place if scaled else theirs)
        assert site_of(spliced.hooks[0].name) == Site(
            LAYER, hook if not scaled else PLACES[family][hook]
        )
        # What comes behind it reads what was put there.
        same = spliced.logits(tokens(), expected[hook])[0]
        assert same.equal(clean) and not spliced.logits(tokens(), -expected[hook])[0].equal(clean)
    with pytest.raises(ConfigError, match="hook = 'mlpp', .*no such place.*It has resid_post"):
        SplicedModel(model, models.tokenizer(), Site(LAYER, "mlpp"))

    # The same from one pass, of a model that is cut.
    cut = CutModel(model, models.tokenizer(), [Site(LAYER, hook) for hook in paths], name=family)
    assert len(layers) == LAYER + 1
    passes: list[int] = []
    cut._decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    for hook, x in zip(paths, cut.residuals(tokens()), strict=True):
        assert x.equal(expected[hook]), hook
    assert len(passes) == 1 and cut.widths == tuple(x.shape[2] for x in expected.values())


def test_nothing_behind_the_last_hook_runs() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models.llama())
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    copied = copy.deepcopy(model)
    cut = CutModel(model, models.tokenizer(), [Site(2, "mlp_in"), Site(1, "mlp_out")], name="llama")
    cut.residuals(tokens())
    assert "model.layers.2.self_attn.o_proj" in ran
    assert not {"model.layers.2.mlp.gate_proj", "model.layers.2", "model.norm"} & set(ran)
    ran.clear()
    CutModel(copied, models.tokenizer(), [Site(1, "resid_pre")], name="llama").residuals(tokens())
    assert "model.layers.0" in ran and not [name for name in ran if "layers.1" in name]


@pytest.mark.parametrize(
    ("hook", "path"),
    [
        ("mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("mlp.down_proj.input", "model.layers.1.mlp.down_proj.input"),
        ("self_attn.o_proj.input", "model.layers.1.self_attn.o_proj.input"),
        ("self_attn.k_proj.output", "model.layers.1.self_attn.k_proj"),
        ("model.norm", "model.norm"),
        ("model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_any_submodule_by_its_path(hook: str, path: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models.llama())
    expected = plainly(model, path)
    for given in (Site.parse(hook, 1), Site.parse(path, 1)):
        spliced = SplicedModel(model, models.tokenizer(), given)
        assert spliced.residual(tokens()).equal(expected)
        assert (spliced.widths, spliced.hooks[0].name) == ((expected.shape[2],), path)
        assert spliced.unembedding() is None
    cut = CutModel(model, models.tokenizer(), [given], name="llama")
    assert cut.residuals(tokens())[0].equal(expected)


def test_a_model_without_a_head() -> None:
    model = transformers.AutoModel.from_pretrained(models.llama())
    expected = plainly(model, "layers.1.mlp")
    cut = CutModel(model, models.tokenizer(), [Site(1, "mlp_out")], name="llama")
    assert cut.hooks[0].hf_name == "layers.1.mlp" and site_of("layers.1.mlp") == Site(1, "mlp")
    assert cut.residuals(tokens())[0].equal(expected)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dequantized"])
def test_hooks_of_weights_in_4_bits(quantization: str) -> None:
    sites = [Site(1, "mlp.down_proj.input"), Site(1, "mlp_out"), Site(0, "self_attn.q_proj")]
    cut = CutModel.load(models.llama(), sites, quantization=quantization)
    assert cut.widths == (128, 64, 64)


def test_compiled_models_are_hooked_the_same() -> None:
    sites = [Site(1, "mlp_in"), Site(0, "attn_out"), Site(1, "resid_pre")]
    plain = CutModel.load(models.llama(), sites)
    compiled = CutModel.load(models.llama(), sites)
    compiled._stops = False  # as with compile, which takes long
    assert all(map(torch.equal, compiled.residuals(tokens()), plain.residuals(tokens())))


def test_names_of_places() -> None:
    for name, site in {
        "model.layers.17": Site(17),
        "model.language_model.layers.5.mlp.down_proj.input": Site(5, "mlp.down_proj.input"),
        "layers.3": Site(3), "transformer.h.2.attn": Site(2, "attn"), "resid_post_layer_4": Site(4),
        "blocks.8.hook_resid_pre": Site(8, "resid_pre"), "blocks.1.hook_mlp_out": Site(1, "mlp_out"),
        "blocks.1.mlp.hook_in": Site(1, "mlp_in"), "model.layers.0.input": Site(0, "resid_pre"),
        "model.layers.2.mlp.experts.3.output": Site(2, "mlp.experts.3"),
    }.items():  # fmt: skip
        assert Site.parse(name) == Site.parse(name, 9) == site_of(name) == site
        assert Site.of_key(site.key) == site
    assert Site.parse("mlp.experts.3", 9) == Site(9, "mlp.experts.3")
    assert (str(Site(3)), str(Site(3, "mlp_in"))) == ("layer 3", "layer 3, mlp_in")
    for unknown in ("x", "blocks.5.attn.hook_z", "a, in_and_out", "model.norm"):
        with pytest.raises(ConfigError, match="is not a place.*--layer and --hook"):
            site_of(unknown)
    with pytest.raises(ConfigError, match="does not say which hook"):
        site_of(None)


@pytest.mark.parametrize(
    ("hook", "error", "message"),
    [
        ("mlp_out_", ConfigError, "near it are mlp_out"),
        ("mlp.down_prj", ConfigError, "near it are mlp.down_proj, "),
        ("model.layers", StreamError, "model.layers of .* does not run: it holds other modules"),
        ("lm_head", StreamError, "lm_head of .* is no part of the decoder"),
    ],
)
def test_places_that_are_none(hook: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CutModel.load(models.llama(), [Site(1, hook)])


def test_what_is_no_activation_of_each_token_is_refused() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models.llama())
    mlp = model.model.layers[1].mlp
    mlp.register_module("pooled", nn.Identity())
    mlp.register_module("keyed", nn.Identity())
    plain = mlp.forward
    mlp.forward = lambda x: plain(
        x + 0 * mlp.pooled(x.mean(1, keepdim=True)) + mlp.keyed({"x": 0})["x"]
    )
    refused = {
        "mlp.pooled": r"is \[1, 1, 64\] of torch.float32 for 8 tokens",
        "mlp.keyed": "gives a dict, expected a tensor",
    }
    for hook, message in refused.items():
        with pytest.raises(StreamError, match=message):
            _ = SplicedModel(model, models.tokenizer(), Site(1, hook)).widths
