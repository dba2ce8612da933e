"""Evaluation against its definitions, against SAELens's evaluator, and on every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from small_saes import activations, pca_explained_variance, small_sae
from torch.nn.functional import cross_entropy as plain_cross_entropy

import fastsae
from fastsae import ConfigError, HeldOutText, SplicedModel
from fastsae.cli import main
from fastsae.evaluation import losses
from fastsae.evaluation.estimates import DocumentSums
from fastsae.evaluation.evaluate import evaluate, inference_modes, whole_passes

SAELENS = 2e-5
"""Both sides sum the same float32 terms in another order; ours sums in float64."""


def text_for(spliced: SplicedModel, documents: int = 6, context: int = 24) -> HeldOutText:
    texts = [f"Document {i} says {'some words ' * (i + 1)}and ends." for i in range(documents)]
    return HeldOutText.tokenize(texts, spliced.tokenizer, context)


def test_scores_are_what_they_are_defined_as() -> None:
    sae, x = small_sae(), activations(300, 12)
    result = evaluate(sae, x, batch_size=7)
    assert list(result.scores) == ["topk", "threshold", "batch"] == list(inference_modes(sae))
    for mode in ("topk", "threshold"):
        scores = result[mode]
        with torch.no_grad():
            z, y = sae.encode(x, mode), sae(x, mode)
        error = (x - y).double().square()
        variance = (x - x.mean(0)).double().square().sum()
        assert scores.explained_variance == pytest.approx(float(1 - error.sum() / variance))
        assert scores.mse == pytest.approx(float(error.mean()))
        assert scores.normalized_mse == pytest.approx(
            float(error.sum() / x.double().square().sum())
        )
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).mean()
        assert scores.cosine == pytest.approx(float(cosine), rel=1e-5)
        l0 = (z > 0).sum(1)
        assert scores.l0 == pytest.approx(float(l0.double().mean()))
        assert scores.l0_counts.equal(torch.bincount(l0))
        assert scores.l0_quantile(0.5) == l0.sort().values[149]
        assert scores.density.equal((z > 0).double().mean(0))
        assert scores.alive + scores.dead == 40
        assert scores.explained_variance.low < scores.explained_variance
        assert scores.explained_variance.high > scores.explained_variance
        assert sum(scores.density_histogram()["counts"]) == scores.alive


def test_pca_is_scored_on_rows_it_was_not_fitted_to() -> None:
    x = activations(60, 12).double()
    error = 0.0
    for fitted, scored in ((x[::2], x[1::2]), (x[1::2], x[::2])):
        directions = torch.linalg.svd(fitted - fitted.mean(0))[2][:3]
        rest = scored - fitted.mean(0)
        error += float((rest - rest @ directions.T @ directions).square().sum())
    expected = 1 - error / float((x - x.mean(0)).square().sum())
    assert pca_explained_variance(x, 3) == pytest.approx(expected, rel=1e-9)
    # Noise of 60 rows in 12 dimensions: what is fitted to itself would look better.
    assert pca_explained_variance(x, 12) == pytest.approx(1)


def test_the_bootstrap_draws_documents() -> None:
    sums = DocumentSums()
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 5
    documents = torch.arange(400)
    # 50 tokens of each document say the same: they must not make the interval narrower.
    sums.add(documents.repeat(50), value=values.repeat(50), n=torch.ones(20_000))
    mean = sums.estimate(lambda v, n: v / n, "value", "n")
    assert mean == pytest.approx(float(values.mean()))
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.15)


MODELS = {"llama": models.llama, "gemma": models.gemma4_text, "towers": models.gemma4_multimodal}


@pytest.mark.parametrize("name", MODELS)
def test_splicing_the_residual_in_changes_nothing(name: str) -> None:
    model = SplicedModel.load(MODELS[name](), 3)
    batch = next(text_for(model).batches(4))
    logits, residual = model.logits(batch.tokens)
    assert model.residual(batch.tokens).equal(residual)
    assert model.logits(batch.tokens, residual)[0].equal(logits)
    changed = model.logits(batch.tokens, torch.zeros_like(residual))[0]
    assert not torch.allclose(changed, logits)
    again = model.logits(batch.tokens)[0]
    assert again.equal(logits), "a hook was left behind"


def test_losses_are_what_they_are_defined_as() -> None:
    model = SplicedModel.load(models.llama(), 2)
    text, sae = text_for(model), small_sae(64, 128, 8)
    result = evaluate(sae, text, "topk", model=model, rows=2)
    expected: dict[str, list[torch.Tensor]] = {"clean": [], "zero": [], "topk": [], "kl": []}
    for batch in text.batches(1):
        clean, residual = model.logits(batch.tokens)
        replaced = residual.where(~batch.text[..., None], sae(residual, "topk"))
        logits = {
            "clean": clean,
            "zero": model.logits(batch.tokens, torch.zeros_like(residual))[0],
            "topk": model.logits(batch.tokens, replaced)[0],
        }
        counted = batch.text[0, :-1]
        for name, value in logits.items():
            loss = plain_cross_entropy(value[0, :-1], batch.tokens[0, 1:], reduction="none")
            expected[name].append(loss[counted])
        p, q = clean.log_softmax(-1), logits["topk"].log_softmax(-1)
        expected["kl"].append((p.exp() * (p - q)).sum(-1)[batch.text])
    mean = {name: float(torch.cat(parts).mean()) for name, parts in expected.items()}
    assert result.losses["clean"] == pytest.approx(mean["clean"], rel=1e-5)
    assert result.losses["zero"] == pytest.approx(mean["zero"], rel=1e-5)
    assert result["topk"].cross_entropy == pytest.approx(mean["topk"], rel=1e-5)
    assert result["topk"].kl == pytest.approx(mean["kl"], rel=1e-4)


def test_logits_are_formed_where_they_are_measured_a_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SplicedModel.load(models.llama(), 2)
    text, sae = text_for(model), small_sae(64, 128, 8)
    whole = evaluate(sae, text, "topk", model=model)
    formed, head = [], SplicedModel.head
    monkeypatch.setattr(
        SplicedModel, "head", lambda self, x: (formed.append(len(x)), head(self, x))[1]
    )
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 5 * model.vocabulary)
    parts = evaluate(sae, text, "topk", model=model)
    assert max(formed) == 5 and sum(formed) == whole_passes(["topk"]) * text.tokens
    assert sum(formed) < whole_passes(["topk"]) * sum(map(len, text.rows))  # no logits at BOS
    for name, value in whole.losses.items():
        assert parts.losses[name] == pytest.approx(value, rel=1e-5), name
    assert parts["topk"].kl == pytest.approx(whole["topk"].kl, rel=1e-5)
    assert parts["topk"].loss_recovered == pytest.approx(whole["topk"].loss_recovered, rel=1e-5)


def test_outliers_are_left_out_and_left_as_they_are() -> None:
    model = SplicedModel.load(models.llama(), 2)
    text, sae = text_for(model), small_sae(64, 128, 8)
    (batch,) = text.batches(len(text))
    residual = model.residual(batch.tokens)
    norms = residual.norm(dim=-1)
    kept = batch.text & (norms <= 1.1 * norms[batch.text].median())
    assert 0 < int((batch.text & ~kept).sum()) < int(batch.text.sum()) / 2
    result = evaluate(sae, text, "topk", model=model, rows=len(text), outlier_norm=1.1)
    alone = evaluate(sae, residual[kept], "topk")
    assert result.tokens == alone.tokens == int(kept.sum())
    assert result.outliers == int((batch.text & ~kept).sum())
    assert result.nonfinite == 0
    assert result["topk"].explained_variance == pytest.approx(alone["topk"].explained_variance)
    assert result["topk"].fired.equal(alone["topk"].fired)
    replaced = residual.clone()
    replaced[kept] = sae(residual[kept], "topk")
    logits = model.logits(batch.tokens, replaced)[0]
    losses = plain_cross_entropy(
        logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none"
    )
    inside = torch.arange(1, logits.shape[1]) < batch.lengths[:, None]
    expected = losses[batch.text[:, :-1] & inside].mean()
    assert result["topk"].cross_entropy == pytest.approx(float(expected), rel=1e-5)
    assert evaluate(sae, text, "topk", model=model, outlier_norm=float("inf")).outliers == 0


class _Hooked:
    """A transformers model as SAELens's evaluator calls a model: logits, losses per token, hooks."""

    def __init__(self, model: SplicedModel, name: str) -> None:
        self.model, self.name, self.tokenizer = model, name, model.tokenizer

    def __call__(self, tokens, replacement=None, **_):
        logits = self.model.logits(tokens, replacement)[0]
        flat = plain_cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return logits, flat

    def run_with_hooks(self, tokens, fwd_hooks, **_):
        ((name, hook),) = fwd_hooks
        assert name == self.name
        return self(tokens, hook(self.model.residual(tokens), None))

    def run_with_cache(self, tokens, **_):
        return None, {self.name: self.model.residual(tokens)}


