"""The frozen language model, run from the tokens to the residual stream after the hooked layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import StreamError
from .loading import load_pretrained, require_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A decoder language model up to the deepest of ``layers``; the rest is dropped from memory.

    ``model`` is any transformers model with a decoder (``get_decoder()``); it is taken over and cut.

    Attributes: ``name``; ``layers``; ``quantization``; ``tokenizer``; ``device``; ``dtype`` (of the
    residual stream); ``d_model``; ``num_layers`` (of the whole model); ``model_class_name`` and
    ``hook_names`` (the class to load the model with, and each hooked module's path in it);
    ``special_ids`` (int64 tensor on ``device``: the tokens that are not text).
    """

    model_class_name = "AutoModelForCausalLM"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        *,
        name: str,
        quantization: str = "none",
    ) -> None:
        decoder = model.get_decoder()
        config = decoder.config.get_text_config(decoder=True)
        path, modules = find_layers(model, decoder, config.num_hidden_layers, name)
        require_layers(layers, len(modules), name)
        self.name = name
        self.layers = tuple(layers)
        self.quantization = quantization
        self.tokenizer = tokenizer
        self.num_layers = len(modules)
        self.d_model: int = config.hidden_size
        self.hook_names = tuple(f"{path}.{layer}" for layer in layers)
        self.device = decoder.get_input_embeddings().weight.device
        self.dtype: torch.dtype = decoder.get_input_embeddings().weight.dtype
        self.special_ids = torch.tensor(special_ids(tokenizer), device=self.device)
        _truncate(decoder, modules, max(layers) + 1)
        self._kept: dict[int, Tensor] = {}
        for layer in layers:
            modules[layer].register_forward_hook(self._keep(layer))
        self._decoder = decoder.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        name: str,
        layers: Sequence[int],
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
    ) -> LanguageModel:
        """Load with ``load_pretrained``, cut, and try out. Raises StreamError or ConfigError."""
        model, tokenizer = load_pretrained(
            name, quantization=quantization, device=device, head=False
        )
        language_model = cls(model, tokenizer, layers, name=name, quantization=quantization)
        language_model._try_out()
        return language_model

    @torch.inference_mode()
    def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The residual stream after each hooked layer, from one forward pass.

        tokens ``[n, t]`` int64 to as many ``[n, t, d_model]`` as there are ``layers``, in ``dtype``.
        Rows shorter than the others may be padded at the end with any token: attention is causal, so
        the padding changes nothing before it.
        """
        self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        kept, self._kept = self._kept, {}
        return tuple(kept[layer] for layer in self.layers)

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Decoder layers of transformers return a tensor or, in older models, a tuple that starts with it.
            self._kept[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _try_out(self) -> None:
        """One short forward pass, so that what cannot run fails here and not in the middle of a run."""
        try:
            residuals = self.residuals(torch.zeros(1, 8, dtype=torch.int64))
        except Exception as error:  # kernels and libraries raise many kinds
            remedy = "; try --quantization none" if self.quantization == "nf4" else ""
            raise StreamError(
                f"the model {self.name!r} ({self.quantization}, {self.dtype}) does not run on "
                f"{self.device}: {error}{remedy}"
            ) from error
        for layer, residual in zip(self.layers, residuals, strict=True):
            if residual.shape != (1, 8, self.d_model):
                raise StreamError(
                    f"layer {layer} of {self.name!r} gives {list(residual.shape)} for 8 tokens, expected "
                    f"[1, 8, {self.d_model}]: not an ordinary residual stream; use another model"
                )


def find_layers(
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


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.all_special_ids))
