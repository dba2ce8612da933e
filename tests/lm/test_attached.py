"""An SAE attached to a running model: what it reads, what its edits do, and what it leaves alone."""

from __future__ import annotations

import logging

import models
import pytest
import torch
from small_saes import small_sae
from tolerances import OTHER_PROGRAM
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastsae
from fastsae import ConfigError, SplicedModel, StreamError
from fastsae.config import Site

slow = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("mamba", "bloom", "rwkv")}
each_family = pytest.mark.parametrize(
    "directory",
    [slow.get(f, f) for f in models.FAMILIES] + ["gemma4_text", "gemma4_multimodal"],
)
METADATA = {"model_name": "llama", "hook_name": "model.layers.1"}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def path_of(name: str) -> str:
    return models.family(name) if name in models.FAMILIES else getattr(models, name)()


def model_at(directory: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_at(models.llama())


def sae_for(width: int = 64, **settings):
    settings.setdefault("metadata", METADATA)
    return small_sae(width, 96, 5, **settings)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[Tensor, Tensor]:
    """Rows of 9 and 5 tokens, and their attention mask."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[1, :4] = mask[1, :4] = 0
    return ids, mask


@torch.no_grad()
def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=OTHER_PROGRAM * float(expected.abs().max())
    )


# --- reading ---


def test_what_is_read_is_what_the_sae_gives_and_nothing_changes(llama: PreTrainedModel) -> None:
    sae, ids = sae_for(), tokens(2, 9)
    clean = llama(ids).logits
    with fastsae.attach(llama, sae) as lens:
        assert llama(ids).logits.equal(clean)
    residual = SplicedModel.load(models.llama(), 1).residual(ids)
    assert lens.latents.equal(sae.encode(residual)) and lens.mask.all()
    assert llama(ids).logits.equal(clean) and not _hooks(llama)


@each_family
def test_a_generation_is_read_token_by_token(directory: str) -> None:
    """With a cache, each token's latents are those of a pass over the whole text."""
    model = model_at(path_of(directory))
    sae = sae_for(128 if "gemma4" in directory else 64)
    rows = 1 if "rwkv" in directory else 2  # of several, its steps in transformers mix the rows
    ids = tokens(rows, 7)
    with fastsae.attach(model, sae) as lens:
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert lens.latents.shape == (rows, 12, 96)
    found = lens.latents
    with fastsae.attach(model, sae) as lens:
        model(output[:, :-1], use_cache=False)
    close(found, lens.latents)


def test_padding_on_the_left_is_not_read(llama: PreTrainedModel) -> None:
    sae, (ids, mask) = sae_for(), left_padded()
    with fastsae.attach(llama, sae) as lens:
        output = llama.generate(ids, attention_mask=mask, **GREEDY)
    assert lens.mask.equal(torch.cat([mask.bool(), torch.ones(2, 5, dtype=torch.bool)], 1))
    assert not lens.latents[1, :4].any()
    alone = output[1:, 4:]
    with fastsae.attach(llama, sae) as short:
        llama(alone[:, :-1])
    close(lens.latents[1:, 4:], short.latents)


def test_a_pass_without_the_cache_begins_a_new_text(llama: PreTrainedModel) -> None:
    sae, ids = sae_for(), tokens(1, 8)
    with fastsae.attach(llama, sae) as lens:
        cache = llama(ids[:, :5], use_cache=True).past_key_values
        llama(ids[:, 5:], past_key_values=cache)
        assert lens.latents.shape[1] == 8
        whole = lens.latents
        llama(ids)
        close(lens.latents, whole)
        llama(ids[:, :6])
        assert lens.latents.shape[1] == 6


def test_tokens_that_speculative_decoding_takes_back_are_forgotten(llama: PreTrainedModel) -> None:
    sae, ids = sae_for(), tokens(2, 8)
    with fastsae.attach(llama, sae) as lens:
        cache = llama(tokens(2, 4), use_cache=True).past_key_values
        cache.crop(-1)
        llama(ids[:, 3:], past_key_values=cache)
        found = lens.latents
        llama(torch.cat([tokens(2, 4)[:, :3], ids[:, 3:]], 1))
    close(found, lens.latents)


def test_special_tokens_and_outliers_are_left_alone(llama: PreTrainedModel) -> None:
    ids = torch.cat([torch.full((1, 1), 2), tokens(1, 7)], 1)  # BOS in front
    metadata = {**METADATA, "exclude_special_tokens": True}
    sae = sae_for(metadata=metadata)
    with fastsae.attach(llama, sae) as lens:
        llama(ids)
    assert lens.mask.tolist() == [[False] + [True] * 7]
    with fastsae.attach(llama, sae, replace=True) as lens:
        lens.clamp(3, 5.0)
        assert llama(ids[:, :1]).logits.equal(
            SplicedModel.load(models.llama(), 1).logits(ids[:, :1])[0]
        )
    assert not lens.mask.any() and not lens.latents.any()
    sae.metadata["exclude_special_tokens"] = [int(ids[0, 3])]  # as SAELens writes them
    with fastsae.attach(llama, sae) as lens:
        llama(ids)
    assert lens.mask.tolist() == [(ids[0] != ids[0, 3]).tolist()]
    with fastsae.attach(llama, sae, skip=()) as lens:
        llama(ids)
    assert lens.mask.all()
    residual = SplicedModel.load(models.llama(), 1).residual(ids)[0].norm(dim=1)
    sae.metadata["outlier_norm"] = factor = float((residual / residual.median()).max()) - 1e-3
    with fastsae.attach(llama, sae, skip=(), replace=True) as lens:
        llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert lens.mask[:, :8].equal((residual <= factor * residual.median())[None])
    assert lens.mask.shape == (1, 13) and not lens.mask.all()


# --- edits ---


@pytest.mark.parametrize("normalize", ["scalar", "none", "layer_norm"])
def test_replaced_means_the_reconstruction(llama: PreTrainedModel, normalize: str) -> None:
    sae, ids = sae_for(normalize=normalize), tokens(2, 9)
    spliced = SplicedModel.load(models.llama(), 1)
    with fastsae.attach(llama, sae, replace=True):
        found = llama(ids).logits
    residual = spliced.residual(ids)
    close(found, spliced.logits(ids, sae(residual))[0])


@pytest.mark.parametrize("normalize", ["scalar", "none", "layer_norm"])
@pytest.mark.parametrize("replace", [False, True])
def test_edits_move_the_activation_by_what_they_change(
    llama: PreTrainedModel, normalize: str, replace: bool
) -> None:
    sae, ids = sae_for(normalize=normalize), tokens(2, 9)
    spliced = SplicedModel.load(models.llama(), 1)
    residual = spliced.residual(ids)
    z = sae.encode(residual)
    a, b, c, d = z.flatten(0, 1).sum(0).topk(4).indices.tolist()
    edited = z.clone()
    edited[..., a], edited[..., b], edited[..., c] = 0, 7.0, z[..., c] * 3
    edited[..., d] = (z[..., d] + 2) * 0.5
    of = sae.token_statistics(residual)
    error = 0 if replace else residual - sae.decode(z, of)
    with fastsae.attach(llama, sae, replace=replace) as lens:
        lens.ablate(a).clamp([b], 7).scale(torch.tensor(c), 3).steer(d, 2.0).scale(d, 0.5)
        found = llama(ids).logits
        close(found, spliced.logits(ids, sae.decode(edited, of) + error)[0])
        assert lens.latents.equal(z)  # as they were read
        lens.reset()
        clean = sae(residual) if replace else residual
        close(llama(ids).logits, spliced.logits(ids, clean)[0])


def test_a_generation_with_edits_is_that_of_whole_passes(llama: PreTrainedModel) -> None:
    """Greedy tokens with the cache are the best of a pass over the text, with padding on the left too."""
    sae, (ids, mask) = sae_for(), left_padded()
    with fastsae.attach(llama, sae) as lens:
        lens.steer([3, 4], 20.0)
        output = llama.generate(ids, attention_mask=mask, **GREEDY)
        logits = llama(output[1:, 4:-1]).logits
    assert output[1:, 9:].equal(logits.argmax(2)[:, 4:])
    assert not output.equal(llama.generate(ids, attention_mask=mask, **GREEDY))


def test_several_at_once_each_read_what_the_one_before_leaves(llama: PreTrainedModel) -> None:
    first, ids = sae_for(), tokens(1, 8)
    second = sae_for(seed=1, metadata={"hook_name": "blocks.3.hook_resid_pre"})  # after layer 2
    with fastsae.attach(llama, first, replace=True), fastsae.attach(llama, second) as lens:
        llama(ids)
    early = SplicedModel.load(models.llama(), 1)
    stream: list[Tensor] = []
    handle = early._modules[2].register_forward_hook(lambda _m, _i, output: stream.append(output))
    early.logits(ids, first(early.residual(ids)))
    handle.remove()
    close(lens.latents, second.encode(stream[-1]))


def test_an_sae_in_another_dtype_than_the_model(llama: PreTrainedModel) -> None:
    half = model_at(models.llama()).bfloat16()
    with fastsae.attach(half, sae_for(), replace=True) as lens:
        assert half(tokens(1, 5)).logits.dtype == torch.bfloat16
    assert lens.latents.dtype == torch.float32


def test_gradients_flow_through_an_edit(llama: PreTrainedModel) -> None:
    sae = sae_for()
    with fastsae.attach(llama, sae, replace=True):
        llama(tokens(1, 5)).logits.sum().backward()
    assert sae.W_dec.grad is not None and sae.W_dec.grad.any()
    llama.zero_grad()


def test_the_input_of_a_module_can_be_the_place(llama: PreTrainedModel) -> None:
    ids = tokens(1, 6)
    sae = sae_for()
    mlp = llama.model.layers[2].mlp
    with fastsae.attach(llama, sae, hook="model.layers.2.mlp", replace=True):
        by_output = llama(ids).logits
    kept: list[Tensor] = []
    handle = mlp.register_forward_hook(lambda _m, _i, y: kept.append(y) or sae(y))
    assert llama(ids).logits.equal(by_output)
    handle.remove()
    with fastsae.attach(llama, sae, hook="model.layers.2.mlp.input", replace=True):
        by_input = llama(ids).logits
    handle = mlp.register_forward_pre_hook(lambda _m, inputs: (sae(inputs[0]),))
    assert llama(ids).logits.equal(by_input)
    handle.remove()


# --- what is refused ---


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_it_is_gone_after_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), fastsae.attach(llama, sae_for()):
        llama(tokens(1, 4))
        raise ZeroDivisionError
    assert not _hooks(llama)


