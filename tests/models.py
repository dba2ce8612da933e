"""Small language models on disk, built in code: a Llama and a Gemma 4 in both checkpoint classes.

Sizes are multiples of 64, which bitsandbytes needs for NF4 on some CPUs.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
LLAMA_LAYERS = 4
GEMMA_LAYERS = 8
GEMMA_KV_SHARED = 4  # the last four layers use the keys and values of earlier ones


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="fastsae-models-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, after the special tokens: what goes in can be read off the ids."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        unk_token="<unk>",
    )


def _save(model, name: str) -> str:
    directory = _folder() / name
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


@functools.cache
def llama(layers: int = LLAMA_LAYERS) -> str:
    """Directory of a random Llama: 4 layers unless told otherwise, width 64, untied LM head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=1,
    )
    name = "llama" if layers == LLAMA_LAYERS else f"llama-{layers}-layers"
    return _save(LlamaForCausalLM(config), name)


def _gemma_text_config(
    layers: int = GEMMA_LAYERS, kv_shared: int = GEMMA_KV_SHARED
) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=128,
        hidden_size_per_layer_input=64,
        intermediate_size=128,
        use_double_wide_mlp=True,
        num_hidden_layers=layers,
        num_kv_shared_layers=kv_shared,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        sliding_window=16,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4),
        max_position_embeddings=256,
        final_logit_softcapping=30.0,
    )


@functools.cache
def gemma4_text() -> str:
    """Directory of a random Gemma 4 in the text-only class."""
    torch.manual_seed(1)
    return _save(Gemma4ForCausalLM(_gemma_text_config()), "gemma4-text")


@functools.cache
def gemma4_multimodal(layers: int = GEMMA_LAYERS, kv_shared: int = GEMMA_KV_SHARED) -> str:
    """Directory of a random Gemma 4 in the class of the published checkpoints, with an image tower."""
    torch.manual_seed(2)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 16,
    }
    text = _gemma_text_config(layers, kv_shared)
    config = Gemma4Config(text_config=text.to_dict(), vision_config=vision)
    name = "gemma4" if layers == GEMMA_LAYERS else f"gemma4-{layers}-layers"
    return _save(Gemma4ForConditionalGeneration(config), name)


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 128}
FAMILIES: dict[str, tuple[str, dict]] = {
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}),
    # As OPT-350m is: narrower embeddings, norms behind the layers, no final norm.
    "opt-350m": (
        "OPTConfig",
        {**SMALL, "word_embed_proj_dim": 32, "ffn_dim": 128, "do_layer_norm_before": False, "max_position_embeddings": 128},
    ),
    "opt": ("OPTConfig", {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 128}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 8}),
    "neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 128, "max_position_embeddings": 128}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "rwkv": ("RwkvConfig", {**SMALL, "attention_hidden_size": 64, "intermediate_size": 128}),
    "mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
    "modernbert-decoder": (
        "ModernBertDecoderConfig", {**SMALL, "intermediate_size": 128, "max_position_embeddings": 128}
    ),
    "llama": ("LlamaConfig", {**GATED, "max_position_embeddings": 128}),
    "gemma3": ("Gemma3TextConfig", {**GATED, "head_dim": 16, "max_position_embeddings": 128}),
}  # fmt: skip
"""Random models of many architectures: 3 layers, width 64."""


@functools.cache
def family(name: str) -> str:
    """Directory of a random model of ``FAMILIES``."""
    config_class, options = FAMILIES[name]
    special = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(3)
    config = getattr(transformers, config_class)(**special, **options)
    return _save(transformers.AutoModelForCausalLM.from_config(config), f"family-{name}")


def prose(folder: Path, words: int, each: int) -> Path:
    """A file of so many random words in documents of ``each``, always the same."""
    found = random.Random(0).choices("time and tide wait for no man who sleeps".split(), k=words)  # noqa: SIM905
    path = folder / "prose.txt"
    path.write_text("\n\n".join(" ".join(found[i : i + each]) for i in range(0, words, each)))
    return path
