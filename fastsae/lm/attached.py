"""An SAE in a running language model: its latents read, and edited, while the model computes or generates."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StreamError
from ..sae.module import SAE
from ..sae.transcoder import Transcoder
from . import loading
from .hooked import by_token, find_layers
from .hooks import Hook, find_hook, site_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_AT_ONCE = 2**26
"""Latents in memory at a time, before they are stored without their zeros: 256 MB."""
_CACHES = ("past_key_values", "cache_params", "state")
"""What the models of transformers call the memory of the tokens before."""


class _Seen(NamedTuple):
    """The latents of one forward pass: ``mask [n, t]``, where they were read; ``latents``, sparse ``[m, F]``,
    those of its m positions."""

    mask: Tensor
    latents: Tensor

    def first(self, tokens: int) -> _Seen:
        inside = torch.arange(self.mask.shape[1], device=self.mask.device) < tokens
        rows = inside.expand_as(self.mask)[self.mask].nonzero()[:, 0]
        return _Seen(self.mask[:, :tokens], self.latents.index_select(0, rows))

    def dense(self) -> Tensor:
        shape = (*self.mask.shape, self.latents.shape[1])
        found = torch.zeros(shape, dtype=self.latents.dtype, device=self.latents.device)
        found[self.mask] = self.latents.to_dense()
        return found


class Lens:
    """An SAE attached to a model by :func:`attach`; a context manager, in which the model is read and edited.

    Edits hold from the moment they are made until :meth:`reset`, at every token that is read; of a latent
    that is edited again, the edits follow each other. Each returns the lens. Values are in the units of the
    latents, those of the raw activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sae: SAE,
        hook: Hook,
        replace: bool,
        skip: Tensor,
    ) -> None:
        self.sae, self.hook, self.replace = sae, hook, replace
        self._model = model
        # Of the class: what wraps a model, as nnsight does, may hide the names.
        self._signature = inspect.signature(type(model).forward)
        self._skip = skip
        self._scope = ExitStack()
        self._seen: list[_Seen] = []
        self._mask: Tensor | None = None  # of the pass that runs: which tokens are text
        self._running = False
        self._cache: Any = None
        self._largest_norm: Tensor | None = None  # of a token that is no outlier
        self.reset()

    # --- what was read ---

    @property
    def latents(self) -> Tensor:
        """``[n, t, F]``: the latents of every token that the model was given since its text began, as they
        were before any edit; 0 where :attr:`mask` is false.

        A forward pass without a KV cache begins a new text, one that continues the last pass's adds to it.
        The last token that ``generate`` returns was never given to the model, and so has none. Beam search
        reorders its rows on the way: give what it found to the model again.
        """
        return torch.cat([seen.dense() for seen in self._passes()], dim=1)

    @property
    def mask(self) -> Tensor:
        """bool ``[n, t]``: the tokens that were read: neither padding nor left alone (see :func:`attach`)."""
        return torch.cat([seen.mask for seen in self._passes()], dim=1)

    def _passes(self) -> list[_Seen]:
        if not self._seen:
            raise ConfigError(
                "nothing was read yet; call the model, or its generate(), inside the with block"
            )
        return self._seen

    # --- edits ---

    def ablate(self, latents: int | Sequence[int] | Tensor) -> Lens:
        """Set latents to 0."""
        return self._edit(latents, 0.0, 0.0)

    def clamp(self, latents: int | Sequence[int] | Tensor, value: float) -> Lens:
        """Set latents to ``value``, whether they are active or not."""
        return self._edit(latents, 0.0, value)

    def scale(self, latents: int | Sequence[int] | Tensor, factor: float) -> Lens:
        """Multiply latents by ``factor``."""
        return self._edit(latents, factor, 0.0)

    def steer(self, latents: int | Sequence[int] | Tensor, amount: float) -> Lens:
        """Add ``amount`` to latents: so many times their decoder row to the activation."""
        return self._edit(latents, 1.0, amount)

    def reset(self) -> Lens:
        """Take all edits back."""
        self._edits: dict[int, tuple[float, float]] = {}  # latent to (factor, shift)
        return self

    def _edit(self, latents: Any, factor: Any, shift: Any) -> Lens:
        for number in (factor, shift):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ConfigError(
                    f"an edit takes a number, got {type(number).__name__}: {number!r}"
                )
            if not math.isfinite(number):
                raise ConfigError(f"an edit takes a finite number, got {number!r}")
        if isinstance(latents, Tensor):
            latents = latents.tolist()
        for latent in [latents] if isinstance(latents, int) else latents:
            if isinstance(latent, bool) or not isinstance(latent, int):
                raise ConfigError(
                    f"latents are whole numbers, got {latent!r}: give one, or several in a list"
                )
            if not 0 <= latent < self.sae.d_sae:
                raise ConfigError(
                    f"latent {latent} is out of range: this SAE has {self.sae.d_sae}, from 0"
                )
            a, b = self._edits.get(latent, (1.0, 0.0))
            self._edits[latent] = (factor * a, factor * b + shift)
        return self

    # --- hooks ---

    def __enter__(self) -> Lens:
        for handle in (
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end),
            self.hook.register(self._model.get_submodule(self.hook.path), self._apply),
        ):
            self._scope.callback(handle.remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._running = False
        self._scope.close()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tokens of the pass are text, and whether it goes on with the text before."""
        given = self._signature.bind_partial(self._model, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            raise StreamError("the model was called without input_ids; give them by that name")
        past = 0
        if cache is not None and cache is self._cache:
            past = sum(seen.mask.shape[1] for seen in self._seen)
            with suppress(AttributeError, ValueError):  # recurrent states do not tell their length
                past = min(past, int(cache.get_seq_length()))
        self._seen = self._first(past)
        self._cache = cache
        if not self._seen:
            self._largest_norm = None
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise StreamError(
                "the attention mask is not [batch, tokens], so that padding cannot be told from text; "
                "give such a mask, and generate with the default (dynamic) cache"
            )
        if mask is None and ids is not None and not past:
            pad = getattr(self._model.config.get_text_config(decoder=True), "pad_token_id", None)
            begins = ids[:, 0] == (-1 if pad is None else pad)
            if begins.any() and not begins.all():
                raise ConfigError(
                    f"{int(begins.sum())} of {len(ids)} rows begin with the padding token ({pad}), and no "
                    f"attention_mask was given: the model takes padding for text. Give it all that the "
                    f"tokenizer returns, as in model(**tokenizer(texts, padding=True, return_tensors='pt'))"
                )
        if ids is not None:
            text = ~torch.isin(ids, self._skip.to(ids.device))
            mask = text if mask is None else text & mask[:, -ids.shape[1] :].bool()
        self._mask, self._running = mask, True
        self._shape = tokens.shape[:2]

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._running = False
        if self._cache is None:
            found = (getattr(output, name, None) for name in _CACHES)
            self._cache = next((cache for cache in found if cache is not None), None)

    def _first(self, tokens: int) -> list[_Seen]:
        """What was seen of the first ``tokens``: speculative decoding takes some back."""
        kept = []
        for seen in self._seen:
            if tokens <= 0:
                break
            kept.append(seen if tokens >= seen.mask.shape[1] else seen.first(tokens))
            tokens -= seen.mask.shape[1]
        return kept

    def _apply(self, x: Tensor) -> Tensor | None:
        """Read the activations ``x [n, t, D]``; what is to stand in their place, if anything is."""
        sae = self.sae
        if not self._running:
            raise StreamError(
                "a part of the model ran by itself, and so without its attention mask; call the model that "
                "was given to attach"
            )
        given, x = x, by_token(x, self._shape)
        if x.dim() != 3 or x.shape[-1] != sae.d_in:
            raise ConfigError(
                f"the SAE reads activations of width {sae.d_in}, and the model gives {list(x.shape)} at "
                f"{self.hook.hf_name}: they do not belong together"
            )
        read = self._read(x)
        rows = x[read].to(sae.device)
        latents, new = [], []
        for part in rows.split(max(1, _AT_ONCE // sae.d_sae)):
            z = sae.encode(part, sae.inference)
            latents.append(z.detach().to_sparse())
            if self.replace or self._edits:
                new.append(self._edited(part, z))
        self._seen.append(_Seen(read.to(sae.device), torch.cat(latents)))
        if not new:
            return None
        edited = x.masked_scatter(read[..., None], torch.cat(new).to(x.device, x.dtype))
        return edited.reshape(given.shape)

    def _read(self, x: Tensor) -> Tensor:
        """bool ``[n, t]``: text, finite and no outlier."""
        read = x.isfinite().all(dim=-1)
        if self._mask is not None:
            read &= self._mask[:, -x.shape[1] :].to(x.device).bool()
        factor = self.sae.metadata.get("outlier_norm") or math.inf
        norms = x.detach().float().norm(dim=-1)
        if self._largest_norm is None and read.any():
            self._largest_norm = factor * norms[read].median()
        return read if self._largest_norm is None else read & (norms <= self._largest_norm)

    def _edited(self, x: Tensor, z: Tensor) -> Tensor:
        sae = self.sae
        statistics = sae.token_statistics(x.to(sae.dtype))
        which = torch.tensor(list(self._edits), dtype=torch.int64, device=z.device)
        factor, shift = torch.tensor(
            list(self._edits.values()), dtype=z.dtype, device=z.device
        ).reshape(-1, 2).T  # fmt: skip
        old = z[:, which]
        new = old * factor + shift
        if self.replace:
            return sae.decode(z.index_copy(1, which, new), statistics)
        moved = (new - old) @ sae.W_dec[which]
        return x + (moved if statistics is None else moved * statistics.std)


def attach(
    model: PreTrainedModel,
    sae: SAE,
    *,
    replace: bool = False,
    hook: str | None = None,
    skip: Iterable[int] | None = None,
) -> Lens:
    """Attach ``sae`` to a language model, for as long as a ``with`` block lasts.

    ::

        with fastsae.attach(model, sae) as lens:
            model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
        lens.latents  # [batch, tokens, d_sae]

    What the SAE reads is there afterwards as ``lens.latents``, and ``lens.ablate``, ``clamp``, ``scale`` and
    ``steer`` edit latents: the activation then moves by what the edit changes in the reconstruction, so that
    all the SAE does not explain stays. Without an edit, and with ``replace`` false, nothing in the model
    changes. Several SAEs are attached by several ``attach`` in one ``with``; of two at one place the second
    reads what the first leaves. The hooks are gone when the block ends, by an error too.

    Left alone, neither read nor changed, are padding (``attention_mask`` 0), activations that are not finite,
    the tokens of ``skip``, and those of outlying norm where the SAE was trained without (``outlier_norm`` in
    its metadata; against the median norm of the pass that began the text).

    Args:
        model: a causal language model of transformers, whole and in any dtype, on any device.
        sae: its own ``inference`` says how latents are selected.
        replace: put the reconstruction in the place of the activation: what the SAE does not explain is gone.
        hook: the place, if not the one that the SAE names: the path of a module in the model, for its output
            or with ``.input`` behind it its input, or TransformerLens's name (``blocks.17.hook_mlp_out``).
        skip: token ids. By default the model's BOS, EOS and padding where the SAE was trained without special
            tokens. ``tokenizer.all_special_ids`` has those of a chat template too.

    Raises:
        ConfigError: at once, if the model or the SAE is something else, or there is no such place in the
            model; in the block, if the widths differ, an edit makes no sense, or rows of a batch are padded
            on the left without an attention mask.
        StreamError: in the block, if the attention mask is not ``[batch, tokens]``.
    """
    if not isinstance(sae, SAE):
        raise ConfigError(f"attach takes a fastsae.SAE, got {type(sae).__name__}; see fastsae.load")
    if isinstance(sae, Transcoder):
        raise ConfigError(
            "attach takes autoencoders, and this is a transcoder, whose latents are of one place and whose "
            "reconstruction of another; fastsae.evaluate runs the model with it in the place of its MLP"
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
        raise ConfigError(
            f"attach takes a causal language model of transformers, got {type(model).__name__}; load one with "
            f"AutoModelForCausalLM.from_pretrained"
        )
    if sae.inference == "batch":
        raise ConfigError(
            "inference = 'batch' selects among all tokens of a pass, and in a generation passes differ; set "
            "sae.inference to 'topk' or 'threshold'"
        )
    place = _find(model, hook or sae.hook_name)
    trained, here = sae.metadata.get("model_name"), getattr(model, "name_or_path", "")
    if trained and here and PurePath(trained).name.lower() != PurePath(here).name.lower():
        log.warning("the SAE was trained on %s, and is attached to %s", trained, here)
    if skip is None:
        left_out = sae.metadata.get("exclude_special_tokens")
        skip = left_out if isinstance(left_out, list) else _special(model) if left_out else ()
    return Lens(model, sae, place, replace, torch.tensor(list(skip), dtype=torch.int64))


def _find(model: PreTrainedModel, hook_name: str | None) -> Hook:
    site = site_of(hook_name)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    path, layers = find_layers(model, name)
    loading.require_layers((site.layer,), len(layers), name)
    return find_hook(model, path, layers, site)


def _special(model: PreTrainedModel) -> list[int]:
    config = model.config.get_text_config(decoder=True)
    ids = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return [i for of in ids if of is not None for i in (of if isinstance(of, list) else [of])]
