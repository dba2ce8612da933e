"""The language model and the training together on a GPU; see ``gpu_stream``."""

import pytest

from fastsae import TrainConfig


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dequantized", "none"])
def bench_stream(request, report, device, quantization):
    for package in ("transformers", "tokenizers", *["bitsandbytes"] * (quantization != "none")):
        pytest.importorskip(package)
    import gpu_stream

    if device.startswith("cuda"):
        # The pool, which is filled before training begins, is a sixteenth of the run.
        config = TrainConfig(expansion=16, tokens=1_048_576, pool_tokens=65_536)
        text = gpu_stream.E2B
    elif request.config.getoption("--shape"):
        config, text = gpu_stream.TINY, gpu_stream.TINY_TEXT
    else:
        pytest.skip("no CUDA device")
    for row in gpu_stream.measure(config, text, quantization):
        report.add(**row)