def test_agrees_with_the_evaluator_of_saelens(tmp_path) -> None:
    evals = pytest.importorskip("sae_lens.evals")
    import sae_lens
    from sae_lens.training.activation_scaler import ActivationScaler

    model = SplicedModel.load(models.llama(), 2)
    sae = small_sae(64, 128, 8, metadata={"hook_name": "model.layers.2"})
    fastsae.save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 200, (12, 24), generator=generator)
    tokens[:, 0] = 2
    tokens[3, 10] = 1  # a special token in the middle: measured by neither
    special = [0, 1, 2, 3]
    text = HeldOutText(list(tokens), range(12), special, "random tokens")
    ours = evaluate(sae, text, "topk", model=model, rows=5)

    class Store:
        def get_batch_tokens(self, _rows):
            return tokens

    hooked = _Hooked(model, "blocks.2.hook_resid_post")
    shared = {"activation_scaler": ActivationScaler(), "eval_batch_size_prompts": 12}
    losses = evals.get_downstream_reconstruction_metrics(
        theirs, hooked, Store(), compute_kl=True, compute_ce_loss=True, n_batches=1,
        ignore_tokens=special, **shared,
    )  # fmt: skip
    scores, features = evals.get_sparsity_and_variance_metrics(
        theirs, hooked, Store(), n_batches=1, compute_l2_norms=False, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, model_kwargs={},
        ignore_tokens=special, **shared,
    )  # fmt: skip
    mine = ours["topk"]
    pairs = {
        "explained_variance": (mine.explained_variance, scores["explained_variance"]),
        "mse": (mine.mse * 64, scores["mse"]),
        "cosine": (mine.cosine, scores["cossim"]),
        "l0": (mine.l0, scores["l0"]),
        "ce": (mine.cross_entropy, losses["ce_loss_with_sae"]),
        "ce clean": (ours.losses["clean"], losses["ce_loss_without_sae"]),
        "ce zero": (ours.losses["zero"], losses["ce_loss_with_ablation"]),
        "kl": (mine.kl, losses["kl_div_with_sae"]),
        "kl zero": (ours.losses["kl_zero"], losses["kl_div_with_ablation"]),
    }
    for name, (a, b) in pairs.items():
        assert a == pytest.approx(b, rel=SAELENS), name
    # A ratio of differences of losses: their rounding is divided by the smaller difference.
    gap = abs(ours.losses["zero"] - ours.losses["clean"])
    bound = SAELENS * ours.losses["zero"] / gap * 4
    assert mine.loss_recovered == pytest.approx(losses["ce_loss_score"], abs=bound)
    assert mine.density.tolist() == pytest.approx(features["feature_density"], abs=1e-6)


