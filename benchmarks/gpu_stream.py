"""End to end on a GPU: a language model of Gemma 4 E2B's exact shape in NF4, and the SAE that trains
on its activations.

The weights are random and the tokens are bytes: a forward pass costs the same, and nothing has to be
downloaded. ``measure`` times the harvest alone, the training step alone, and both, in turn and overlapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from measure import PeakMemory, seconds, two_lengths
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

from fastsae import TrainConfig, train
from fastsae.data.buffer import ActivationBuffer
from fastsae.data.harvest import TextChunks
from fastsae.data.text import TextSource
from fastsae.data.tokens import TokenPacker
from fastsae.device import resolve_device
from fastsae.lm.hooked import CutModel

E2B: dict[str, Any] = {
    "vocab_size": 262_144, "vocab_size_per_layer_input": 262_144, "hidden_size": 1536,
    "hidden_size_per_layer_input": 256, "intermediate_size": 6144, "use_double_wide_mlp": True,
    "num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "max_position_embeddings": 131_072, "final_logit_softcapping": 30.0,
}  # fmt: skip
TINY_TEXT = E2B | {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 128,
    "hidden_size_per_layer_input": 64, "intermediate_size": 128, "num_hidden_layers": 10,
    "num_kv_shared_layers": 4, "num_attention_heads": 4, "head_dim": 32, "global_head_dim": 64,
    "sliding_window": 16, "max_position_embeddings": 256,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
}  # fmt: skip
TINY = TrainConfig(
    layer=7, d_sae=256, k=4, batch_size=64, context_length=32, harvest_batch=2, pool_tokens=256,
    tokens=512, device="cpu",
)  # fmt: skip
"""The same at sizes that mean nothing, to see that it runs."""


def measure(config: TrainConfig, text: dict, quantization: str) -> Iterator[dict[str, Any]]:
    """One row a stage, in seconds per token; ``text``: the config of the language model."""
    device = str(resolve_device(config.device))
    memory = PeakMemory(device)
    model = random_model(config, text, quantization)
    config = replace(config, log_every_tokens=10 * config.tokens)

    def buffer(ahead: bool) -> ActivationBuffer:
        return ActivationBuffer(
            _chunks(config, model), batch_size=config.batch_size, seed=0,
            pool_tokens=config.pool_tokens, ahead=ahead,
        )  # fmt: skip

    def row(stage: str, tokens: int, spent: float) -> dict[str, Any]:
        name = f"{stage} | random Gemma 4 E2B, layer {config.layer}, {quantization}"
        return {
            "kind": "stream", "group": name, "trainer": "fastsae", "quantization": quantization,
            "stage": stage, "tokens": tokens, "seconds": [spent / tokens],
            "tokens_per_second": tokens / spent, "model_bytes": model.memory_bytes,
            "peak_mib": memory.mib,
        }  # fmt: skip

    chunks = _chunks(config, model)
    forward_passes = max(2, config.tokens // (8 * chunks.chunk_tokens))
    ready = [chunks.draw() for _ in range(forward_passes + 1)]
    chunks.harvest(ready.pop())

    def harvest() -> None:
        for chunk in ready:
            chunks.harvest(chunk)

    yield row("harvest", forward_passes * chunks.chunk_tokens, seconds(harvest, device))

    # Training is timed on one batch again and again, by the difference of two runs: the start of a run is in
    # both. A run before them compiles what the longer one launches.
    batch = buffer(ahead=False).next_batch()[0]

    def training(steps: int) -> float:
        this_long = replace(config, tokens=steps * config.batch_size)
        return seconds(lambda: train([batch] * steps, this_long), device)

    steps = max(32, config.tokens // (4 * config.batch_size))
    training(2 + steps)
    spent = two_lengths(training, 2, 2 + steps)
    yield row("step", config.batch_size, spent)

    for ahead in (False, True):
        stream = buffer(ahead)
        batches = (layers[0] for layers in iter(stream.next_batch, None))
        name = "end to end, overlapped" if ahead else "end to end, in turn"
        spent = seconds(lambda b=batches: train(b, config), device)
        yield row(name, config.steps * config.batch_size, spent)


def random_model(config: TrainConfig, text: dict[str, Any], quantization: str) -> Any:
    """A ``CutModel`` with random weights: if so, quantized layer by layer; cut after the hooked one."""
    torch.manual_seed(0)
    device, shape = resolve_device(config.device), Gemma4TextConfig(**text)
    with device:
        model = Gemma4ForCausalLM._from_config(shape, dtype=torch.bfloat16).eval()
    if quantization != "none":
        _quantize(model, device)
    return CutModel(
        model, _byte_tokenizer(), (config.layer,), name="random E2B", quantization=quantization
    )


def _quantize(model: Any, device: torch.device) -> None:
    """The linear layers to NF4."""
    import bitsandbytes

    for parent in list(model.get_decoder().layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False,
                    compute_dtype=torch.float16, quant_type="nf4", device="meta",
                )  # fmt: skip
                packed.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                    compress_statistics=False, module=packed,
                )  # fmt: skip
                setattr(parent, name, packed.to(device).eval())


def _chunks(config: TrainConfig, model: Any) -> Any:
    def read(seed: int) -> Iterator[str]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            letters = torch.randint(97, 123, (4000,), generator=generator)
            yield bytes(letters.tolist()).decode()

    text = TextSource([0], read, name="random letters", seed=0)
    packer = TokenPacker(text, model.tokenizer, config.context_length)
    return TextChunks(packer, model, harvest_batch=config.harvest_batch, held_out_tokens=0)


def _byte_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = FastTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def memory_table(text: dict[str, Any] = E2B) -> list[dict[str, Any]]:
    """Bytes of weights that are kept when E2B is hooked at each layer, by precision: no weight is made.

    ``nf4``: half a byte a weight and a float32 scale for every 64, embeddings and norms in bf16.
    """
    config = Gemma4TextConfig(**text)
    with torch.device("meta"):
        decoder = Gemma4ForCausalLM(config).get_decoder()
    layers = config.num_hidden_layers
    matrices, rest, cut, kept = [0] * layers, [0] * layers, 0, 0
    for name, p in decoder.named_parameters():
        if name.startswith("layers."):
            (matrices if p.ndim == 2 else rest)[int(name.split(".")[1])] += p.numel()
        elif name.startswith(("embed_tokens_per_layer", "per_layer_model_projection")):
            cut += p.numel()
        else:
            kept += p.numel()
    rows = []
    for n in range(1, layers + 1):
        packed, other = sum(matrices[:n]), kept + sum(rest[:n]) + cut * n // layers
        nf4 = packed // 2 + packed // 64 * 4 + 2 * other
        rows.append({"layer": n - 1, "nf4": nf4, "nf4-dequantized": 2 * (packed + other)})
    return rows


if __name__ == "__main__":
    for row in memory_table():
        gigabytes = (f"{name} {row[name] / 1e9:.2f} GB" for name in ("nf4", "nf4-dequantized"))
        print(f"layer {row['layer']:2}:  {',  '.join(gigabytes)}")
