"""SAELens attaches what fastsae saves: to its own transformer, and to a bridge over a Hugging Face model."""

from __future__ import annotations

import logging
from pathlib import Path

import models
import pytest
import sae_lens
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from small_saes import small_sae
from tolerances import OTHER_PROGRAM
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fastsae
from fastsae.sae.cfg import transformer_lens_name

HOOK = "blocks.1.hook_resid_post"
LATENTS = f"{HOOK}.hook_sae_acts_post"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def saved(folder: Path, inference: str) -> tuple[fastsae.SAE, sae_lens.SAE]:
    """A saved SAE, as fastsae and as SAELens load it."""
    sae = small_sae(64, 96, 5, inference=inference, metadata={"hook_name": "model.layers.1"})
    fastsae.save(sae, folder)
    return fastsae.load(folder), sae_lens.SAE.load_from_disk(folder)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = OTHER_PROGRAM * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def bridge_over(directory: str, model: PreTrainedModel) -> SAETransformerBridge:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return SAETransformerBridge.boot_transformers(
        directory, hf_model=model, tokenizer=tokenizer, device="cpu"
    )


def tokens() -> torch.Tensor:
    return torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_a_hooked_sae_transformer(tmp_path: Path, inference: str) -> None:
    sae, theirs = saved(tmp_path, inference)
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=3, d_model=64, n_ctx=32, d_head=16, n_heads=4, d_vocab=300, act_fn="gelu", seed=0
    )
    model = HookedSAETransformer(config)
    _, clean = model.run_with_cache(tokens())
    logits, cache = model.run_with_cache_with_saes(tokens(), saes=[theirs])
    close(cache[LATENTS], sae.encode(clean[HOOK]))
    replaced = model.run_with_hooks(
        tokens(), fwd_hooks=[(HOOK, lambda x, hook: sae(x))], return_type="logits"
    )
    close(logits, replaced)


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_a_bridge_over_a_hugging_face_model(
    tmp_path: Path, inference: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With fastsae.attach on the same model, unwrapped, as the other side."""
    sae, theirs = saved(tmp_path, inference)
    model = AutoModelForCausalLM.from_pretrained(models.llama(), attn_implementation="eager").eval()
    with fastsae.attach(model, sae, replace=True) as lens:
        expected = model(tokens()).logits
    bridge = bridge_over(models.llama(), model)
    with caplog.at_level(logging.WARNING, logger="sae_lens"), bridge.saes([theirs]):
        assert list(bridge.acts_to_saes) == [HOOK]
        logits, cache = bridge.run_with_cache(tokens())
        close(cache[bridge.get_sae_hook_name(theirs)], lens.latents)
        close(logits, expected)
    assert "No hook found" not in caplog.text


def test_the_name_is_that_of_the_module_at_the_path() -> None:
    for family in ("llama", "gpt2", "neox", "gemma3"):
        model = AutoModelForCausalLM.from_pretrained(models.family(family)).eval()
        bridge = bridge_over(models.family(family), model)
        path = fastsae.SplicedModel.load(models.family(family), 1).hooks[0].path
        assert transformer_lens_name(path) == HOOK
        found: list[torch.Tensor] = []

        def keep(x: torch.Tensor, hook: object, found: list[torch.Tensor] = found) -> None:
            found.append(x)

        bridge.run_with_hooks(tokens(), fwd_hooks=[(bridge._resolve_hook_name(HOOK), keep)])
        close(found[0], fastsae.SplicedModel.load(models.family(family), 1).residual(tokens()))


def test_cfg_has_what_saebench_asks_for() -> None:
    sae = small_sae(
        64, 96, 5, metadata={"hook_name": "model.layers.17", "model_name": "some/model"}
    )
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert sae.cfg is sae.cfg and sae.cfg.to_dict()["d_sae"] == 96
    names = (
        "model_name",
        "hook_name",
        "hf_hook_name",
        "hook_layer",
        "hook_head_index",
        "architecture",
    )
    assert [getattr(sae.cfg, name) for name in names] == [
        "some/model", "blocks.17.hook_resid_post", "model.layers.17", 17, None, "batchtopk",
    ]  # fmt: skip
    sae.cfg.hook_layer = 3
    assert sae.cfg.hook_layer == 3
    assert sae.double().dtype == torch.float64