def test_a_model_of_another_width_is_refused() -> None:
    model = SplicedModel.load(models.llama(), 2)
    with pytest.raises(ConfigError, match="width 12.*width 64"):
        evaluate(small_sae(), text_for(model), model=model)


def test_rows_hold_one_document_each_and_no_token_twice() -> None:
    tokenizer = models.tokenizer()
    texts = ["abcdefgh", "xy", "0123456789"]
    text = HeldOutText.tokenize(texts, tokenizer, 5, tokens=17)
    assert text.documents == [0, 0, 1, 2, 2]
    assert all(row[0] == tokenizer.bos_token_id for row in text.rows)
    assert "".join(tokenizer.decode(row[1:]) for row in text.rows) == "abcdefghxy0123456"
    assert text.tokens == 17


def test_a_part_is_whole_rows_evenly_spread() -> None:
    rows = [torch.tensor([2, *range(10 * i, 10 * i + 9)]) for i in range(1, 13)]
    text = HeldOutText(rows, range(12), [2], "numbers", "rows")
    part = text.part(20)  # 9 a row
    assert part.documents == [0, 4, 8] and part.tokens == 27
    assert all(a.equal(text.rows[i]) for i, a in zip(part.documents, part.rows, strict=True))
    assert (part.name, part.documents_are) == ("numbers", "rows")
    assert part.special_ids.equal(text.special_ids)
    assert text.part(1, fewest=5).documents == [0, 2, 4, 7, 9]
    assert text.part(100) is text.part(1, fewest=12) is text