def test_wrong_parts_are_refused_at_once(llama: PreTrainedModel) -> None:
    sae = sae_for()
    with pytest.raises(ConfigError, match=r"takes a fastsae\.SAE, got Linear"):
        fastsae.attach(llama, torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="language model of transformers, got SplicedModel"):
        fastsae.attach(SplicedModel.load(models.llama(), 1), sae)
    with pytest.raises(ConfigError, match="layer = 40, but .* has 4 layers"):
        fastsae.attach(llama, sae, hook="blocks.40.hook_resid_post")
    with pytest.raises(ConfigError, match="does not say which hook it reads"):
        fastsae.attach(llama, sae_for(metadata={}))
    sae.inference = "batch"
    with pytest.raises(ConfigError, match=r"set sae\.inference to 'topk' or 'threshold'"):
        fastsae.attach(llama, sae)


def test_another_width_or_another_model_is_said(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with fastsae.attach(llama, sae_for(32)), pytest.raises(ConfigError) as refused:
        llama(tokens(1, 4))
    assert "width 32, and the model gives [1, 4, 64] at model.layers.1" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        fastsae.attach(llama, sae_for())
        assert not caplog.records
        fastsae.attach(llama, sae_for(metadata={**METADATA, "model_name": "openai/gpt2"}))
    assert "was trained on openai/gpt2, and is attached to" in caplog.text


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lens: lens.ablate(96), "latent 96 is out of range: this SAE has 96, from 0"),
        (lambda lens: lens.clamp([3, -1], 1.0), "latent -1 is out of range"),
        (lambda lens: lens.clamp(3, "much"), "takes a number, got str: 'much'"),
        (lambda lens: lens.scale(3, True), "takes a number, got bool"),
        (lambda lens: lens.steer(3, float("nan")), "takes a finite number"),
        (lambda lens: lens.ablate([1.5]), "whole numbers, got 1.5"),
        (lambda lens: lens.ablate("12"), "whole numbers, got '1'"),
        (lambda lens: lens.latents, "nothing was read yet"),
    ],
)
def test_edits_that_make_no_sense(llama: PreTrainedModel, edit, said: str) -> None:
    lens = fastsae.attach(llama, sae_for())
    with pytest.raises(ConfigError, match=said):
        edit(lens)


