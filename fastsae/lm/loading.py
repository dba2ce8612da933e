"""Loading a decoder language model, whole, in the precision asked for, with every check there is."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import resolve_device
from ..errors import ConfigError, StreamError
from . import demo
from .hub_access import access_error, hub_is_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {demo.MODEL: demo.load_model}
"""Models that come with a package, by name."""

# Gemma 4's per-layer-embedding projection stays unquantized: its rows are cut to the layers that run.
_NEVER_QUANTIZED = ["lm_head", "per_layer_model_projection"]


def load_config(
    name: str, layers: Sequence[int] = (), context_length: int | None = None
) -> PreTrainedConfig:
    """The configuration of a model, after checking that ``layers`` and ``context_length`` fit it.

    Cheap: reads one small file. Raises StreamError (unknown, gated, unreachable) or ConfigError.
    """
    if load := _embedded(name):
        config = load()[0].config
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, local_files_only=_local_only(name))
        except Exception as error:  # transformers wraps the hub's errors in several kinds
            raise access_error("model", name, error) from error
    text = config.get_text_config(decoder=True)
    require_layers(layers, text.num_hidden_layers, name)
    longest = getattr(text, "max_position_embeddings", None)
    if context_length is not None and longest is not None and context_length > longest:
        raise ConfigError(
            f"context_length = {context_length}, but {name} handles at most {longest} positions; "
            f"use --context-length {longest} or less"
        )
    return config


def _embedded(name: str) -> Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None:
    """What loads ``name``, if it is a model that comes with a package."""
    return None if Path(name).is_dir() else EMBEDDED.get(name)


def require_layers(layers: Sequence[int], num_layers: int, name: str) -> None:
    """Raise ConfigError if the model has no such layer."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layer = {layer}, but {name} has {num_layers} layers; use --layer 0 to {num_layers - 1}"
            )


def load_pretrained(
    name: str,
    *,
    quantization: str = "none",
    device: torch.device | str = "cpu",
    head: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole causal language model and its tokenizer: from the hub, a local directory, or the demo's.

    ``quantization``: ``none`` keeps the dtype on disk (but takes float32 on a CPU without instructions
    for bf16); ``nf4`` stores the linear layers in 4 bits through bitsandbytes, computes in fp16, and
    keeps all else in bf16; ``nf4-dequantized`` then unpacks them with ``dequantize``. The towers of a multimodal Gemma 4 are not loaded, and a checkpoint that
    lacks a weight is an error; with ``head=False``, the LM head may be missing.

    Raises StreamError or ConfigError, each with what to do.
    """
    device = resolve_device(device)
    if load := _embedded(name):
        if quantization != "none":
            raise ConfigError(
                f"quantization = {quantization!r}, but the demo's language model is too small to "
                f"quantize; use --quantization none"
            )
        model, tokenizer = load()
        return model.to(device), tokenizer

    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(name)
    stored = device.type == "cuda" or _cpu_has_bf16()
    options: dict[str, Any] = {"dtype": "auto" if stored else torch.float32}
    if quantization != "none":
        options = {"dtype": torch.bfloat16, "quantization_config": _nf4_config()}
    if config.model_type == "gemma4":
        config.vision_config = config.audio_config = None
    local_only = _local_only(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only)
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                device_map={"": device},
                output_loading_info=True,
                local_files_only=local_only,
                **options,
            )
    except Exception as error:  # transformers, bitsandbytes and the hub raise many kinds
        raise access_error("model", name, error) from error
    missing = sorted(key for key in report["missing_keys"] if head or not key.startswith("lm_head"))
    if missing:
        raise StreamError(
            f"the checkpoint of {name!r} lacks {len(missing)} weights of {type(model).__name__} "
            f"(the first is {missing[0]!r}), which would be left random; check that it is complete "
            f"and made for this version of transformers"
        )
    if quantization == "nf4-dequantized":
        dequantize(model)
    return model.eval().requires_grad_(False), tokenizer


class DequantizedLinear(nn.Module):
    """A linear layer with the weights of a 4-bit one in its compute dtype, ``[out, in]``.

    The input is rounded to that dtype and the output returned in the input's, as bitsandbytes does.
    """

    def __init__(self, quantized: Any) -> None:
        from bitsandbytes.functional import dequantize_4bit

        super().__init__()
        dtype = quantized.compute_dtype
        state = copy.copy(quantized.weight.quant_state)
        state.dtype = dtype  # rounded once: bitsandbytes unpacks to the dtype of the product, too
        weight = dequantize_4bit(quantized.weight.data, state)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = quantized.bias
        self.bias = None if bias is None else nn.Parameter(bias.data.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def dequantize(model: nn.Module) -> None:
    """Replace every 4-bit layer of a model that has not run yet by a ``DequantizedLinear``.

    For many tokens at a time bitsandbytes unpacks each weight on every forward pass, then forms this
    product. Doing it once costs 2 bytes a weight instead of half a byte, and saves the unpacking.
    """
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                setattr(parent, name, DequantizedLinear(child))


def _cpu_has_bf16() -> bool:
    """Without instructions for it, bf16 is many times slower on a CPU than float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _local_only(name: str) -> bool:
    return Path(name).is_dir() or not hub_is_reachable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No list of the weights that were left out on purpose; a progress bar on a terminal alone."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _nf4_config() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StreamError(
            "quantization = 'nf4' needs bitsandbytes, which is not installed; run `pip install "
            "bitsandbytes`, or use --quantization none"
        )
    try:
        importlib.import_module("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16,
            llm_int8_skip_modules=_NEVER_QUANTIZED,
        )
    except (
        Exception
    ) as error:  # a broken native library raises OSError, RuntimeError or ImportError
        raise StreamError(
            f"quantization = 'nf4' cannot be used, bitsandbytes does not work here: {error}; use "
            f"--quantization none"
        ) from error
