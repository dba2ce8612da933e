"""End to end on a GPU: a language model of Gemma 4 E2B's exact shape in NF4, and the SAE that eats its
activations.

The weights are random and the tokens are bytes: a forward pass costs the same, and nothing has to be
downloaded. ``run`` measures the harvest alone, the training step alone, and both together, one after
the other and beside each other; for packed and for dequantized weights.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu import Report
from torch import Tensor, nn

E2B: dict[str, Any] = {
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "use_double_wide_mlp": True,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": 30.0,
}


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are the recipe. ``text`` overrides fields of the model's config."""

    layer: int = 17
    d_sae: int = 24_576
    k: int = 64
    batch_size: int = 1024
    context_length: int = 1024
    harvest_batch: int = 8
    pool_tokens: int = 262_144
    tokens: int = 2_097_152
    quantizations: tuple[str, ...] = ("nf4", "nf4-dequantized")
    device: str = "cuda"
    text: dict[str, Any] = field(default_factory=lambda: dict(E2B))


def run(report: Report, case: Case | None = None) -> None:
    """One row a stage and quantization; one that says why, where CUDA or a package is missing."""
    case = case or Case()
    skipped = None
    if case.device == "cuda" and not torch.cuda.is_available():
        skipped = "no CUDA device"
    for package in ("bitsandbytes", "transformers", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            skipped = f"{package} is not installed"
    if skipped:
        report.add(part="stream", skipped=skipped)
        return
    for quantization in case.quantizations:
        for row in _measure(case, quantization):
            report.add(**row)


def _measure(case: Case, quantization: str) -> Iterator[dict[str, Any]]:
    import fastsae
    from fastsae.data.buffer import ActivationBuffer

    device = torch.device(case.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(case, quantization)
    config = fastsae.TrainConfig(
        d_sae=case.d_sae,
        k=case.k,
        batch_size=case.batch_size,
        tokens=case.tokens,
        device=case.device,
        log_every_tokens=10 * case.tokens,
    )

    def buffer(ahead: bool) -> ActivationBuffer:
        return ActivationBuffer(
            _chunks(case, model),
            batch_size=case.batch_size,
            pool_tokens=case.pool_tokens,
            seed=0,
            ahead=ahead,
        )

    def row(stage: str, tokens: int, call: Callable[[], object]) -> dict[str, Any]:
        seconds = _timed(call, device)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        return {
            "quantization": quantization,
            "stage": stage,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_bytes": model.memory_bytes,
            "peak_bytes": peak,
        }

    chunks = _chunks(case, model)
    forward_passes = max(2, case.tokens // (8 * chunks.chunk_tokens))
    ready = [chunks.draw() for _ in range(forward_passes + 1)]
    chunks.harvest(ready.pop())

    def harvest() -> None:
        for chunk in ready:
            chunks.harvest(chunk)

    yield row("harvest", forward_passes * chunks.chunk_tokens, harvest)

    # Training is timed on one batch again and again, by the difference of two runs: the start of a run
    # (initial values, compilation of kernels) is in both.
    batch = buffer(ahead=False).next_batch()[0]
    steps = max(2, case.tokens // (4 * case.batch_size))
    train = lambda n: fastsae.train([batch] * n, config)
    train(2)
    start = _timed(lambda: train(2), device)
    whole = row("step", steps * case.batch_size, lambda: train(2 + steps))
    seconds = max(whole["seconds"] - start, 1e-9)
    yield whole | {"seconds": seconds, "tokens_per_second": whole["tokens"] / seconds}

    for ahead in (False, True):
        stream = buffer(ahead)
        batches = (layers[0] for layers in iter(stream.next_batch, None))
        name = "end to end, overlapped" if ahead else "end to end, in turn"
        yield row(
            name, config.steps * config.batch_size, lambda b=batches: fastsae.train(b, config)
        )


def random_model(case: Case, quantization: str) -> Any:
    """A ``CutModel`` with random weights: quantized layer by layer, cut after the hooked one."""
    import bitsandbytes
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    from fastsae.lm.hooked import CutModel

    torch.manual_seed(0)
    config = Gemma4TextConfig(**case.text)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(case.device):
            model = Gemma4ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    decoder = model.get_decoder()
    for parent in list(decoder.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False,
                    compute_dtype=torch.float16, quant_type="nf4", device="meta",
                )  # fmt: skip
                packed.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data.cpu(),
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=False,
                    module=packed,
                )
                setattr(parent, name, packed.to(case.device).eval())
    return CutModel(
        model, _byte_tokenizer(), (case.layer,), name="random E2B", quantization=quantization
    )


def _chunks(case: Case, model: Any) -> Any:
    from fastsae.data.harvest import TextChunks
    from fastsae.data.text import TextSource
    from fastsae.data.tokens import TokenPacker

    def read(seed: int) -> Iterator[str]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            letters = torch.randint(97, 123, (4000,), generator=generator)
            yield bytes(letters.tolist()).decode()

    text = TextSource([0], read, name="random letters", seed=0)
    packer = TokenPacker(text, model.tokenizer, case.context_length)
    return TextChunks(packer, model, harvest_batch=case.harvest_batch, held_out_tokens=0)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def _timed(call: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def memory_table(text: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Bytes of weights that are kept when E2B is hooked at each layer, by precision: no weight is made.

    ``nf4``: half a byte a weight and a float32 scale for every 64, embeddings and norms in bf16.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**(text or E2B))
    with torch.device("meta"):
        decoder = Gemma4ForCausalLM(config).get_decoder()

    def elements(module: nn.Module, kind: Callable[[Tensor, str], bool]) -> int:
        return sum(p.numel() for n, p in module.named_parameters() if kind(p, n))

    linear = [elements(layer, lambda p, _: p.ndim == 2) for layer in decoder.layers]
    other = [elements(layer, lambda p, _: p.ndim != 2) for layer in decoder.layers]
    per_layer = ("embed_tokens_per_layer", "per_layer_model_projection")
    cut = sum(getattr(decoder, name).weight.numel() for name in per_layer)
    kept = elements(
        decoder, lambda _, n: not n.startswith("layers.") and n.split(".")[0] not in per_layer
    )
    rows = []
    for layer in range(config.num_hidden_layers):
        count = layer + 1
        packed = sum(linear[:count])
        rest = kept + sum(other[:count]) + cut * count // config.num_hidden_layers
        rows.append({
            "layer": layer,
            "nf4": packed // 2 + packed // 64 * 4 + 2 * rest,
            "nf4-dequantized": 2 * packed + 2 * rest,
            "bf16": 2 * (packed + rest),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    print("layer   nf4 GB   nf4-dequantized GB")
    for line in memory_table():
        print(
            f"{line['layer']:5}   {line['nf4'] / 1e9:6.2f}   {line['nf4-dequantized'] / 1e9:18.2f}"
        )