def test_padding_on_the_left_needs_a_mask() -> None:
    llama, (ids, mask) = model_at(models.family("llama")), left_padded()
    with fastsae.attach(llama, sae_for()) as lens:
        with pytest.raises(ConfigError, match=r"1 of 2 rows begin with the padding token \(0\)"):
            llama(ids)
        with pytest.raises(StreamError, match=r"not \[batch, tokens\]"):
            llama(ids, attention_mask=mask[:, None, None, :].float())
        with pytest.raises(StreamError, match="ran by itself"):
            llama.model(tokens(1, 4))
        llama(inputs_embeds=llama.get_input_embeddings()(ids), attention_mask=mask)
        assert lens.mask.equal(mask.bool())
        llama(ids, mask)
    assert lens.mask.equal(mask.bool())


def test_the_place_is_found_in_both_ways_of_wrapping() -> None:
    for name, path in (("gemma4_text", "model"), ("gemma4_multimodal", "model.language_model")):
        model = model_at(getattr(models, name)())
        for hook in (
            "model.layers.1", "model.language_model.layers.1", "blocks.1.hook_resid_post",
        ):  # fmt: skip
            lens = fastsae.attach(model, sae_for(128), hook=hook)
            assert (lens.hook.path, lens.hook.reads_input) == (f"{path}.layers.1", False)


