"""The tools that people use an SAE with, in versions that do not install beside the rest: ``tests/tools/run``."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from small_saes import small_sae
from tolerances import OTHER_PROGRAM
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastsae

# Outside of that environment there is nothing to test here.
nnsight = pytest.importorskip("nnsight", minversion="0.8")
sae_bench = pytest.importorskip("sae_bench")

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def sae() -> fastsae.SAE:
    """Of the stream after layer 1 of the tiny models, whose explained variance is well above 0."""
    metadata = {"model_name": models.llama(), "hook_name": "model.layers.1", "context_size": 32}
    return small_sae(64, 96, 5, metadata=metadata)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(0))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = OTHER_PROGRAM * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def hooked():
    """A tiny random HookedTransformer with a tokenizer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3, d_model=64, n_ctx=128, d_head=16, n_heads=4, d_vocab=512, act_fn="gelu", seed=0,
        default_prepend_bos=True, device="cpu",
    )  # fmt: skip
    return HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(models.llama()))


# --- nnsight ---


def test_nnsight_traces_and_replaces(sae: fastsae.SAE) -> None:
    """With fastsae.attach on the same model as the other side."""
    plain = AutoModelForCausalLM.from_pretrained(models.llama()).eval()
    ids = tokens(2, 9)
    with fastsae.attach(plain, sae, replace=True) as lens:
        expected = plain(ids).logits
    model = nnsight.NNsight(plain)
    with model.trace(ids):
        stream = model.model.layers[1].output
        latents = sae.encode(stream).save()
        model.model.layers[1].output = sae(stream)
        logits = model.lm_head.output.save()
    close(latents, lens.latents)
    close(logits, expected)


def test_nnsight_calls_an_sae_that_is_in_the_model(sae: fastsae.SAE) -> None:
    """The pattern of its documentation for auxiliary modules."""
    plain = AutoModelForCausalLM.from_pretrained(models.llama()).eval()
    ids = tokens(1, 6)
    with fastsae.attach(plain, sae, replace=True):
        expected = plain(ids).logits
    plain.model.layers[1].add_module("sae", sae)
    model = nnsight.NNsight(plain)
    with model.trace(ids):
        layer = model.model.layers[1]
        layer.output = layer.sae(layer.output, hook=True)
        logits = model.lm_head.output.save()
    close(logits, expected)


def test_nnsight_traces_a_model_with_an_sae_attached(sae: fastsae.SAE) -> None:
    """Hooks of both on one model."""
    plain = AutoModelForCausalLM.from_pretrained(models.llama()).eval()
    ids = tokens(1, 5)
    with fastsae.attach(plain, sae, replace=True):
        expected = plain(ids).logits
    model = nnsight.NNsight(plain)
    with fastsae.attach(plain, sae, replace=True) as lens, model.trace(ids):
        logits = model.lm_head.output.save()
    close(logits, expected)
    assert lens.latents.shape == (1, 5, 96)


def test_save_is_ours_beside_nnsights_method_of_every_object(
    sae: fastsae.SAE, tmp_path: Path
) -> None:
    assert fastsae.load(fastsae.save(sae, tmp_path)).metadata == sae.metadata


# --- SAEBench ---


