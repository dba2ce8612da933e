"""Where activations are read and replaced: a hook name or path as a module of the model, in any family of models.

What the names mean (TransformerLens's hooks of these names read the same):

``resid_pre``, ``resid_post``
    input and output of the decoder layer.
``attn_out``, ``mlp_out``
    what attention and MLP add to the residual stream: their output or, in layers that normalise it before they
    add it (Gemma 2 to 4, OLMo 2 and 3, GLM 4), that norm's.
``mlp_in``
    what the MLP itself reads, behind the norm if there is one in front of it. TransformerLens calls it
    ``mlp.hook_in``; its ``hook_mlp_in`` is the stream in front of that norm.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import TRANSFORMER_LENS, Site
from ..errors import ConfigError, StreamError

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe")


class Hook(NamedTuple):
    """A place in a model, as the ``path`` of a module there and the side of it that is read."""

    site: Site
    path: str
    reads_input: bool
    layer: int
    """The deepest decoder layer that has to run for it."""
    transformer_lens: str | None
    """TransformerLens's name, where it has one."""

    @property
    def hf_name(self) -> str:
        """The path, with ``.input`` behind it if that is what is read."""
        return self.path + ".input" * self.reads_input

    @property
    def name(self) -> str:
        """What the place is called on disk: TransformerLens's name or, where there is none, the path."""
        return self.transformer_lens or self.hf_name

    @property
    def in_stream(self) -> bool:
        """Whether what is written here is, or is added to, the residual stream."""
        return self.site.hook in TRANSFORMER_LENS and self.site.hook != "mlp_in"

    def register(
        self, module: nn.Module, act: Callable[[Tensor], Tensor | None]
    ) -> RemovableHandle:
        """Call ``act`` with the activations whenever ``module`` runs; what it returns, if anything, replaces
        them."""

        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if args:
                new = act(self._tensor(args[0]))
                return None if new is None else ((new, *args[1:]), kwargs)
            name = next((n for n, value in kwargs.items() if isinstance(value, Tensor)), "")
            new = act(self._tensor(kwargs.get(name)))
            return None if new is None else (args, {**kwargs, name: new})

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            # A tensor or, of attention and in older models, a tuple that begins with it.
            first = output[0] if isinstance(output, tuple) and output else output
            new = act(self._tensor(first))
            return new if new is None or first is output else (new, *output[1:])

        if self.reads_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        side = "reads" if self.reads_input else "gives"
        raise StreamError(
            f"{self.path} {side} a {type(value).__name__}, expected a tensor [B, T, D] of an activation for "
            f"each token; give another --hook"
        )


def find_hook(model: nn.Module, layers_path: str, layers: nn.ModuleList, site: Site) -> Hook:
    """The module that ``site`` means in ``model``, whose decoder layers are ``layers``.

    Raises ConfigError if there is none, with what is near.
    """
    layer, root = layers[site.layer], f"{layers_path}.{site.layer}"
    standard = {hook: found for hook in TRANSFORMER_LENS if (found := _standard(layer, hook))}
    if site.hook in standard:
        inner, reads_input = standard[site.hook]
        # Granite's layers scale what they add, and TransformerLens reads it behind that.
        scaled = site.hook.endswith("_out") and hasattr(layer, "residual_multiplier")
        name = None if scaled else site.transformer_lens
        path = f"{root}.{inner}" if inner else root
        return Hook(site, path, reads_input, site.layer, name)
    modules = dict(model.named_modules())
    for path, depth in ((f"{root}.{site.hook}", site.layer), (site.hook, len(layers) - 1)):
        for found in (path, path.removesuffix(".input")):
            if found in modules:
                return Hook(site, found, found != path, depth, None)
    inner = [path for path, _ in layer.named_modules() if path]
    near = difflib.get_close_matches(site.hook.removesuffix(".input"), [*standard, *inner], 5, 0.3)
    raise ConfigError(
        f"hook = {site.hook!r}, but {type(layer).__name__} {site.layer} has no such place; near it are "
        f"{', '.join(near) or 'none'}. It has {', '.join(standard)}, and the output (or .input) of any of its "
        f"modules: {', '.join(dict.fromkeys(path.partition('.')[0] for path in inner))}"
    )


def _standard(layer: nn.Module, hook: str) -> tuple[str, bool] | None:
    """Path in the layer, and whether the input is read, of a hook that has a name; None if there is none."""
    children = dict(layer.named_children())
    first = lambda *names: next((name for name in names if name in children), None)
    # In Llama the norm that is called so stands in front of the MLP.
    also = "post_attention_layernorm" if "post_feedforward_layernorm" in children else None
    match hook:
        case "resid_pre" | "resid_post":
            return "", hook == "resid_pre"
        case "attn_out":
            normed = first(also, "post_self_attn_layernorm")
            found = normed or _added(layer, first(*_ATTENTION))
        case "mlp_in":
            found = first(*_MLP, "fc1")
        case _:
            normed = first("post_feedforward_layernorm", "post_mlp_layernorm")
            found = normed or _added(layer, first(*_MLP, "fc2"))
    return None if found is None else (found, hook == "mlp_in")


def _added(layer: nn.Module, name: str | None) -> str | None:
    """The part of a module that gives what is added to the residual stream: some (of MPT and Bloom) add it to
    the stream themselves, behind their last product."""
    if name is None:
        return None
    module = layer.get_submodule(name)
    if "residual" not in inspect.signature(module.forward).parameters:
        return name
    return f"{name}.{[path for path, part in module.named_children() if isinstance(part, nn.Linear)][-1]}"


def site_of(hook_name: str | None) -> Site:
    """The place that the ``hook_name`` of an SAE means. Raises ConfigError if it is none that is known."""
    advice = "give the place that it reads with --layer and --hook"
    if hook_name is None:
        raise ConfigError(f"the SAE does not say which hook it reads; {advice}")
    try:
        return Site.parse(hook_name)
    except ConfigError as error:
        raise ConfigError(f"of the SAE, {error}; if it is one, {advice}") from None
