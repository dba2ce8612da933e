"""Train on activations that another library harvests: SAELens's store, dictionary_learning's buffer.

    python examples/train_on_a_store.py saelens|dictionary_learning MODEL LAYER TEXT

``fastsae.train`` takes any iterable of ``[tokens, width]`` tensors, and both give one.
"""

import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastsae


def saelens(model: str, layer: int, texts: list[str], width: int) -> Iterator[Tensor]:
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.load_model import load_model

    return ActivationsStore(
        load_model("AutoModelForCausalLM", model, "cpu"), Dataset.from_dict({"text": texts}),
        hook_name=f"model.layers.{layer}", hook_head_index=None, d_in=width, context_size=64,
        prepend_bos=True, streaming=False, store_batch_size_prompts=8, n_batches_in_buffer=32,
        train_batch_size_tokens=256, total_training_tokens=40_960, normalize_activations="none",
        device="cpu", dtype="float32",
    ).get_data_loader()  # fmt: skip


def dictionary_learning(model: str, layer: int, texts: list[str], width: int) -> Iterator[Tensor]:
    try:
        from dictionary_learning import ActivationBuffer
        from nnsight import LanguageModel
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps -r benchmarks/peers.txt") from error
    tokenizer = AutoTokenizer.from_pretrained(model)
    traced = LanguageModel(AutoModelForCausalLM.from_pretrained(model), tokenizer=tokenizer)
    return ActivationBuffer(
        cycle(texts), traced, traced.model.layers[layer], d_submodule=width, n_ctxs=64, ctx_len=64,
        refresh_batch_size=16, out_batch_size=256,
    )  # fmt: skip


def main(library: str, model: str, layer: str, text: str) -> fastsae.SAE:
    texts = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    harvest = {"saelens": saelens, "dictionary_learning": dictionary_learning}[library]
    batches = harvest(model, int(layer), texts, AutoConfig.from_pretrained(model).hidden_size)
    config = fastsae.TrainConfig(d_sae=512, k=16, lr=1e-3, tokens=40_960)
    sae = fastsae.train(batches, config)
    scores = fastsae.evaluate(sae, next(batches))["topk"]  # the batch after those trained on
    print(f"{library}: explained variance {scores.explained_variance:.3f}, L0 {scores.l0:.1f}")
    return sae


if __name__ == "__main__":
    main(*sys.argv[1:])