def test_the_command(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = small_sae(64, 128, 8, metadata={"hook_name": "model.layers.2"})
    fastsae.save(sae, tmp_path / "sae")
    (tmp_path / "a.txt").write_text("Some words to read. \n\n" * 40)
    given = [
        "evaluate",
        str(tmp_path / "sae"),
        "--model",
        models.llama(),
        "--text-files",
        str(tmp_path / "a.txt"),
    ]
    assert main([*given, "--tokens", "300", "--context-length", "32"]) == 0
    assert "loss recovered" in capsys.readouterr().out
    saved = json.loads((tmp_path / "sae/evaluation.json").read_text())
    assert saved["tokens"] == 300 and set(saved["modes"]) == {"topk", "threshold", "batch"}
    assert (tmp_path / "sae/report.html").is_file()
    assert saved["outliers"] == 0
    assert main([*given, "--layer", "9"]) == 2
    assert "has 4 layers" in capsys.readouterr().err
    # What the SAE was trained with is what it is evaluated with, unless told otherwise.
    fastsae.save(
        small_sae(64, 128, 8, metadata=sae.metadata | {"outlier_norm": 1.01}), tmp_path / "sae"
    )
    quick = [*given, "--tokens", "300", "--no-report", "--no-losses"]
    for more, expected in (([], True), (["--outlier-norm", "inf"], False)):
        assert main([*quick, *more]) == 0
        assert (" is an outlier" in capsys.readouterr().out) == expected
    assert main([*quick, "--outlier-norm", "1"]) == 2
    assert "greater than 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--no-losses",)])
@pytest.mark.parametrize("texts", ["a", "aba"])
def test_texts_of_one_token(tmp_path: Path, texts: str, flags: tuple[str, ...]) -> None:
    """Nothing follows a token, so no prediction is measured; with one token, there is no variance either."""
    fastsae.save(small_sae(64, 128, 8, metadata={"hook_name": "model.layers.2"}), tmp_path / "sae")
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    of = ("--model", models.llama(), "--text-files", str(lines))
    assert main(["evaluate", str(tmp_path / "sae"), *of, *flags]) == 0
    found = json.loads((tmp_path / "sae/evaluation.json").read_text())
    assert found["tokens"] == found["documents"] == len(texts)
    scores = found["modes"]["topk"]
    assert (scores["explained_variance"]["value"] is None) == (len(texts) == 1)
    assert scores["l0"]["value"] > 0
    if not flags:
        assert scores["cross_entropy"]["value"] is found["losses"]["clean"]["value"] is None
        assert scores["kl"]["value"] > 0
    assert (tmp_path / "sae/report.html").exists()


def test_activations_that_are_not_finite_are_left_out() -> None:
    sae, x, modes = small_sae(), activations(50, 12), ("topk", "threshold")
    spoilt = x[:3].clone()
    spoilt[:, 5] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = evaluate(sae, torch.cat([x[:20], spoilt, x[20:]]), modes, batch_size=7)
    assert found.nonfinite == 3
    assert found.to_json() == evaluate(sae, x, modes, batch_size=7).to_json() | {"nonfinite": 3}
    with pytest.raises(fastsae.StreamError, match="none of the 3 activations is finite"):
        evaluate(sae, spoilt)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"expected activations \[N, 12\] as a tensor.* got ndarray"
    ):
        evaluate(small_sae(), activations(50, 12).numpy())
