"""The frozen language model with hooks in it: cut after the deepest one, to harvest activations, or spliced, to
read activations and to replace them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import Site
from ..errors import StreamError
from . import loading
from .held_out import special_ids
from .hooks import Hook, find_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class HookedModel:
    """What a frozen decoder language model has in common however it is hooked.

    Attributes: ``name``; ``tokenizer``; ``device``; ``dtype`` and ``d_model`` of the residual
    stream; ``vocabulary``; ``num_layers`` of the whole model; ``sites`` and the ``hooks`` that they are in this
    model; ``weights``, what tells it apart from others (``weights_of``), if it was loaded.

    Raises:
        ConfigError: there is no such layer or hook.
        StreamError: not a decoder language model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, places: Sequence[int | Site], name: str
    ) -> None:
        self.weights: dict[str, str] = {}
        self._decoder = decoder_of(model)
        self._config = config = self._decoder.config.get_text_config(decoder=True)
        path, self._modules = find_layers(model, name)
        self.num_layers = len(self._modules)
        self.sites = tuple(map(Site.of, places))
        loading.require_layers([site.layer for site in self.sites], self.num_layers, name)
        self.name, self.tokenizer = name, tokenizer
        self.hooks = tuple(find_hook(model, path, self._modules, site) for site in self.sites)
        self.d_model: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        embedding = self._decoder.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.embeddings = len(embedding)
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype

    def require_fitting(self, tokens: Tensor) -> None:
        """Raise ConfigError if rows ``[n, t]`` of token ids are too long for the model, StreamError if it
        has no embedding for one of them."""
        loading.require_positions(tokens.shape[1], self._config, self.name)
        largest = int(tokens.max()) if tokens.numel() else 0
        if largest >= self.embeddings:
            raise StreamError(
                f"the text holds token {largest}, and {self.name} has embeddings for {self.embeddings}: its "
                f"tokenizer belongs to another model, or was given tokens that the model does not know"
            )


