"""Loading a decoder language model, whole, in the precision asked for, with every check there is."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import resolve_device
from ..errors import ConfigError, StreamError
from ..files import fingerprint
from . import demo
from .hub_access import access_error, cached_commit, hub_is_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Gemma 4's per-layer-embedding projection stays unquantized: its rows are cut to the layers that run.
_NEVER_QUANTIZED = ["lm_head", "per_layer_model_projection"]


def load_config(
    name: str,
    layers: Sequence[int] = (),
    context_length: int | None = None,
    revision: str | None = None,
) -> PreTrainedConfig:
    """The configuration of a model, after checking that ``layers`` and ``context_length`` fit it.

    Cheap: reads one small file. Raises StreamError (unknown, gated, unreachable) or ConfigError.
    """
    if revision is not None and (_is_demo(name) or Path(name).is_dir()):
        raise ConfigError(
            f"revision = {revision!r}, but {name} does not come from the hub, and has no revisions"
        )
    if _is_demo(name):
        config = demo.load_model()[0].config
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                name, revision=revision or "main", local_files_only=_local_only(name)
            )
        except Exception as error:  # transformers wraps the hub's errors in several kinds
            raise access_error("model", name, error) from error
    text = config.get_text_config(decoder=True)
    require_layers(layers, text.num_hidden_layers, name)
    if context_length is not None:
        require_positions(context_length, text, name)
    return config


def require_positions(context_length: int, config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigError if rows of so many tokens are too long for the model."""
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    longest = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    if longest is not None and context_length > longest:
        raise ConfigError(
            f"context_length = {context_length}, but {name} handles at most {longest} positions; "
            f"use --context-length {longest} or less"
        )


def weights_of(name: str, revision: str | None = None) -> dict[str, str]:
    """What tells a model that was loaded, and its tokenizer, apart from others of the same shape: the commit
    on the hub, the version of the package, or a fingerprint of every file of a directory."""
    if _is_demo(name):
        return {name: importlib.metadata.version(name)}
    folder = Path(name)
    if not folder.is_dir():
        commit = cached_commit(name, revision)
        return {"commit": commit} if commit else {}
    return {
        path.name: fingerprint(path)
        for path in sorted(folder.iterdir())
        if path.name in _OF_A_MODEL or path.suffix in (".safetensors", ".bin", ".gguf", ".model")
    }


_OF_A_MODEL = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
    "merges.txt",
)  # fmt: skip


def _is_demo(name: str) -> bool:
    """Whether ``name`` is the demo's model, which comes with a package."""
    return name == demo.MODEL and not Path(name).is_dir()


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
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole causal language model and its tokenizer: from the hub, a local directory, or the demo's.

    ``quantization``: ``none`` keeps the dtype on disk (but takes float32 on a CPU without instructions
    for bf16); ``nf4`` stores the linear layers in 4 bits through bitsandbytes, computes in fp16, and
    keeps all else in bf16; ``nf4-bf16`` computes in bf16; ``nf4-dequantized`` is ``nf4``, unpacked with
    ``dequantize``. The towers of a multimodal Gemma 4 are not loaded, and a checkpoint that lacks a
    weight is an error; with ``head=False``, the LM head may be missing.

    Raises StreamError or ConfigError, each with what to do.
    """
    device = resolve_device(device)
    log.info("loading %s", name)
    if _is_demo(name):
        if quantization != "none":
            raise ConfigError(
                f"quantization = {quantization!r}, but the demo's language model is too small to "
                f"quantize; use --quantization none"
            )
        model, tokenizer = demo.load_model()
        return model.to(device), tokenizer

    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(name, revision=revision)
    _refuse_quantized_twice(name, config, quantization)
    stored = device.type == "cuda" or _cpu_has_bf16()
    options: dict[str, Any] = {"dtype": "auto" if stored else torch.float32}
    if quantization != "none":
        compute = torch.bfloat16 if quantization == "nf4-bf16" else torch.float16
        options = {"dtype": torch.bfloat16, "quantization_config": _nf4_config(compute)}
    if config.model_type == "gemma4":
        config.vision_config = config.audio_config = None
    # By the commit of the configuration: nothing that is pushed in between is mixed in.
    commit = None if Path(name).is_dir() else cached_commit(name, revision)
    origin = {"revision": commit or revision or "main", "local_files_only": _local_only(name)}
    options |= origin | {"config": config, "device_map": {"": device}}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **origin)
            model, report = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **options
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


def _refuse_quantized_twice(name: str, config: PreTrainedConfig, quantization: str) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored is None or quantization == "none":
        return
    method = stored.get("quant_method", "some way")
    raise ConfigError(
        f"quantization = {quantization!r}, but the checkpoint of {name} is quantized already ({method}), "
        f"and cannot be quantized again; use --quantization none to run it as it is stored"
    )


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


@contextlib.contextmanager
def _no_folder_called_kernels() -> Iterator[None]:
    """Hide a plain folder of that name, as this repository has at its root: where a program runs, it passes
    for Hugging Face's package ``kernels``, which bitsandbytes looks for when it is imported."""
    spec = None if "kernels" in sys.modules else importlib.util.find_spec("kernels")
    if spec is None or spec.origin is not None:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]


def _nf4_config(compute: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StreamError(
            "quantization = 'nf4' needs bitsandbytes, which is not installed; run `pip install "
            "bitsandbytes`, or use --quantization none"
        )
    try:
        with _no_folder_called_kernels():
            importlib.import_module("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=_NEVER_QUANTIZED,
        )
    except Exception as error:  # of a broken native library: OSError, RuntimeError, ImportError
        raise StreamError(
            f"quantization = 'nf4' cannot be used, bitsandbytes does not work here: {error}; use "
            f"--quantization none"
        ) from error
