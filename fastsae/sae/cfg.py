"""An SAE as other programs address it: ``sae.cfg``, and the name of its hook in TransformerLens."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from ..config import Site
from ..errors import ConfigError


class Cfg(SimpleNamespace):
    """Attributes under SAELens's names, for programs that read and set them, such as SAEBench."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def cfg_of(sae: Any) -> Cfg:
    """The ``Cfg`` of an ``SAE``. ``hook_name`` is TransformerLens's where it has one, ``hf_hook_name`` the path;
    what the SAE does not know of its model is None."""
    path, known = sae.hook_name, sae.metadata
    hook_name = transformer_lens_name(path) or path
    layer = re.search(r"\d+", hook_name or "")
    architecture = type(sae.activation).__name__.lower()
    return Cfg(
        architecture=architecture,
        architecture_str=architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        dtype=str(sae.dtype).removeprefix("torch."),
        device=str(sae.device),
        normalize_activations="layer_norm" if sae.normalize == "layer_norm" else "none",
        apply_b_dec_to_input=True,
        model_name=known.get("model_name"),
        hook_name=hook_name,
        hf_hook_name=known.get("hf_hook_name", path),
        hook_layer=int(layer[0]) if layer else None,
        hook_head_index=known.get("hook_head_index"),
        context_size=known.get("context_size"),
        prepend_bos=known.get("prepend_bos", True),
        seqpos_slice=known.get("seqpos_slice", [None]),
        exclude_special_tokens=known.get("exclude_special_tokens", False),
        dataset_path=known.get("dataset_path"),
        dataset_trust_remote_code=False,
        model_from_pretrained_kwargs=known.get("model_from_pretrained_kwargs") or {},
    )


def transformer_lens_name(hook_name: Any) -> str | None:
    """TransformerLens's name of a hook that a name or the path of a decoder layer means; None if neither does.

    ``model.layers.17`` is ``blocks.17.hook_resid_post``.
    """
    try:
        return Site.parse(str(hook_name)).transformer_lens
    except ConfigError:
        return None
