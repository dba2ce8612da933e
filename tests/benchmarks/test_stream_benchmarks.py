"""The benchmarks of the stream run, at a size for tests, and measure what they say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

import fastsae

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_stream")


@pytest.mark.parametrize("missing", ["a GPU", "bitsandbytes"])
@pytest.mark.slow
def test_skips_without(missing, tmp_path: Path) -> None:
    code = "import sys; sys.modules['bitsandbytes'] = None\n" if missing == "bitsandbytes" else ""
    arguments = ["benchmarks/bench_stream.py", "--device", "cpu", "--scale", "tiny", "--no-history"]
    if missing == "bitsandbytes":
        arguments += ["--shape", "64,64,512,8"]
    code += f"import pytest, sys; sys.exit(pytest.main({[*arguments, '-q', '-ra']!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    expected = "no CUDA device" if missing == "a GPU" else "could not import 'bitsandbytes'"
    # Without bitsandbytes, the one that is not quantized runs.
    skipped = 2 if missing == "bitsandbytes" else 3
    assert f"{skipped} skipped" in run.stdout and expected in run.stdout


@pytest.mark.slow
def test_measures_each_stage(gpu_stream) -> None:
    rows = [
        row
        for quantization in ("nf4", "nf4-dequantized", "none")
        for row in gpu_stream.measure(gpu_stream.TINY, gpu_stream.TINY_TEXT, quantization)
    ]
    stages = ["harvest", "step", "end to end, in turn", "end to end, overlapped"]
    found = [(row["quantization"], row["stage"]) for row in rows]
    assert found == [(q, stage) for q in ("nf4", "nf4-dequantized", "none") for stage in stages]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1 / row["seconds"][0])
        assert row["seconds"][0] > 0 and row["peak_mib"] > 0
    assert rows[0]["model_bytes"] < rows[4]["model_bytes"]


def test_the_random_model_is_quantized_and_cut(gpu_stream) -> None:
    import bitsandbytes

    model = gpu_stream.random_model(gpu_stream.TINY, gpu_stream.TINY_TEXT, "nf4")
    linears = [m for m in model._decoder.modules() if isinstance(m, torch.nn.Linear)]
    packed = [m for m in linears if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == len(linears) - 1 and len(model._decoder.layers) == 8
    (residual,) = model.residuals(torch.arange(40)[None])
    assert residual.isfinite().all() and residual.float().std() > 0


def test_the_memory_table_is_what_a_model_takes(gpu_stream) -> None:
    text = gpu_stream.TINY_TEXT
    table = gpu_stream.memory_table(text)
    for quantization in ("nf4", "nf4-dequantized"):
        kept = gpu_stream.random_model(gpu_stream.TINY, text, quantization).memory_bytes
        # The rotary frequencies and bitsandbytes's code book are not counted.
        assert table[gpu_stream.TINY.layer][quantization] == pytest.approx(kept, rel=0.03)
    for quantization in ("nf4", "nf4-dequantized"):
        kept = [row[quantization] for row in table]
        assert kept == sorted(kept)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("trainers").TRAINERS


@pytest.mark.parametrize("name", ["fastsae", "SAELens", "sparsify"])
def test_a_whole_run_is_timed_by_stage(trainers, name, tmp_path: Path) -> None:
    if (package := trainers[name].package) is not None:
        pytest.importorskip(package)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"Words {i} and more. " * 9}) + "\n" for i in range(200))
    )
    config = fastsae.TrainConfig(
        model=models.llama(), text_files=(str(text),), layer=2, k=4, expansion=2, tokens=1024,
        quantization="none", context_length=32, harvest_batch=4, pool_tokens=256, batch_size=64,
        eval_tokens=64, device="cpu", log_every_tokens=1024,
    )  # fmt: skip
    run = trainers[name].pipeline(config)
    stages = sum(seconds for stage, seconds in run.seconds.items() if stage != "total")
    assert stages == pytest.approx(run.seconds["total"])
    assert run.seconds["total"] > 0 and all(seconds >= 0 for seconds in run.seconds.values())
    x = importlib.import_module("trainers.text").held_out(config)
    assert 0 < len(x) <= 64
    with torch.no_grad():
        assert run.reconstruct(x).shape == x.shape
    json.dumps(run.seconds)