def test_saebench_evaluates_the_object(sae: fastsae.SAE, hooked, tmp_path: Path) -> None:
    """Its core evaluation on the SAE itself, no copy of it; its numbers are ours on the same tokens."""
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_lens import ActivationsStore

    texts = [f"Text number {i}, which is long enough to fill a row of it. " * 4 for i in range(80)]
    store = ActivationsStore(
        model=hooked, dataset=Dataset.from_list([{"text": text} for text in texts]), streaming=False,
        hook_name=sae.cfg.hook_name, hook_head_index=None, context_size=32, d_in=64, n_batches_in_buffer=4,
        total_training_tokens=1024, store_batch_size_prompts=4, train_batch_size_tokens=64, prepend_bos=True,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    take = store.get_batch_tokens
    store.get_batch_tokens = lambda *args, **options: (
        seen.append(take(*args, **options)) or seen[-1]
    )
    found, features = run_evals(sae, store, hooked, config)
    _, cache = hooked.run_with_cache(torch.cat(seen[-2:]))
    x = cache[HOOK].flatten(0, 1)
    z, x_hat = sae.encode(x), sae(x)
    assert found["sparsity"]["l0"] == pytest.approx(float((z > 0).sum(1).float().mean()), rel=1e-5)
    # Not its explained variance, which takes the mean square of an activation for the square of its mean.
    per_token = (x - x_hat).square().sum(1).mean() / (len(x) / 2)  # of one of two batches
    assert found["reconstruction_quality"]["mse"] == pytest.approx(float(per_token), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x, x_hat).mean()
    assert found["reconstruction_quality"]["cossim"] == pytest.approx(float(cosine), abs=1e-5)
    assert found["model_behavior_preservation"]["kl_div_with_sae"] > 0
    density = torch.tensor(features["feature_density"])
    torch.testing.assert_close(density, (z > 0).float().mean(0), rtol=1e-5, atol=1e-7)


def test_saebench_finds_what_it_asks_of_an_object(sae: fastsae.SAE) -> None:
    from sae_bench.sae_bench_utils.general_utils import check_decoder_norms

    assert check_decoder_norms(sae.W_dec.data)
    sae.cfg.architecture_str, sae.cfg.hook_layer = "batchtopk", 1
    assert sae.to(device="cpu", dtype=torch.float32) is sae
    assert json.dumps(sae.cfg.to_dict())


# --- sae-probes ---


def test_sae_probes_probes_the_object(sae: fastsae.SAE, hooked, tmp_path: Path) -> None:
    """A sparse probe on one of its data sets; the features are our latents of its activations."""
    from sae_probes.generate_model_activations import ensure_dataset_activations
    from sae_probes.generate_sae_activations import generate_sae_activations
    from sae_probes.run_sae_evals import DATASET_SIZES, run_sae_evals
    from sae_probes.utils_data import get_xy_traintest

    dataset = min(DATASET_SIZES, key=lambda name: DATASET_SIZES[name])
    shared = {"hook_name": sae.cfg.hook_name, "model_name": "tiny", "model_cache_path": tmp_path}
    ensure_dataset_activations(
        "tiny", [dataset], [sae.cfg.hook_name], tmp_path, device="cpu", max_seq_len=64, model=hooked
    )
    run_sae_evals(
        sae=sae, reg_type="l1", setting="normal", ks=[2], results_path=tmp_path / "results",
        datasets=[dataset], device="cpu", **shared,
    )  # fmt: skip
    (written,) = (tmp_path / "results").rglob("*.json")
    (found,) = json.loads(written.read_text())
    assert found["k"] == 2 and 0 <= found["test_auc"] <= 1
    latents = generate_sae_activations(
        sae=sae,
        setting="normal",
        dataset=dataset,
        device="cpu",
        num_train=None,
        frac=None,
        **shared,
    ).X_test
    train = min(DATASET_SIZES[dataset] - 100, 1024)
    x = get_xy_traintest(train, dataset, **shared)[2]
    close(latents, sae.encode(x.float()))


# --- dictionary_learning ---


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_dictionary_learning_evaluates_what_is_saved(
    sae: fastsae.SAE, tmp_path: Path, inference: str
) -> None:
    from dictionary_learning.evaluation import evaluate as theirs
    from dictionary_learning.utils import load_dictionary

    sae.inference = inference
    fastsae.save(sae, tmp_path, format="dictionary_learning")
    dictionary, _ = load_dictionary(str(tmp_path), device="cpu")
    x = fastsae.SplicedModel.load(models.llama(), 1).residual(tokens(8, 32)).flatten(0, 1)
    close(dictionary.encode(x), sae.encode(x))
    found = theirs(dictionary, iter([x]), device="cpu")
    assert found["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()), rel=1e-5)
    # Its residual is taken less its mean.
    explained = 1 - (x - sae(x)).var(0).sum() / x.var(0).sum()
    assert found["frac_variance_explained"] == pytest.approx(float(explained), abs=1e-4)
