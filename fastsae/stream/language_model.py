"""The frozen language model, run from the tokens to the residual stream after one layer."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..device import resolve_device
from ..errors import ConfigError, StreamError
from .access import access_error, hub_is_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Gemma 4's per-layer-embedding projection stays unquantized: its rows are cut to the layers that run.
_NEVER_QUANTIZED = ["lm_head", "per_layer_model_projection"]


def load_config(name: str, layer: int, context_length: int | None = None) -> PreTrainedConfig:
    """The configuration of a model, after checking that ``layer`` and ``context_length`` fit it.

    Cheap: reads one small file. Raises StreamError (unknown, gated, unreachable) or ConfigError.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=_local_only(name))
    except Exception as error:  # transformers wraps the hub's errors in several kinds
        raise access_error("model", name, error) from error
    require_fit(config, name, layer, context_length)
    return config


def require_fit(
    config: PreTrainedConfig, name: str, layer: int, context_length: int | None
) -> None:
    """Raise ConfigError if the model has no such layer, or cannot handle rows that long."""
    text = config.get_text_config(decoder=True)
    _require_layer(layer, text.num_hidden_layers, name)
    longest = getattr(text, "max_position_embeddings", None)
    if context_length is not None and longest is not None and context_length > longest:
        raise ConfigError(
            f"context_length = {context_length}, but {name} handles at most {longest} positions; "
            f"use --context-length {longest} or less"
        )


class LanguageModel:
    """The first ``layer + 1`` layers of a decoder language model; the rest is dropped from memory.

    ``model`` is any transformers model with a decoder (``get_decoder()``); it is taken over and cut.

    Attributes: ``name``; ``layer``; ``quantization``; ``tokenizer``; ``device``; ``dtype`` (of the
    residual stream); ``d_model``; ``num_layers`` (of the whole model); ``model_class_name`` and
    ``hook_name`` (the class to load the model with, and the hooked module's path in it);
    ``special_ids`` (int64 tensor on ``device``: the tokens that are not text).
    """

    model_class_name = "AutoModelForCausalLM"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        *,
        name: str,
        quantization: str = "none",
    ) -> None:
        decoder = model.get_decoder()
        config = decoder.config.get_text_config(decoder=True)
        path, layers = _find_layers(model, decoder, config.num_hidden_layers, name)
        _require_layer(layer, len(layers), name)
        self.name = name
        self.layer = layer
        self.quantization = quantization
        self.tokenizer = tokenizer
        self.num_layers = len(layers)
        self.d_model: int = config.hidden_size
        self.hook_name = f"{path}.{layer}"
        self.device = decoder.get_input_embeddings().weight.device
        self.dtype: torch.dtype = decoder.get_input_embeddings().weight.dtype
        self.special_ids = torch.tensor(_special_ids(tokenizer), device=self.device)
        _truncate(decoder, layers, layer + 1)
        layers[layer].register_forward_hook(self._keep)
        self._decoder = decoder.eval().requires_grad_(False)
        self._kept: Tensor | None = None

    @classmethod
    def load(
        cls,
        name: str,
        layer: int,
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
    ) -> LanguageModel:
        """Load from the hub or from a local directory.

        ``quantization``: ``none`` keeps the dtype on disk (but takes float32 on a CPU without
        instructions for bf16); ``nf4`` stores the linear layers in 4 bits through bitsandbytes,
        computes in fp16, and keeps all else in bf16. The towers of a multimodal Gemma 4 are not
        loaded, and a checkpoint that lacks a weight of the decoder is an error.

        Raises StreamError or ConfigError, each with what to do.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = resolve_device(device)
        config = load_config(name, layer)
        stored = device.type == "cuda" or _cpu_has_bf16()
        options: dict[str, Any] = {"dtype": "auto" if stored else torch.float32}
        if quantization == "nf4":
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
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("lm_head"))
        if missing:
            raise StreamError(
                f"the checkpoint of {name!r} lacks {len(missing)} weights of {type(model).__name__} "
                f"(the first is {missing[0]!r}), which would be left random; check that it is complete "
                f"and made for this version of transformers"
            )
        language_model = cls(model, tokenizer, layer, name=name, quantization=quantization)
        language_model._try_out()
        return language_model

    @torch.inference_mode()
    def residual(self, tokens: Tensor) -> Tensor:
        """The residual stream after the layer: tokens ``[n, t]`` int64 to ``[n, t, d_model]``, in ``dtype``.

        Rows shorter than the others may be padded at the end with any token: attention is causal,
        so the padding changes nothing before it.
        """
        self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        residual, self._kept = self._kept, None
        assert residual is not None
        return residual

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Decoder layers of transformers return a tensor or, in older models, a tuple that starts with it.
        self._kept = output if isinstance(output, Tensor) else output[0]

    def _try_out(self) -> None:
        """One short forward pass, so that what cannot run fails here and not in the middle of a run."""
        try:
            residual = self.residual(torch.zeros(1, 8, dtype=torch.int64))
        except Exception as error:  # kernels and libraries raise many kinds
            remedy = "; try --quantization none" if self.quantization == "nf4" else ""
            raise StreamError(
                f"the model {self.name!r} ({self.quantization}, {self.dtype}) does not run on "
                f"{self.device}: {error}{remedy}"
            ) from error
        if residual.shape != (1, 8, self.d_model):
            raise StreamError(
                f"layer {self.layer} of {self.name!r} gives {list(residual.shape)} for 8 tokens, expected "
                f"[1, 8, {self.d_model}]: not an ordinary residual stream; use another model"
            )


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


def _require_layer(layer: int, num_layers: int, name: str) -> None:
    if not 0 <= layer < num_layers:
        raise ConfigError(
            f"layer = {layer}, but {name} has {num_layers} layers; use --layer 0 to {num_layers - 1}"
        )


def _find_layers(
    model: nn.Module, decoder: nn.Module, num_layers: int, name: str
) -> tuple[str, nn.ModuleList]:
    """The decoder's own list of layers, and its path in the model (not that of an image tower)."""
    lists = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(lists) != 1:
        raise StreamError(
            f"{name!r} ({type(decoder).__name__}) has no single list of {num_layers} decoder layers; "
            f"expected a decoder language model"
        )
    path = next(path for path, module in model.named_modules() if module is lists[0])
    return path, lists[0]


def _truncate(decoder: nn.Module, layers: nn.ModuleList, count: int) -> None:
    """Keep the first ``count`` layers, in compute and in memory."""
    total = len(layers)
    del layers[count:]
    if getattr(decoder, "embed_tokens_per_layer", None) is None:
        return
    # Gemma 4 packs one embedding per token and layer into a single table, twice as large as the rest
    # of the decoder, and unpacks it by the number of layers in the configuration.
    table, projection = decoder.embed_tokens_per_layer, decoder.per_layer_model_projection
    width = table.weight.shape[1] // total * count
    table.weight = nn.Parameter(table.weight[:, :width].clone(), requires_grad=False)
    table.embedding_dim = width
    projection.weight = nn.Parameter(projection.weight[:width].clone(), requires_grad=False)
    projection.out_features = width
    decoder.config.num_hidden_layers = count


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.all_special_ids))


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