@pytest.mark.parametrize("hook", ["resid_pre", "attn_out", "mlp_in", "mlp_out"])
def test_every_hook_can_be_the_place(llama: PreTrainedModel, hook: str) -> None:
    sae, ids = sae_for(), tokens(2, 9)
    spliced = SplicedModel.load(models.llama(), Site(2, hook))
    with fastsae.attach(llama, sae, hook=spliced.hooks[0].name, replace=True) as lens:
        found = llama(ids).logits
    x = spliced.residual(ids)
    assert lens.latents.equal(sae.encode(x))
    close(found, spliced.logits(ids, sae(x))[0])


def test_a_module_that_runs_on_all_tokens_in_a_row() -> None:
    """OPT's MLP, whose layers flatten batch and tokens."""
    model, sae, ids = model_at(models.family("opt")), sae_for(), tokens(2, 9)
    spliced = SplicedModel.load(models.family("opt"), Site(1, "mlp_out"))
    with fastsae.attach(model, sae, hook=spliced.hooks[0].name) as lens:
        lens.clamp(3, 5.0)
        found = model(ids).logits
    x = spliced.residual(ids)
    z = sae.encode(x)
    edited = z.clone()
    edited[..., 3] = 5
    assert lens.latents.equal(z)
    close(found, spliced.logits(ids, x + sae.decode(edited) - sae.decode(z))[0])
