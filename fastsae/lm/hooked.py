"""The frozen language model, run from the tokens to the residual stream after the hooked layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import StreamError
from .loading import dequantize, load_pretrained, require_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A decoder language model up to the deepest of ``layers``; the rest is dropped from memory.

    ``model`` is any transformers model with a decoder (``get_decoder()``); it is taken over and cut.
    With ``separate_documents``, a token attends to its own document alone, and positions count from
    the document's beginning, as if it had the row to itself. ``compile`` passes the model through
    ``torch.compile``.

    Attributes: ``name``; ``layers``; ``quantization``; ``tokenizer``; ``device``; ``dtype`` (of the
    residual stream); ``d_model``; ``num_layers`` (of the whole model); ``model_class_name`` and
    ``hook_names`` (the class to load the model with, and each hooked module's path in it);
    ``special_ids`` (int64 tensor: the tokens that are not text).
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
        separate_documents: bool = False,
        compile: bool = False,
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
        self.device: torch.device = decoder.get_input_embeddings().weight.device
        self.dtype: torch.dtype = decoder.get_input_embeddings().weight.dtype
        self.special_ids = torch.tensor(special_ids(tokenizer))
        self._separate_documents = separate_documents
        _truncate(decoder, modules, max(layers) + 1)
        self._kept: dict[int, Tensor] = {}
        for layer in layers:
            modules[layer].register_forward_hook(self._keep(layer))
        self._decoder = decoder.eval().requires_grad_(False)
        if quantization == "nf4-dequantized":
            dequantize(decoder)
        self._run = torch.compile(decoder, dynamic=False) if compile else decoder

    @classmethod
    def load(
        cls,
        name: str,
        layers: Sequence[int],
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
        separate_documents: bool = False,
        compile: bool = False,
    ) -> LanguageModel:
        """Load with ``load_pretrained``, cut, and try out. Raises StreamError or ConfigError."""
        # What is dequantized is what is left after the cut.
        stored = "nf4" if quantization == "nf4-dequantized" else quantization
        model, tokenizer = load_pretrained(name, quantization=stored, device=device, head=False)
        language_model = cls(
            model,
            tokenizer,
            layers,
            name=name,
            quantization=quantization,
            separate_documents=separate_documents,
            compile=compile,
        )
        del model
        language_model._try_out()
        if language_model.device.type == "cuda":
            torch.cuda.empty_cache()  # what was cut away
        return language_model

    @property
    def memory_bytes(self) -> int:
        """What the weights and buffers that are kept take, on ``device``."""
        tensors = [*self._decoder.parameters(), *self._decoder.buffers()]
        states = (getattr(tensor, "quant_state", None) for tensor in tensors)
        tensors += [state.absmax for state in states if state is not None]  # the blocks' scales
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    @torch.inference_mode()
    def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The residual stream after each hooked layer, from one forward pass.

        tokens ``[n, t]`` int64 to as many ``[n, t, d_model]`` as there are ``layers``, in ``dtype``.
        Rows shorter than the others may be padded at the end with any token: attention is causal, so
        the padding changes nothing before it.
        """
        positions = self._positions(tokens) if self._separate_documents else None
        self._run(input_ids=tokens.to(self.device), position_ids=positions, use_cache=False)
        residuals = tuple(self._kept[layer] for layer in self.layers)
        self._kept.clear()
        return residuals

    def _positions(self, tokens: Tensor) -> Tensor:
        """Positions that begin anew at each document: from them transformers masks the attention."""
        if (bos := self.tokenizer.bos_token_id) is not None:
            begins = tokens == bos
        else:
            begins = (tokens == self.tokenizer.eos_token_id).roll(1, dims=1)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        begins[:, 0] = True
        return (index - torch.where(begins, index, 0).cummax(dim=1).values).to(self.device)

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Decoder layers of transformers return a tensor or, in older models, a tuple that starts with it.
            self._kept[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _try_out(self) -> None:
        """One short forward pass, so that what cannot run fails here and not in the middle of a run."""
        try:
            residuals = self.residuals(torch.zeros(1, 8, dtype=torch.int64))
            if self._separate_documents:
                self._try_out_separation()
        except StreamError:
            raise
        except Exception as error:  # kernels and libraries raise many kinds
            remedy = "; try --quantization none" if self.quantization != "none" else ""
            if self._run is not self._decoder:
                remedy += "; try without --compile-model"
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

    def _try_out_separation(self) -> None:
        """Raise StreamError unless a document looks the same behind another one as in front of it."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise StreamError(
                f"the tokenizer of {self.name!r} has neither a BOS nor an EOS token to tell documents "
                f"apart by; leave out --separate-documents"
            )
        special = set(self.special_ids.tolist())
        words = [i for i in range(len(special) + 6) if i not in special]
        one, two = (
            [bos, *part] if bos is not None else [*part, eos] for part in (words[:3], words[3:6])
        )
        for residual in self.residuals(torch.tensor([one + two, two + one])):
            in_front, behind = residual[1, :4].float(), residual[0, 4:].float()
            if (in_front - behind).norm() > 0.05 * in_front.norm():
                raise StreamError(
                    f"the model {self.name!r} attends across documents whatever positions it is given; "
                    f"leave out --separate-documents"
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
