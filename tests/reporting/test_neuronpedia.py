"""The export for Neuronpedia: the files and columns of its import, and in them what the report has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from small_saes import small_sae

from fastsae import ConfigError, HeldOutText, SplicedModel
from fastsae.cli import main
from fastsae.evaluation.evaluate import evaluate
from fastsae.reporting.dashboard.collect import AFTER, BEFORE, Collector
from fastsae.reporting.dashboard.geometry import TokenNames, neighbours
from fastsae.reporting.neuronpedia import Names, export

PUBLISHED: dict[str, dict[str, str]] = {
    "release": {
        "name": "String", "visibility": "Visibility", "isNewUi": "Boolean", "featured": "Boolean",
        "description": "String", "descriptionShort": "String?", "urls": "String[]", "creatorEmail": "String?",
        "creatorName": "String", "creatorNameShort": "String?", "creatorId": "String",
        "defaultSourceSetName": "String?", "defaultSourceId": "String?", "defaultUmapSourceIds": "String[]",
        "createdAt": "DateTime",
    },
    "model": {
        "id": "String", "displayNameShort": "String", "displayName": "String", "creatorId": "String",
        "tlensId": "String?", "dimension": "Int?", "visibility": "Visibility", "inferenceEnabled": "Boolean",
        "instruct": "Boolean", "layers": "Int", "neuronsPerLayer": "Int", "createdAt": "DateTime",
        "owner": "String", "website": "String?",
    },
    "sourceset": {
        "modelId": "String", "name": "String", "hasDashboards": "Boolean", "visibility": "Visibility",
        "description": "String", "type": "String", "creatorName": "String", "urls": "String[]",
        "creatorEmail": "String?", "creatorId": "String", "releaseName": "String?", "createdAt": "DateTime",
    },
    "source": {
        "id": "String", "modelId": "String", "hasDashboards": "Boolean", "inferenceEnabled": "Boolean",
        "saelensRelease": "String?", "saelensSaeId": "String?", "hfRepoId": "String?", "hfFolderId": "String?",
        "visibility": "Visibility", "setName": "String", "creatorId": "String", "num_prompts": "Int?",
        "num_tokens_in_prompt": "Int?", "dataset": "String?", "notes": "String?", "createdAt": "DateTime",
    },
    "features": {
        "modelId": "String", "layer": "String", "index": "String", "sourceSetName": "String?",
        "creatorId": "String?", "createdAt": "DateTime", "maxActApprox": "Float?", "hasVector": "Boolean",
        "vector": "Float[]", "vectorLabel": "String?", "hookName": "String?", "topkCosSimIndices": "Int[]",
        "topkCosSimValues": "Float[]", "neuron_alignment_indices": "Int[]",
        "neuron_alignment_values": "Float[]", "neuron_alignment_l1": "Float[]",
        "correlated_neurons_indices": "Int[]", "correlated_neurons_pearson": "Float[]",
        "correlated_neurons_l1": "Float[]", "correlated_features_indices": "Int[]",
        "correlated_features_pearson": "Float[]", "correlated_features_l1": "Float[]", "neg_str": "String[]",
        "neg_values": "Float[]", "pos_str": "String[]", "pos_values": "Float[]", "frac_nonzero": "Float",
        "freq_hist_data_bar_heights": "Float[]", "freq_hist_data_bar_values": "Float[]",
        "logits_hist_data_bar_heights": "Float[]", "logits_hist_data_bar_values": "Float[]",
        "decoder_weights_dist": "Float[]",
    },
    "activations": {
        "id": "String", "tokens": "String[]", "dataIndex": "String?", "index": "String", "layer": "String",
        "modelId": "String", "dataSource": "String?", "maxValue": "Float", "maxValueTokenIndex": "Int",
        "minValue": "Float", "values": "Float[]", "dfaValues": "Float[]", "creatorId": "String",
        "createdAt": "DateTime", "lossValues": "Float[]", "binMin": "Float?", "binMax": "Float?",
        "binContains": "Float?", "qualifyingTokenIndex": "Int?",
    },
}  # fmt: skip
"""The columns of the import's tables in Neuronpedia's published database schema (apps/webapp/prisma,
November 2026) that are not relations: ``?`` may be absent, ``[]`` are lists."""
TYPES = {"String": str, "DateTime": str, "Int": int, "Float": (int, float), "Boolean": bool}
NAMES = Names("llama-tiny", "res-test", "test-release", "A. Uthor", "clkht01d40000jv08hvalcvly")


def read(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    if (folder / f"{name}.jsonl").is_file():
        return read(folder / f"{name}.jsonl")
    files = sorted((folder / name).iterdir(), key=lambda path: int(path.name[6:].split(".")[0]))
    return [row for path in files for row in read(path)]


def check_columns(table: str, row: dict[str, Any]) -> None:
    """Fail unless ``row`` has every column that must be there, none that is not, and their types."""
    published = PUBLISHED[table]
    assert set(row) <= set(published), set(row) - set(published)
    assert {name for name, kind in published.items() if kind[-1] != "?"} <= set(row)
    for name, value in row.items():
        kind = published[name].rstrip("?")
        if kind == "Visibility":
            assert value in ("PUBLIC", "UNLISTED", "PRIVATE")
        elif kind.endswith("[]"):
            assert all(isinstance(v, TYPES[kind[:-2]]) for v in value), name
        else:
            assert isinstance(value, TYPES[kind]), name
            assert isinstance(value, bool) == (kind == "Boolean"), name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """An SAE of 300 latents, so that there are two batches, seen on 40 rows."""
    model = SplicedModel.load(models.llama(), 2)
    sae = small_sae(64, 300, 6, metadata={"hook_name": "model.layers.2"})
    texts = [f"Text number {i}, of some words: ü and more of them." for i in range(40)]
    text = HeldOutText.tokenize(texts, model.tokenizer, 32, name="some text")
    collector = Collector(sae.d_sae, top=3, random=2)
    evaluate(sae, text, "topk", model=model, losses=False, observers=[collector])
    folder = export(tmp_path_factory.mktemp("np"), sae, collector, model, text, NAMES)
    return folder, sae, collector, model, text


def test_files_are_where_the_import_looks(exported) -> None:
    folder = exported[0]
    assert folder.parts[-2:] == ("llama-tiny", "2-res-test")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    single = {f"{name}.jsonl" for name in ("release", "model", "sourceset", "source")}
    batches = {f"{name}/batch-{i}.jsonl.gz" for name in ("features", "activations") for i in (0, 1)}
    assert found == single | batches


@pytest.mark.parametrize("table", PUBLISHED)
def test_columns_are_the_published_ones(exported, table: str) -> None:
    rows = rows_of(exported[0], table)
    assert rows
    for row in rows:
        check_columns(table, row)


def test_rows_refer_to_each_other(exported) -> None:
    folder, sae = exported[:2]
    release, model, source_set, source = (
        rows_of(folder, name)[0] for name in ("release", "model", "sourceset", "source")
    )
    assert source_set["releaseName"] == release["name"] == "test-release"
    assert source_set["modelId"] == source["modelId"] == model["id"] == "llama-tiny"
    assert source["setName"] == source_set["name"] and source["id"] == "2-res-test"
    assert (model["layers"], model["dimension"]) == (4, 64)
    features, activations = rows_of(folder, "features"), rows_of(folder, "activations")
    assert [row["index"] for row in features] == [str(i) for i in range(sae.d_sae)]
    known = {row["index"] for row in features}
    for row in (*features, *activations):
        assert (row["modelId"], row["layer"]) == ("llama-tiny", "2-res-test")
        assert row["index"] in known
    assert {row["hookName"] for row in features} == {"blocks.2.hook_resid_post"}
    ids = [row["id"] for row in activations]
    assert len(set(ids)) == len(ids) and {len(i) for i in ids} == {25}


def test_features_are_what_was_collected(exported) -> None:
    folder, sae, collector, *_ = exported
    near = neighbours(sae)
    for i, row in enumerate(rows_of(folder, "features")):
        assert row["topkCosSimIndices"] == near.indices[i].tolist()
        assert row["frac_nonzero"] == pytest.approx(
            int(collector.fired[i]) / collector.tokens, rel=1e-3
        )
        assert row["maxActApprox"] == pytest.approx(float(collector.max[i]), rel=1e-3)
        assert sum(row["freq_hist_data_bar_heights"]) == int(collector.fired[i])
        assert len(row["pos_str"]) == len(row["pos_values"]) == len(row["neg_str"]) == 10
        decoder = sae.W_dec[i].detach()
        assert abs(row["neuron_alignment_values"][0]) == pytest.approx(
            float(decoder.abs().max()), rel=1e-3
        )


def test_activations_are_the_passages(exported) -> None:
    """Against the latents themselves, computed anew for every row of the text."""
    folder, sae, collector, model, text = exported
    names = TokenNames(model.tokenizer)
    rows = rows_of(folder, "activations")
    kept = sum(
        int(passages.keys.isfinite().sum()) for passages in (collector.top, collector.random)
    )
    assert len(rows) == kept > 500
    for row in rows[::37]:
        ids = text.rows[int(row["dataIndex"])].long()
        z = sae.encode(model.residual(ids[None])[0], "topk")[:, int(row["index"])].detach()
        z[torch.isin(ids, text.special_ids)] = 0  # not measured
        position = int(z.argmax())
        start, end = max(0, position - BEFORE), position + AFTER + 1
        assert row["tokens"] == names.row(ids.tolist())[start:end]
        torch.testing.assert_close(
            torch.tensor(row["values"]).float(), z[start:end], rtol=1e-3, atol=1e-6
        )
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert row["qualifyingTokenIndex"] == position - start
        if row["binMin"] != -1:
            assert row["maxValue"] <= row["binMax"] * 1.001


def test_exporting_again_replaces_what_is_there(exported, tmp_path: Path) -> None:
    _, sae, collector, model, text = exported
    first = export(tmp_path, sae, collector, model, text, NAMES)
    ids = [row["id"] for row in rows_of(first, "activations")]
    (first / "features/batch-9.jsonl.gz").write_bytes(b"left over")
    again = export(tmp_path, sae, collector, model, text, NAMES)
    assert first == again and [row["id"] for row in rows_of(again, "activations")] == ids
    assert not (first / "features/batch-9.jsonl.gz").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fastsae

    metadata = {"model_name": models.llama(), "hook_name": "model.layers.2", "context_size": 32}
    fastsae.save(small_sae(64, 48, 4, metadata=metadata), tmp_path / "sae")
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of words." for i in range(60)))
    command = [
        "export",
        str(tmp_path / "sae"),
        "--text-files",
        str(tmp_path / "a.txt"),
        "--tokens",
        "400",
    ]
    command += ["--device", "cpu"]
    assert main([*command, "--neuronpedia", str(tmp_path / "np"), "--model-id", "tiny"]) == 0
    folder = tmp_path / "np/tiny/2-res-fastsae"
    assert str(folder) in capsys.readouterr().out
    assert len(rows_of(folder, "features")) == 48
    assert main(command) == 2
    assert "give a folder with --neuronpedia" in capsys.readouterr().err
    assert main([*command, "--neuronpedia", str(tmp_path), "--source-set", "a b"]) == 2
    assert "source_set = 'a b': Neuronpedia's ids are of letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hook", "source_set"),
    [("mlp_out", "mlp-fastsae"), ("attn_out", "att-fastsae"), ("mlp_in", "transcoder-fastsae")],
)
def test_at_other_places(hook: str, source_set: str, tmp_path: Path) -> None:
    import fastsae

    target = {"target": "mlp_out"} if hook == "mlp_in" else {}
    (tmp_path / "a.txt").write_text("\n".join(f"Line {i} of words." for i in range(200)))
    config = fastsae.TrainConfig(
        model=models.llama(), layer=2, hook=hook, d_sae=48, k=4, tokens=512, batch_size=128, pool_tokens=256,
        eval_tokens=256, context_length=32, text_files=(str(tmp_path / "a.txt"),), quantization="none",
        device="cpu", out=str(tmp_path), name="run", report="none", wandb="disabled", **target,
    )  # fmt: skip
    fastsae.Trainer(config).fit()
    command = ["export", str(tmp_path / "run"), "--device", "cpu", "--model-id", "tiny"]
    assert main([*command, "--neuronpedia", str(tmp_path / "np")]) == 0
    folder = tmp_path / f"np/tiny/2-{source_set}"
    features = rows_of(folder, "features")
    assert len(features) == 48 and features[0]["hookName"].startswith("blocks.2.")


def test_ids_that_make_no_path() -> None:
    with pytest.raises(ConfigError, match=r"model = '\.\./x'"):
        Names("../x", "a", "b", "c", "d")
