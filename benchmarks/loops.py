"""Training with the language model in the loop, each by its own pipeline: seconds for so many tokens.

The demo's language model and text, one layer, the same dictionary size, k, learning rate and batch for
all. From text to trained SAE: fastsae's ``Trainer``; SAELens's ``LanguageModelSAETrainingRunner`` on its
wrapper of the same transformers model; sparsify's ``Trainer``, which wants its text tokenised beforehand
and runs every layer. dictionary_learning's buffer wants nnsight's wrapper and is left out.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.cli.presets import demo_config
from fastsae.data.demo_text import documents
from fastsae.lm.demo import load_model

F, K, B, CONTEXT, LAYER, LR = 2048, 16, 1024, 128, 2, 1e-3
SETTING = f"demo model (4 layers, width 128), layer {LAYER}, F={F}, k={K}, B={B}"
Reconstruct = Callable[[Tensor], Tensor]


def train_fastsae(tokens: int, step: str = "fused") -> tuple[float, Reconstruct]:
    from fastsae import Trainer

    with tempfile.TemporaryDirectory() as out:
        config = demo_config(
            d_sae=F, k=K, batch_size=B, layer=LAYER, lr=LR, tokens=tokens, out=out, step=step,
            dead_after_tokens=10_000_000, eval_tokens=B, checkpoint_every_tokens=10**9, wandb="disabled",
            device="cpu",
        )  # fmt: skip
        start = time.perf_counter()
        (sae,) = Trainer(config).fit()
        return time.perf_counter() - start, lambda x: sae(x, inference="batch")


def train_saelens(tokens: int) -> tuple[float, Reconstruct]:
    from datasets import Dataset
    from peers import quiet
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig

    start = time.perf_counter()
    hook = f"model.layers.{LAYER}"
    model, tokenizer = load_model()
    with quiet():
        runner = LanguageModelSAETrainingRunner(
            LanguageModelSAERunnerConfig(
                sae=BatchTopKTrainingSAEConfig(d_in=model.config.hidden_size, d_sae=F, k=K),
                model_name="demo",
                model_class_name="AutoModelForCausalLM",
                hook_name=hook,
                dataset_path="demo",
                streaming=False,
                context_size=CONTEXT,
                training_tokens=tokens,
                train_batch_size_tokens=B,
                store_batch_size_prompts=32,
                n_batches_in_buffer=64,
                lr=LR,
                device="cpu",
                n_checkpoints=0,
                checkpoint_path=None,
                output_path=None,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            override_dataset=Dataset.from_dict({"text": documents()}),
            override_model=HookedProxyLM(model, tokenizer, [hook]),
        )
        sae = runner.run()
    return time.perf_counter() - start, sae.train()


def train_sparsify(tokens: int) -> tuple[float, Reconstruct]:
    import os

    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from datasets import Dataset
    from peers import quiet

    start = time.perf_counter()
    model, tokenizer = load_model()
    with quiet():
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        rows = torch.tensor(_token_ids(tokenizer, tokens)).view(-1, CONTEXT)
        trainer = Trainer(
            TrainConfig(
                SparseCoderConfig(num_latents=F, k=K),
                batch_size=B // CONTEXT,
                layers=[LAYER],
                log_to_wandb=False,
                save_every=10**9,
            ),
            Dataset.from_dict({"input_ids": rows}).with_format("torch"),
            model,
        )
        trainer.save = lambda: None
        trainer.fit()
    (sae,) = trainer.saes.values()
    return time.perf_counter() - start, lambda x: sae(x).sae_out


@functools.cache
def _all_ids(tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return [t for ids in tokenizer(documents())["input_ids"] for t in (*ids, eos)]


def _token_ids(tokenizer, tokens: int) -> list[int]:
    found = _all_ids(tokenizer)
    if len(found) < tokens:
        raise ValueError(f"the demo's text has {len(found):,} tokens, fewer than {tokens:,}")
    return found[:tokens]


LOOPS: dict[str, Callable[[int], tuple[float, Reconstruct]]] = {
    "fastsae": train_fastsae,
    "fastsae, autograd": functools.partial(train_fastsae, step="autograd"),
    "SAELens": train_saelens,
    "sparsify": train_sparsify,
}


@functools.cache
def held_out() -> Tensor:
    """Activations ``[4 B, D]`` that everybody's SAE is judged by."""
    model, tokenizer = load_model()
    rows = torch.tensor(_all_ids(tokenizer)[-4 * B :]).view(-1, CONTEXT)
    kept = []
    hook = model.model.layers[LAYER].register_forward_hook(
        lambda module, inputs, output: kept.append(output if torch.is_tensor(output) else output[0])
    )
    with torch.no_grad():
        model(rows)
    hook.remove()
    return kept[0].flatten(0, 1)


def run(name: str, tokens: int) -> tuple[float, float]:
    """Seconds, and explained variance of the SAE that came out."""
    from fastsae_kernels.reference import explained_variance

    seconds, reconstruct = LOOPS[name](tokens)
    x = held_out()
    with torch.no_grad():
        found = torch.cat([reconstruct(part) for part in x.split(B)])
    return seconds, float(explained_variance(x, found))