class CutModel(HookedModel):
    """A decoder language model up to the deepest of ``places``; the layers behind it are dropped from memory.

    ``model`` is any transformers model with a decoder (``get_decoder()``); it is taken over and cut. A place is
    a :class:`Site`, or the number of a layer for the residual stream after it. With ``separate_documents``, a
    token attends to its own document alone, and positions count from the document's beginning, as if it had
    the row to itself. ``compile`` passes the model through ``torch.compile``.

    Attributes besides those of :class:`HookedModel`: ``quantization``; ``model_class_name``, the class to load
    the model with; ``special_ids``, int64 tensor of the tokens that are not text.
    """

    model_class_name = "AutoModelForCausalLM"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        places: Sequence[int | Site],
        *,
        name: str,
        quantization: str = "none",
        separate_documents: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, places, name)
        decoder = self._decoder
        self.quantization = quantization
        self.special_ids = torch.tensor(special_ids(tokenizer))
        self._separate_documents = separate_documents
        _truncate(decoder, self._modules, max(hook.layer for hook in self.hooks) + 1)
        decoder.eval().requires_grad_(False)
        if quantization == "nf4-dequantized":
            loading.dequantize(decoder)
        self._kept: dict[int, Tensor] = {}
        self._stops = not compile  # what is compiled runs to the end of the last layer
        for index, hook in enumerate(self.hooks):
            hook.register(model.get_submodule(hook.path), self._keep(index))
        self._run = torch.compile(decoder, dynamic=False) if compile else decoder

    @classmethod
    def load(
        cls,
        name: str,
        places: Sequence[int | Site],
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **options: bool,
    ) -> CutModel:
        """Load with ``load_pretrained``, cut, and try out; ``options`` are the constructor's other ones.

        Raises StreamError or ConfigError.
        """
        # What is dequantized is what is left after the cut.
        stored = "nf4" if quantization == "nf4-dequantized" else quantization
        model, tokenizer = loading.load_pretrained(
            name, quantization=stored, device=device, head=False, revision=revision
        )
        cut = cls(model, tokenizer, places, name=name, quantization=quantization, **options)
        del model
        cut.weights = loading.weights_of(name, revision)
        cut._try_out()
        if cut.device.type == "cuda":
            torch.cuda.empty_cache()  # what was cut away
        return cut

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
        """The activations at each of the ``sites``, from one forward pass.

        tokens ``[n, t]`` int64 to as many ``[n, t, D]`` as there are ``sites``, in ``dtype``. Rows shorter than the others may be padded at the end with any token: attention is causal, so
        the padding changes nothing before it.
        """
        positions = self._positions(tokens) if self._separate_documents else None
        self._kept.clear()
        with contextlib.suppress(_Stop):
            self._run(input_ids=tokens.to(self.device), position_ids=positions, use_cache=False)
        for index, hook in enumerate(self.hooks):
            if index not in self._kept:
                raise _does_not_run(hook, self.name)
        return tuple(
            by_token(self._kept.pop(index), tokens.shape) for index in range(len(self.hooks))
        )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The width D of the activations at each of the ``sites``, found by a short forward pass."""
        found = self.residuals(torch.zeros(1, 8, dtype=torch.int64))
        return tuple(_width(self.name, *pair) for pair in zip(self.sites, found, strict=True))

    def _positions(self, tokens: Tensor) -> Tensor:
        """Positions that begin anew at each document: from them transformers masks the attention."""
        if (bos := self.tokenizer.bos_token_id) is not None:
            begins = tokens == bos
        else:
            begins = (tokens == self.tokenizer.eos_token_id).roll(1, dims=1)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        begins[:, 0] = True
        return (index - torch.where(begins, index, 0).cummax(dim=1).values).to(self.device)

    def _keep(self, index: int) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            self._kept[index] = x
            if self._stops and len(self._kept) == len(self.hooks):
                raise _Stop

        return keep

    def _try_out(self) -> None:
        """One short forward pass, so that what cannot run fails here and not in the middle of a run."""
        try:
            _ = self.widths
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
        document = lambda text: [*text, eos] if bos is None else [bos, *text]
        one, two = document(words[:3]), document(words[3:6])
        for residual in self.residuals(torch.tensor([one + two, two + one])):
            in_front, behind = residual[1, :4].float(), residual[0, 4:].float()
            if (in_front - behind).norm() > 0.05 * in_front.norm():
                raise StreamError(
                    f"the model {self.name!r} attends across documents whatever positions it is given; "
                    f"leave out --separate-documents"
                )


class SplicedModel(HookedModel):
    """``model``, untruncated and frozen, with a hook at ``place``: a :class:`Site`, or the number of a layer for
    the residual stream after it. With a ``target``, what is there is read too, and it is what is replaced.

    Attributes besides those of :class:`HookedModel`: ``site``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        place: int | Site,
        name: str = "the model",
        target: Site | None = None,
    ) -> None:
        super().__init__(model, tokenizer, (place,) if target is None else (place, target), name)
        self.site, self._hook = self.sites[0], self.hooks[-1]
        self._model = model.eval()
        self._hooked = [model.get_submodule(hook.path) for hook in self.hooks]

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        place: int | Site,
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
        revision: str | None = None,
        context_length: int | None = None,
        target: Site | None = None,
    ) -> SplicedModel:
        """From the hub, a local directory, or the demo's; see ``load_pretrained``.

        Raises StreamError or ConfigError, each with what to do; at once, if rows of ``context_length``
        are too long for the model.
        """
        name = os.fspath(name)
        loading.load_config(name, (Site.of(place).layer,), context_length, revision)
        model, tokenizer = loading.load_pretrained(
            name, quantization=quantization, device=device, revision=revision
        )
        spliced = cls(model, tokenizer, place, name, target)
        spliced.weights = loading.weights_of(name, revision)
        return spliced

    @torch.no_grad()
    def residual(self, tokens: Tensor) -> Tensor:
        """The activations at the site: tokens ``[n, t]`` to ``[n, t, D]``; the rest is not run."""
        return self.activations(tokens)[0]

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`residual`, at the site and at the target, if there is one."""
        return self._run(self._decoder, tokens, None, stop=True)[0]

    @torch.no_grad()
    def logits(self, tokens: Tensor, replacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next-token logits ``[n, t, V]`` and the activations ``[n, t, D]`` at the site, or at the target.

        With ``replacement [n, t, D]`` what comes after it reads that instead.
        """
        kept, output = self._run(self._model, tokens, replacement)
        return output.logits, kept[-1]

    @torch.no_grad()
    def hidden(self, tokens: Tensor, replacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`logits`, but before the head: ``[n, t, H]``, of which :meth:`head` makes logits."""
        hidden, kept = self._hidden(tokens, replacement)
        return hidden, kept[-1]

    @torch.no_grad()
    def clean(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What :meth:`hidden` gives, and :meth:`activations`, in one pass."""
        return self._hidden(tokens, None)

    def _hidden(
        self, tokens: Tensor, replacement: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        module = self._decoder if self._has_head else self._model
        kept, output = self._run(module, tokens, replacement)
        return (output.last_hidden_state if self._has_head else output.logits), kept

    def head(self, hidden: Tensor) -> Tensor:
        """Next-token logits ``[m, V]`` of any rows ``[m, H]`` of :meth:`hidden`."""
        return self._head(hidden) if self._has_head else hidden

    @cached_property
    def _has_head(self) -> bool:
        """Whether logits follow from the decoder's output, position by position; tried on eight tokens."""
        tokens = torch.arange(8)[None]
        logits = self.logits(tokens)[0][0].float()
        try:
            _, output = self._run(self._decoder, tokens, None)
            self._output_class = type(output)
            found = self._head(output.last_hidden_state[0]).float()
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        # The same products in another shape, which may be rounded elsewhere.
        return found.shape == logits.shape and bool((found - logits).norm() < 0.02 * logits.norm())

    @torch.no_grad()
    def _head(self, hidden: Tensor) -> Tensor:
        """The model itself runs, with ``hidden [m, H]`` in the place of what its decoder gives."""
        decoder, own = self._decoder, vars(self._decoder).pop("forward", None)
        # As rows of one token: some models make a mask on the way, which would be m by m.
        decoder.forward = lambda *_, **__: self._output_class(last_hidden_state=hidden[:, None])
        tokens = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.device)
        try:
            return self._model(input_ids=tokens, use_cache=False).logits[:, 0]
        finally:
            del decoder.forward
            if own is not None:
                decoder.forward = own

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The width D of the activations at each of the ``sites``, found by a short forward pass."""
        found = self.activations(torch.zeros(1, 8, dtype=torch.int64))
        return tuple(_width(self.name, *pair) for pair in zip(self.sites, found, strict=True))

    @property
    def work(self) -> tuple[int, int]:
        """Weights that a token is multiplied by up to the hooked layer, and in the whole model."""
        of_4_bits = lambda weight: weight.dtype == torch.uint8  # two of them in an element
        layers = [
            sum(p.numel() * (1 + of_4_bits(p)) for p in layer.parameters())
            for layer in self._modules
        ]
        head = self._model.get_output_embeddings()
        whole = sum(layers) + (0 if head is None else head.weight.numel())
        return sum(layers[: self._hook.layer + 1]), whole

    def _run(
        self, module: nn.Module, tokens: Tensor, replacement: Tensor | None, stop: bool = False
    ) -> tuple[tuple[Tensor, ...], Any]:
        self.require_fitting(tokens)
        kept: dict[Hook, Tensor] = {}

        def act(hook: Hook, x: Tensor) -> Tensor | None:
            kept[hook] = by_token(x, tokens.shape)
            if stop and len(kept) == len(self.hooks):
                raise _Stop
            if replacement is None or hook is not self._hook:
                return None
            return replacement.to(x.dtype).reshape(x.shape)

        pairs, output = zip(self.hooks, self._hooked, strict=True), None
        handles = [hook.register(there, partial(act, hook)) for hook, there in pairs]
        try:
            output = module(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for hook in self.hooks:
            if hook not in kept:
                raise _does_not_run(hook, self.name)
        return tuple(kept[hook] for hook in self.hooks), output

    @torch.no_grad()
    def unembedding(self) -> tuple[Tensor, Tensor, bool] | None:
        """``[V, D]`` unembedding; ``[D]`` gain of the final norm; whether that norm subtracts the mean. None
        if there is more than that between the activations and the logits."""
        if not self._hook.in_stream:
            return None
        head = self._model.get_output_embeddings()
        behind = [
            child
            for child in self._model.children()
            if child is not head and all(module is not self._decoder for module in child.modules())
        ]
        if head is None or any(list(child.parameters()) for child in behind):
            return None
        weight = head.weight
        if weight.shape[1] != self.d_model:
            narrowing = self._narrowing(weight.shape[1])
            if narrowing is None:
                return None
            weight = weight @ narrowing.to(weight.dtype)
        norms = [m for m in self._decoder.children() if "norm" in type(m).__name__.lower()]
        # The gain as the norm applies it, however it is parametrised (w, or 1 + w): a vector of signs
        # has mean 0 and mean square 1, and a bias cancels in the difference.
        signs = torch.ones(self.d_model, device=self.device, dtype=weight.dtype)
        signs[1::2] = -1
        if not norms:
            return weight, torch.ones_like(signs), False
        gain = (norms[-1](signs) - norms[-1](-signs)) / 2 * signs
        return weight, gain, isinstance(norms[-1], nn.LayerNorm)

    def _narrowing(self, width: int) -> Tensor | None:
        """``[width, D]``: what some models (OPT-350m) multiply the residual stream by before their head."""
        found = [
            module
            for module in self._decoder.children()
            if isinstance(module, nn.Linear)
            and (module.in_features, module.out_features) == (self.d_model, width)
        ]
        if len(found) != 1:
            return None
        return found[0](torch.eye(self.d_model, device=self.device, dtype=self.dtype)).T


class _Stop(Exception):
    """What is behind the last hook need not run."""


def _does_not_run(hook: Hook, name: str) -> StreamError:
    return StreamError(
        f"{hook.path} of {name!r} does not run: it holds other modules, or is no part of the decoder; give "
        f"another --hook"
    )


def by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` as ``[n, t, D]`` for tokens of ``shape [n, t]``: some modules run on all in a row, ``[n t, D]``."""
    flat = x.dim() == 2 and len(x) == shape.numel()
    return x.unflatten(0, shape) if flat else x


def _width(name: str, site: Site, x: Tensor) -> int:
    """Of the activations of eight tokens. Raises StreamError if they are not one vector for each."""
    if x.dim() == 3 and x.shape[:2] == (1, 8) and x.is_floating_point():
        return x.shape[2]
    raise StreamError(
        f"{site} of {name!r} is {list(x.shape)} of {x.dtype} for 8 tokens, expected [1, 8, D]: not an activation "
        f"for each token; give another --hook, or use another model"
    )


def decoder_of(model: PreTrainedModel) -> Any:
    """The language model without its head."""
    decoder = model.get_decoder()  # some models call a part of their head so
    return decoder if hasattr(decoder, "config") else model.base_model


def find_layers(model: PreTrainedModel, name: str) -> tuple[str, nn.ModuleList]:
    """The decoder's own list of layers, and its path in the model (not that of an image tower)."""
    decoder = decoder_of(model)
    num_layers = decoder.config.get_text_config(decoder=True).num_hidden_layers
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
