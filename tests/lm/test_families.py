"""Models of many architectures: what trains also has a report, and what does not fit is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import models
import pytest
import torch
from small_saes import small_sae
from transformers import AutoModelForCausalLM

from fastsae import ConfigError, HeldOutText, StreamError, TrainConfig, Trainer
from fastsae.cli import main
from fastsae.evaluation.contrast import pool
from fastsae.evaluation.evaluate import evaluate
from fastsae.lm.hooked import CutModel, SplicedModel
from fastsae.lm.loading import load_config
from fastsae.reporting.dashboard.geometry import logit_effects

LIMITED = {
    "mpt",
    "opt-350m",
    "opt",
    "gpt2",
    "gptj",
    "neox",
    "modernbert-decoder",
    "llama",
    "gemma3",
}
slow = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("mamba", "bloom", "rwkv")}
each_family = pytest.mark.parametrize("family", [slow.get(f, f) for f in models.FAMILIES])


def text_of(model: SplicedModel, length: int = 64) -> HeldOutText:
    texts = [f"text {i} of some words, and more of them. " * 8 for i in range(12)]
    return HeldOutText.tokenize(texts, model.tokenizer, length)


@each_family
def test_the_residual_stream_is_that_of_the_whole_model(family: str):
    tokens = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    cut = CutModel.load(models.family(family), (1,))
    whole = AutoModelForCausalLM.from_pretrained(models.family(family)).eval()
    kept: list = []
    layer = whole.get_submodule(cut.hooks[0].path)
    layer.register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    with torch.inference_mode():
        whole(tokens, use_cache=False)
    expected = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    assert torch.equal(cut.residuals(tokens)[0], expected)


@pytest.mark.parametrize("family", [*models.FAMILIES, "gemma4_text", "gemma4_multimodal"])
def test_logits_of_some_positions_are_those_of_the_whole_model(family: str):
    directory = models.family(family) if family in models.FAMILIES else getattr(models, family)()
    model = SplicedModel.load(directory, 2)
    assert model._has_head
    tokens = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    some = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    clean, residual = model.logits(tokens)
    for replacement, whole in (
        (None, clean),
        (residual / 2, model.logits(tokens, residual / 2)[0]),
    ):
        hidden, kept = model.hidden(tokens, replacement)
        assert kept.equal(residual)
        torch.testing.assert_close(model.head(hidden[some]), whole[some])
        assert "forward" not in vars(model._decoder), "the decoder was not put back"
    assert model.logits(tokens)[0].equal(clean)


def test_logits_that_depend_on_more_than_their_position_are_formed_whole():
    model = SplicedModel.load(models.llama(), 2)
    expected = SplicedModel.load(models.llama(), 2)
    sae, text = small_sae(64, 32, 4), text_of(model)
    model._model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits * torch.arange(1, 1 + logits.shape[1])[:, None]
    )
    assert expected._has_head and not model._has_head
    tokens = text.rows[0][None].long()
    hidden, _ = model.hidden(tokens)
    assert model.head(hidden[0]).equal(model.logits(tokens)[0][0])
    assert evaluate(sae, text, model=model).losses["clean"] > 0


def test_the_work_of_a_token_does_not_depend_on_how_weights_are_stored():
    plain = SplicedModel.load(models.llama(), 1)
    layer = sum(p.numel() for p in plain._modules[0].parameters())
    assert plain.work == (2 * layer, 4 * layer + 64 * models.VOCABULARY)
    assert SplicedModel.load(models.llama(), 1, quantization="nf4").work == plain.work


@each_family
def test_what_a_latent_promotes_is_what_the_model_makes_of_it(family: str):
    """Against the logits themselves, from the last layer on, with the norm's scale frozen."""
    model = SplicedModel.load(models.family(family), 2)
    sae = small_sae(64, 8, 2)
    if family == "modernbert-decoder":  # its head is a network: there is no direct path
        assert logit_effects(sae, model, 5) is None
        return
    promoted, _ = logit_effects(sae, model, 5)
    unembedding, gain, centred = model.unembedding()
    assert unembedding.shape == (models.VOCABULARY, 64) and gain.shape == (64,)
    tokens = torch.randint(4, 260, (1, 3), generator=torch.Generator().manual_seed(0))
    residual = model.residual(tokens)
    row = torch.nn.functional.normalize(
        torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0
    )
    size = 1e-2 * float(residual.norm(dim=2).mean())
    ahead, behind = (model.logits(tokens, residual + s * size * row)[0] for s in (1, -1))
    measured = (ahead - behind)[0, -1] / (2 * size)
    x = residual[0, -1] - residual[0, -1].mean() if centred else residual[0, -1]
    direction = row - row.mean() if centred else row
    if (
        not torch.equal(gain, torch.ones_like(gain)) or centred
    ):  # a norm: what is along x changes nothing
        direction = direction - (direction @ x) / (x @ x) * x
    expected = unembedding @ (gain * direction)
    both = torch.stack([measured - measured.mean(), expected - expected.mean()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.999
    assert promoted.indices.shape == (8, 5)


@each_family
def test_rows_that_are_too_long_are_refused(family: str):
    directory = models.family(family)
    model = SplicedModel.load(directory, 1)
    sae, text = small_sae(64, 32, 4), text_of(model, 256)
    if family not in LIMITED:
        assert evaluate(sae, text, model=model).tokens
        return
    refused = pytest.raises(
        ConfigError, match=r"context_length = 256, but .* at most 128 positions; use"
    )
    with refused:
        evaluate(sae, text, model=model)
    with refused:
        pool(sae, model, ["some words " * 40] * 3, 256)
    with refused:
        SplicedModel.load(directory, 1, context_length=256)
    with refused:
        load_config(directory, (1,), 256)


@pytest.mark.parametrize(
    "family",
    ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mpt", "opt-350m", "rwkv"))],
)
@pytest.mark.slow
def test_what_trains_has_a_report_and_can_be_evaluated(family: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(
        "\n\n".join(f"Line {i} of a text with words." for i in range(900))
    )
    text = ["--text-files", str(tmp_path / "a.txt")]
    sizes = {
        "layer": 1,
        "context-length": 64,
        "k": 4,
        "d-sae": 128,
        "tokens": 4096,
        "batch-size": 512,
    }
    sizes |= {"pool-tokens": 4096, "eval-tokens": 1024}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    others = [
        "--quantization",
        "none",
        "--out",
        str(tmp_path),
        "--name",
        "run",
        "--wandb",
        "disabled",
    ]
    assert main(["train", "--model", models.family(family), *text, *flags, *others]) == 0
    run = str(tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["report"] == "report.html"
    assert main(["evaluate", run]) == 0
    elsewhere = tmp_path / "elsewhere"
    assert main(["evaluate", run, *text, "--tokens", "500", "--out", str(elsewhere)]) == 0
    found = json.loads((elsewhere / "evaluation.json").read_text())
    assert found["losses"]["clean"] and (elsewhere / "report.html").is_file()


def test_tokens_without_an_embedding_are_refused():
    model, tokenizer = SplicedModel.load(models.llama(), 1), models.tokenizer()
    with pytest.raises(StreamError, match=r"token 512, and .* has embeddings for 512"):
        model.residual(torch.tensor([[2, 512]]))
    from fastsae.lm.encoding import Encoder

    with pytest.raises(StreamError, match=r"gives token \d+, and the language model .* for 100"):
        Encoder(tokenizer, embeddings=100)(["ü"])


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_checkpoint_that_is_quantized_already_names_the_remedy(
    tmp_path: Path, stored: dict, method: str
):
    config = json.loads((Path(models.llama()) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    for quantization in ("nf4", "nf4-bf16", "nf4-dequantized"):
        with pytest.raises(
            ConfigError, match=rf"quantized already \({method}\).*--quantization none"
        ):
            CutModel.load(str(tmp_path), (1,), quantization=quantization)


# --- overflow in fp16 ---


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose MLP products pass fp16's 65,504 for some tokens."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = AutoModelForCausalLM.from_pretrained(models.llama())
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 77
        mlp.gate_proj.weight *= 77
        mlp.down_proj.weight /= 77**2
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return str(folder)


def test_nf4_may_compute_in_bf16(overflowing: str):
    tokens = torch.randint(4, 260, (4, 40), generator=torch.Generator().manual_seed(0))
    lost = {}
    for quantization in ("nf4", "nf4-dequantized", "nf4-bf16", "none"):
        part = CutModel.load(overflowing, (1,), quantization=quantization)
        finite = part.residuals(tokens)[0].isfinite().all(-1)
        lost[quantization] = float((~finite).float().mean())
        computing = {
            m.compute_dtype for m in part._decoder.modules() if hasattr(m, "compute_dtype")
        }
        assert computing == {
            "nf4": {torch.float16}, "nf4-bf16": {torch.bfloat16}
        }.get(quantization, set())  # fmt: skip
    assert lost["none"] == lost["nf4-bf16"] == 0
    assert 0 < lost["nf4-dequantized"] < 0.5


def test_a_run_says_how_much_overflows(overflowing: str, tmp_path: Path, caplog):
    (tmp_path / "a.txt").write_text("\n\n".join(f"Line {i} of a text." for i in range(900)))
    caplog.set_level("WARNING", logger="fastsae")
    for quantization, expected in (("nf4-dequantized", True), ("nf4-bf16", False)):
        config = TrainConfig(
            model=overflowing, layer=1, quantization=quantization, context_length=64, k=4, d_sae=128,
            text_files=(str(tmp_path / "a.txt"),), tokens=2048, batch_size=512, pool_tokens=2048,
            eval_tokens=512, log_every_tokens=512, out=str(tmp_path), name=quantization, wandb="disabled",
        )  # fmt: skip
        caplog.clear()
        Trainer(config).fit()
        told = [r.getMessage() for r in caplog.records if "nf4-bf16, which" in r.getMessage()]
        last = json.loads((tmp_path / quantization / "metrics.jsonl").read_text().splitlines()[-1])
        assert len(told) == expected and (last["nonfinite"] > 0) == expected
        summary = json.loads((tmp_path / quantization / "summary.json").read_text())
        assert summary["nonfinite"] == last["nonfinite"] and summary["documents"] > 0


# --- revisions and fingerprints ---


def test_a_folder_of_a_model_has_no_revision():
    for name in (models.llama(), "glassllm"):
        with pytest.raises(ConfigError, match="revision = 'v1', but .* has no revisions"):
            load_config(name, revision="v1")


@pytest.mark.slow
def test_a_revision_of_the_hub_is_asked_for_and_kept(tmp_path: Path):
    code = (
        "from fastsae.lm.hooked import CutModel, SplicedModel\n"
        "part = CutModel.load('me/llama', (1,), revision='v1')\n"
        "whole = SplicedModel.load('me/llama', 1, revision='v1', context_length=64)\n"
        "print('found', part.weights['commit'], whole.weights['commit'])"
    )
    with hub_stand_in.hub() as server:
        files = {f.name: f.read_bytes() for f in Path(models.llama()).iterdir()}
        server.repositories["me/llama"] = hub_stand_in.Repository(files=files, commits=["first"])
        sha = server.repositories["me/llama"].sha
        wanted = {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = os.environ | wanted | {"HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert f"found {sha} {sha}" in done.stdout, done.stderr
        offline = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert f"found {sha} {sha}" in offline.stdout, offline.stderr
    asked = {r.split("/resolve/")[1].split("/")[0] for r in server.requests if "/resolve/" in r}
    assert asked == {sha}  # files by the commit that the name stood for
    assert any(r.endswith("/revision/v1") for r in server.requests)


def test_weights_that_were_replaced_are_noticed(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(models.llama())
    model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    before = CutModel.load(str(tmp_path), (1,)).weights
    assert before == CutModel.load(str(tmp_path), (1,)).weights
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    with torch.no_grad():  # fine-tuned, say: names, shapes and sizes stay
        for parameter in model.parameters():
            parameter += 1e-3
    model.save_pretrained(tmp_path)
    after = CutModel.load(str(tmp_path), (1,)).weights
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
