"""What the weights alone tell of each latent: tokens it promotes, and latents that point the same way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...lm.hooked import SplicedModel
from ...sae.module import SAE

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
    for start in range(0, sae.d_sae, step):
        cosines = rows[start : start + step] @ rows.T
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, start + own] = -2
        best = cosines.topk(count, dim=1)
        indices.append(best.indices.cpu())
        values.append(best.values.cpu())
    return Ranked(torch.cat(indices), torch.cat(values))


@torch.no_grad()
def random_cosines(sae: SAE, sample: int = 512) -> Tensor:
    """``[sample]``: the largest cosine of a random direction with as many others as the SAE has latents.

    What the cosines of :func:`neighbours` would be if the decoder had no structure.
    """
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(sae.d_sae, sae.d_in, generator=generator), dim=1)
    sample = min(sample, sae.d_sae)
    cosines = rows[:sample] @ rows.T
    cosines[torch.arange(sample), torch.arange(sample)] = -2
    return cosines.amax(1)


@torch.no_grad()
def logit_effects(sae: SAE, model: SplicedModel, count: int = 10) -> tuple[Ranked, Ranked]:
    """Tokens whose logits one unit of each latent raises and lowers most, on the direct path.

    ``W_dec`` times the gain of the final norm times the unembedding, less its mean over the vocabulary:
    the norm's scale, the layers in between and a soft cap are left out.
    """
    unembedding, gain, centred = model.unembedding()
    rows = sae.W_dec.to(unembedding.device, torch.float32)
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    rows = (rows * gain.float()).to(unembedding.dtype)
    vocabulary = len(unembedding)
    count = min(count, vocabulary)
    step = max(1, _PRODUCTS // vocabulary)
    found: tuple[list[Ranked], list[Ranked]] = ([], [])
    for part in rows.split(step):
        effects = (part @ unembedding.T).float()
        effects -= effects.mean(1, keepdim=True)
        for kept, largest in zip(found, (True, False), strict=True):
            best = effects.topk(count, dim=1, largest=largest)
            kept.append(Ranked(best.indices.cpu(), best.values.cpu()))
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
        # A token alone may lose its leading space in decoding: it is read off behind another one.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._prefix = len(self._decode(self._anchor))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def __call__(self, token: int) -> str:
        if token not in self._known:
            text = self._decode([*self._anchor, token])[self._prefix :]
            # Part of a character has no text of its own.
            if not text or "\ufffd" in text:
                text = str(self._tokenizer.convert_ids_to_tokens(token))
            self._known[token] = text
        return self._known[token]
