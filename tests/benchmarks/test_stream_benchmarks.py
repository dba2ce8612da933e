"""The benchmarks of the stream run, at a size for tests, and measure what they say."""

import importlib
import json
from pathlib import Path

import models
import pytest
import torch

import fastsae

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_stream")


def tiny(gpu_stream):
    text = gpu_stream.E2B | {
        "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 128,
        "hidden_size_per_layer_input": 64, "intermediate_size": 128, "num_hidden_layers": 10,
        "num_kv_shared_layers": 4, "num_attention_heads": 4, "head_dim": 32, "global_head_dim": 64,
        "sliding_window": 16, "max_position_embeddings": 256,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    }  # fmt: skip
    return gpu_stream.Case(
        layer=7, d_sae=256, k=4, batch_size=64, context_length=32, harvest_batch=2, pool_tokens=256,
        tokens=512, device="cpu", text=text,
    )  # fmt: skip


@pytest.fixture
def report(gpu_stream, tmp_path: Path):
    return gpu_stream.Report("stream", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would use")
def test_skips_without_a_gpu(gpu_stream, report) -> None:
    gpu_stream.run(report)
    assert report.rows == [{"part": "stream", "skipped": "no CUDA device"}]


def test_skips_without_bitsandbytes(gpu_stream, report, monkeypatch) -> None:
    find = gpu_stream.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_stream.importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else find(n)
    )
    gpu_stream.run(report, tiny(gpu_stream))
    assert report.rows == [{"part": "stream", "skipped": "bitsandbytes is not installed"}]


def test_measures_each_stage(gpu_stream, report, tmp_path: Path) -> None:
    gpu_stream.run(report, tiny(gpu_stream))
    rows = json.loads((tmp_path / "stream.json").read_text())["rows"]
    stages = ["harvest", "step", "end to end, in turn", "end to end, overlapped"]
    found = [(row["quantization"], row["stage"]) for row in rows]
    assert found == [(q, stage) for q in ("nf4", "nf4-dequantized") for stage in stages]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert rows[0]["model_bytes"] < rows[4]["model_bytes"]


def test_the_random_model_is_quantized_and_cut(gpu_stream) -> None:
    import bitsandbytes

    model = gpu_stream.random_model(tiny(gpu_stream), "nf4")
    linears = [m for m in model._decoder.modules() if isinstance(m, torch.nn.Linear)]
    packed = [m for m in linears if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == len(linears) - 1 and len(model._decoder.layers) == 8
    (residual,) = model.residuals(torch.arange(40)[None])
    assert residual.isfinite().all() and residual.float().std() > 0


def test_the_memory_table_is_what_a_model_takes(gpu_stream) -> None:
    case = tiny(gpu_stream)
    table = gpu_stream.memory_table(case.text)
    for quantization in ("nf4", "nf4-dequantized"):
        kept = gpu_stream.random_model(case, quantization).memory_bytes
        # The rotary frequencies and bitsandbytes's code book are not counted.
        assert table[case.layer][quantization] == pytest.approx(kept, rel=0.03)
    bf16 = [row["bf16"] for row in table]
    assert bf16 == sorted(bf16) and table[-1]["bf16"] == table[-1]["nf4-dequantized"]


def test_end_to_end_beside_saelens(monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    end_to_end = importlib.import_module("end_to_end")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"Words {i} and more. " * 9}) + "\n" for i in range(200))
    )
    config = fastsae.TrainConfig(
        model=models.llama(), text_files=(str(text),), layer=2, k=4, expansion=2, tokens=1024,
        quantization="none", context_length=32, harvest_batch=4, pool_tokens=256, batch_size=64,
        eval_tokens=64, device="cpu", log_every_tokens=1024,
    )  # fmt: skip
    result = end_to_end.compare(config, str(text), repeats=1)
    speeds = result["tokens_per_second"]
    assert result["tokens"] == 1024 and result["ratio"] == speeds["fastsae"] / speeds["saelens"]
    for name, (run,) in result["seconds"].items():
        stages = sum(seconds for stage, seconds in run.items() if stage != "total")
        assert stages == pytest.approx(run["total"]), name
        assert run["total"] > 0 and all(seconds >= 0 for seconds in run.values())
    json.dumps(result)
