"""Are these the activations that the SAE was trained on? What its metadata says of them, held against a text."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError
from ..lm.encoding import Document
from ..lm.held_out import HeldOutText
from ..lm.hooked import SplicedModel
from ..sae.module import SAE

log = logging.getLogger(__name__)

_ADVICE = "use the program it was trained with, or transform its weights to read the plain stream"


def require_same_activations(sae: SAE, text: HeldOutText, model: SplicedModel) -> None:
    """Raise ConfigError if ``sae`` reads what no layer of ``model`` gives; warn of what ``text`` has otherwise.

    Names and meanings in the metadata are SAELens's.
    """
    metadata = sae.metadata
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        raise ConfigError(
            f"the SAE was trained with center_writing_weights, on a residual stream that has its mean over "
            f"the width taken away, and {model.name} is read as it is; {_ADVICE}"
        )
    if (head := metadata.get("hook_head_index")) is not None:
        raise ConfigError(
            f"the SAE was trained on the output of attention head {head} (hook_head_index), and no hook here "
            f"gives that of one; {_ADVICE}"
        )
    bos, wanted = model.tokenizer.bos_token_id, metadata.get("prepend_bos")
    begin = sum(int(row[0]) == bos for row in text.rows) > len(text) / 2
    if bos is not None and wanted is not None and bool(wanted) != begin:
        log.warning(
            "the SAE was trained on rows %s BOS in front (prepend_bos), and these have %s: activations "
            "differ, most at the beginning. Tokenize the text with prepend_bos=%s",
            "with" if wanted else "without", "one" if begin else "none", bool(wanted),
        )  # fmt: skip
    positions = metadata.get("seqpos_slice") or [None]
    if slice(*positions) != slice(None):
        log.warning(
            "the SAE was trained at positions %s of each row alone (seqpos_slice), and is measured at every "
            "position", ":".join("" if p is None else str(p) for p in positions),
        )  # fmt: skip


def tokenize_for(
    sae: SAE, model: SplicedModel, texts: Iterable[Document], context_length: int, **options: Any
) -> HeldOutText:
    """``texts`` in rows with BOS in front, or without where ``sae`` was trained so.

    ``options``: those of :meth:`HeldOutText.tokenize`.
    """
    bos = sae.metadata.get("prepend_bos") is not False
    return HeldOutText.tokenize(texts, model.tokenizer, context_length, prepend_bos=bos, **options)
