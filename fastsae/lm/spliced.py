"""A whole language model whose residual stream after one layer can be read, and replaced."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_AT_ONCE = 2**24
"""Logits in float32 that one step of a sum over the vocabulary may hold: 64 MB."""


class SplicedModel:
    """``model``, untruncated and frozen, with a hook on the output of decoder layer ``layer``.

    Attributes: ``name``, ``layer``, ``tokenizer``, ``d_model``, ``vocabulary``, ``device``.

    Raises:
        ConfigError: there is no such layer.
        StreamError: not a decoder language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        name: str = "the model",
    ) -> None:
        from .hooked import find_layers
        from .loading import require_layers

        self._decoder = model.get_decoder()
        config = self._decoder.config.get_text_config(decoder=True)
        _, layers = find_layers(model, self._decoder, config.num_hidden_layers, name)
        require_layers((layer,), len(layers), name)
        self._model = model.eval()
        self._hooked = layers[layer]
        self.name, self.layer, self.tokenizer = name, layer, tokenizer
        self.d_model: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        embedding = self._decoder.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.device = embedding.device

    @classmethod
    def load(
        cls,
        name: str,
        layer: int,
        *,
        quantization: str = "none",
        device: torch.device | str = "cpu",
    ) -> SplicedModel:
        """From the hub, a local directory, or the demo's; see ``load_pretrained``.

        Raises StreamError or ConfigError, each with what to do.
        """
        from .loading import load_config, load_pretrained

        load_config(name, (layer,))
        model, tokenizer = load_pretrained(name, quantization=quantization, device=device)
        return cls(model, tokenizer, layer, name)

    @torch.no_grad()
    def residual(self, tokens: Tensor) -> Tensor:
        """The residual stream after the layer: tokens ``[n, t]`` to ``[n, t, D]``; the rest is not run."""
        try:
            self._run(self._decoder, tokens, None, stop=True)
        except _Stop as stop:
            return stop.residual
        raise AssertionError("the hooked layer did not run")

    @torch.no_grad()
    def logits(self, tokens: Tensor, replacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next-token logits ``[n, t, V]`` and the residual stream ``[n, t, D]`` the layer gave.

        With ``replacement [n, t, D]`` the layers after it read that instead.
        """
        kept, output = self._run(self._model, tokens, replacement)
        return output.logits, kept

    def _run(
        self, module: nn.Module, tokens: Tensor, replacement: Tensor | None, stop: bool = False
    ) -> Any:
        kept: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            # Decoder layers return a tensor or, in older models, a tuple that starts with it.
            residual = output if isinstance(output, Tensor) else output[0]
            if stop:
                raise _Stop(residual)
            kept.append(residual)
            if replacement is None:
                return None
            new = replacement.to(residual.dtype)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        handle = self._hooked.register_forward_hook(hook)
        try:
            output = module(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            handle.remove()
        return kept[0], output

    def unembedding(self) -> tuple[Tensor, Tensor, bool]:
        """``[V, D]`` unembedding; ``[D]`` gain of the final norm; whether that norm subtracts the mean."""
        head = self._model.get_output_embeddings()
        assert head is not None
        norms = [m for _, m in self._decoder.named_children() if _is_norm(m)]
        # The gain as the norm applies it, however it is parametrised (w, or 1 + w): a vector of signs
        # has mean 0 and mean square 1, and a bias cancels in the difference.
        signs = torch.ones(self.d_model, device=self.device, dtype=head.weight.dtype)
        signs[1::2] = -1
        if not norms:
            return head.weight, torch.ones_like(signs), False
        with torch.no_grad():
            gain = (norms[-1](signs) - norms[-1](-signs)) / 2 * signs
        return head.weight, gain, isinstance(norms[-1], nn.LayerNorm)


class _Stop(Exception):
    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def layer_of(hook_name: str | None) -> int:
    """The decoder layer whose output a hook name means, in the names that SAE programs use.

    ``model.layers.17``, ``layers.17`` and ``blocks.17.hook_resid_post`` are the output of layer 17;
    ``blocks.17.hook_resid_pre`` is that of layer 16. Raises ConfigError for any other.
    """
    advice = "give the decoder layer whose output it reads with --layer"
    if hook_name is None:
        raise ConfigError(f"the SAE does not say which hook it reads; {advice}")
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name):
        layer = int(found[1]) - (found[2] == "pre")
        if layer >= 0:
            return layer
    elif (found := re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)\.(\d+)", hook_name)) or (
        found := re.fullmatch(r"resid_post_layer_(\d+)", hook_name)
    ):
        return int(found[1])
    raise ConfigError(
        f"the SAE reads {hook_name!r}, which is not the output of a decoder layer by any name known "
        f"here; if it is, {advice}"
    )


# --- sums over the vocabulary, a slice of the positions at a time ---


def cross_entropy(logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """``-log p`` of the token that follows each position of ``positions [n, t]`` (bool): ``[m]`` float32.

    ``logits [n, t, V]``; positions in the last column have no following token and must be off.
    """
    row, column = positions.nonzero(as_tuple=True)
    following = tokens[row, column + 1]
    parts = [torch.empty(0, device=logits.device)]
    for part in _slices(len(row), logits.shape[-1]):
        log_p = log_softmax(logits[row[part], column[part]].float(), dim=-1)
        parts.append(-log_p.gather(1, following[part, None])[:, 0])
    return torch.cat(parts)


def kl_divergence(clean: Tensor, changed: Tensor, positions: Tensor) -> Tensor:
    """``KL(clean ‖ changed)`` of the next-token distributions at ``positions [n, t]``: ``[m]`` float32."""
    row, column = positions.nonzero(as_tuple=True)
    parts = [torch.empty(0, device=clean.device)]
    for part in _slices(len(row), clean.shape[-1]):
        log_p = log_softmax(clean[row[part], column[part]].float(), dim=-1)
        log_q = log_softmax(changed[row[part], column[part]].float(), dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def _slices(count: int, vocabulary: int) -> list[slice]:
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, count, size)]
