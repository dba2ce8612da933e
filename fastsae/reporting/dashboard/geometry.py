"""What the weights alone tell of each latent: tokens it promotes, and latents that point the same way."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...lm.hooked import SplicedModel
from ...progress import progress
from ...sae.module import SAE

log = logging.getLogger(__name__)

_PRODUCTS = 2**26  # entries of one block of a product: 256 MB


class Ranked(NamedTuple):
    """The best ``n`` of something for each latent: ``indices`` and ``values`` ``[F, n]``, on the CPU."""

    indices: Tensor
    values: Tensor


@torch.no_grad()
def neighbours(sae: SAE, count: int = 8) -> Ranked:
    """The latents whose decoder rows have the largest cosines with each latent's, itself left out."""
    rows = normalize(sae.W_dec.float(), dim=1)
    count = min(count, sae.d_sae - 1)
    step = max(1, _PRODUCTS // sae.d_sae)
    indices, values = [], []
    with progress("report: neighbours", sae.d_sae, "latents") as advance:
        for start in range(0, sae.d_sae, step):
            cosines = rows[start : start + step] @ rows.T
            own = torch.arange(len(cosines), device=cosines.device)
            cosines[own, start + own] = -2
            best = cosines.topk(count, dim=1)
            indices.append(best.indices.cpu())
            values.append(best.values.cpu())
            advance(len(cosines))
    return Ranked(torch.cat(indices), torch.cat(values))


@torch.no_grad()
def random_cosines(sae: SAE, sample: int = 512) -> Tensor:
    """``[sample]``: the largest cosine of a random direction with as many others as the SAE has latents.

    What the cosines of :func:`neighbours` would be if the decoder had no structure.
    """
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(sae.d_sae, sae.d_out, generator=generator), dim=1)
    sample = min(sample, sae.d_sae)
    cosines = rows[:sample] @ rows.T
    cosines[torch.arange(sample), torch.arange(sample)] = -2
    return cosines.amax(1)


@torch.no_grad()
def logit_effects(sae: SAE, model: SplicedModel, count: int = 10) -> tuple[Ranked, Ranked] | None:
    """Tokens whose logits one unit of each latent raises and lowers most, on the direct path; None if the
    model has none.

    ``W_dec`` times the gain of the final norm times the unembedding, less its mean over the vocabulary:
    the norm's scale, the layers in between and a soft cap are left out. So are rows of the unembedding
    that pad it beyond the tokenizer's last token.
    """
    found_path = model.unembedding()
    if found_path is None:
        log.info(
            "%s has no direct path to its logits; no tokens are promoted in the report", model.name
        )
        return None
    unembedding, gain, centred = found_path
    unembedding = unembedding[: 1 + max(model.tokenizer.get_vocab().values())]
    rows = sae.W_dec.to(unembedding.device, torch.float32)
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    rows = (rows * gain.float()).to(unembedding.dtype)
    vocabulary = len(unembedding)
    count = min(count, vocabulary)
    step = max(1, _PRODUCTS // vocabulary)
    found: tuple[list[Ranked], list[Ranked]] = ([], [])
    with progress("report: promoted tokens", sae.d_sae, "latents") as advance:
        for part in rows.split(step):
            effects = (part @ unembedding.T).float()
            effects -= effects.mean(1, keepdim=True)
            for kept, largest in zip(found, (True, False), strict=True):
                best = effects.topk(count, dim=1, largest=largest)
                kept.append(Ranked(best.indices.cpu(), best.values.cpu()))
            advance(len(part))
    promoted, suppressed = (
        Ranked(torch.cat([r.indices for r in kept]), torch.cat([r.values for r in kept]))
        for kept in found
    )
    return promoted, suppressed


class TokenNames:
    """Token ids as the text they stand for, a leading space included; each is looked up once."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._parts: set[int] = set()  # tokens that are part of a character
        # A token alone may lose its leading space in decoding: it is read off behind another one.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._prefix = len(self._decode(self._anchor))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _text(self, ids: list[int]) -> str:
        return self._decode([*self._anchor, *ids])[self._prefix :]

    def __call__(self, token: int) -> str:
        if token not in self._known:
            text = self._text([token])
            if not text or "\ufffd" in text:
                name = self._tokenizer.convert_ids_to_tokens(token)
                if name is None:  # a row that pads the vocabulary, or a hole in it
                    text = f"<{token}: no token>"
                else:
                    if text and name != text:  # part of a character has no text of its own
                        self._parts.add(token)
                    text = _bytes(name) or name
            self._known[token] = text
        return self._known[token]

    def row(self, ids: list[int]) -> list[str]:
        """The tokens of a text; a character of several is shown by its first, the others are ``PART``."""
        names = [self(token) for token in ids]
        start = 0
        while start < len(ids):
            length = 1
            if ids[start] in self._parts:
                for n in range(2, _MOST_PARTS + 1):
                    text = self._text(ids[start : start + n])
                    if "\ufffd" not in text and start + n <= len(ids):
                        names[start : start + n] = [text, *[PART] * (n - 1)]
                        length = n
                        break
            start += length
        return names


def name_in_row(names: list[str], position: int) -> str:
    """The token at ``position`` of a :meth:`TokenNames.row`; of a part of a character, with the character."""
    first = position
    while names[first] == PART:
        first -= 1
    return names[first] + PART * (first < position)


PART = "⋯"
_MOST_PARTS = 8
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PRINTED} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTED)
}
"""The signs in which byte-level vocabularies write bytes."""


def _bytes(name: str) -> str | None:
    """A token of a byte-level vocabulary as hexadecimal bytes, None if it is of another kind."""
    if name.startswith("<0x") or any(sign not in _BYTES for sign in name):
        return None
    return "".join(f"<0x{_BYTES[sign]:02X}>" for sign in name)
