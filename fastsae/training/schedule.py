"""What changes over a run: the learning rate and, if wanted, k and the latent quota. Functions of the
tokens seen so far."""

from __future__ import annotations

from ..config import TrainConfig


def lr_factor_at(config: TrainConfig, tokens_seen: int, batch: int) -> float:
    """The learning rate of the step on the ``batch`` tokens after the first ``tokens_seen``, as a part of its peak.

    It rises linearly over the first ``warmup_tokens``, and falls linearly towards 0 over the last
    ``decay_tokens`` of ``tokens``; the step that ends a warm-up has the full rate, as has the one
    that begins a decay.
    """
    factor = 1.0
    if config.warmup_tokens:
        factor = min(factor, (tokens_seen + batch) / config.warmup_tokens)
    if config.decay_tokens:
        left = max(0, config.tokens - tokens_seen)
        factor = min(factor, left / config.decay_tokens)
    return factor


def k_at(config: TrainConfig, tokens_seen: int) -> float:
    """Mean active latents per token of that step: from ``k_initial`` linearly to ``k``."""
    if config.k_initial is None or tokens_seen >= config.k_anneal_tokens:
        return config.k
    share = tokens_seen / config.k_anneal_tokens
    return config.k_initial + (config.k - config.k_initial) * share


def quota_at(config: TrainConfig, tokens_seen: int) -> float:
    """The latent quota of that step: ``latent_quota``, and 0 from ``latent_quota_until`` of the run on.

    So a run that goes on to more ``tokens`` has the quota again until that share of them.
    """
    return config.latent_quota if tokens_seen < config.latent_quota_until * config.tokens else 0.0
