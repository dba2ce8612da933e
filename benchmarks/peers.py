"""The other trainers, each through its own training code, on the same batches.

Whatever both sides have a name for is equal: data, steps, batch, dictionary size, k, learning rate,
Adam's betas, and after how many tokens a latent is dead. What only a peer has stays as it documents
it; its counts of steps, written for runs of many more steps, are scaled to the length of the run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastsae

if TYPE_CHECKING:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

NORM_BATCHES = 100
"""Batches from which a peer estimates the norm of its input: the run's first."""

NOMINAL_STEPS = 100_000
"""The length of run for which the peers' counts of steps are taken to be meant."""


@dataclass(frozen=True)
class Setting:
    """What is equal for every trainer."""

    d_in: int
    d_sae: int
    k: int
    batch_size: int
    steps: int
    dead_after_tokens: int
    lr: float = 3e-4
    seed: int = 0
    device: str = "cpu"
    autocast: bool = False  # bf16, in the way that each documents

    @property
    def tokens(self) -> int:
        return self.batch_size * self.steps

    def scaled_steps(self, nominal: int) -> int:
        """``nominal`` steps of a run of ``NOMINAL_STEPS``, as the same share of this run."""
        return max(1, round(nominal * self.steps / NOMINAL_STEPS))


# --- SAELens ---


def saelens_trainer(setting: Setting, batches: Iterator[Tensor], **sae_config: Any) -> SAETrainer:
    """SAELens's ``SAETrainer`` of a ``BatchTopKTrainingSAE``; ``sae_config`` are the latter's fields.

    ``trainer.fit()`` trains on all ``batches``, ``trainer.step(batch)`` on one.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(setting.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=setting.d_in,
            d_sae=setting.d_sae,
            k=setting.k,
            device=setting.device,
            **sae_config,
        )
    )
    config = SAETrainerConfig(
        total_training_samples=setting.tokens,
        train_batch_size_samples=setting.batch_size,
        lr=setting.lr,
        lr_end=setting.lr / 10,  # of a decay that is off
        # Dead is a count of steps *above* the window here, of at least so many tokens elsewhere.
        dead_feature_window=-(-setting.dead_after_tokens // setting.batch_size) - 1,
        n_batches_for_norm_estimate=min(NORM_BATCHES, setting.steps),
        device=setting.device,
        autocast=setting.autocast,
    )
    return SAETrainer(config, sae, batches)


def train_saelens(batches: list[Tensor], setting: Setting, **sae_config: Any) -> fastsae.SAE:
    """Train with SAELens and convert by way of its inference files."""
    estimate = batches[:NORM_BATCHES] if "normalize_activations" in sae_config else []
    with quiet():
        sae: BatchTopKTrainingSAE = saelens_trainer(
            setting, chain(estimate, batches), **sae_config
        ).fit()
        with tempfile.TemporaryDirectory() as directory:
            sae.save_inference_model(directory)
            return fastsae.load(directory)


# --- dictionary_learning ---


def dictionary_learning_trainer(setting: Setting) -> BatchTopKTrainer:
    """dictionary_learning's ``BatchTopKTrainer``; ``trainer.update(step, batch)`` trains on one batch."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    average_over = setting.scaled_steps(1000)
    trainer = BatchTopKTrainer(
        steps=setting.steps,
        activation_dim=setting.d_in,
        dict_size=setting.d_sae,
        k=setting.k,
        layer=0,
        lm_name="",
        lr=setting.lr,
        warmup_steps=setting.scaled_steps(1000),
        threshold_beta=1 - 1 / average_over,
        threshold_start_step=setting.scaled_steps(1000),
        seed=setting.seed,
        device=setting.device,
    )
    trainer.dead_feature_threshold = setting.dead_after_tokens
    return trainer


def train_dictionary_learning(
    batches: list[Tensor], setting: Setting, normalize_activations: bool
) -> fastsae.SAE:
    """Train with dictionary_learning's ``trainSAE`` and convert by way of its files."""
    from dictionary_learning.training import trainSAE

    with quiet(), tempfile.TemporaryDirectory() as directory:
        trainSAE(
            data=_Clones(batches),
            trainer_configs=[{"trainer": dictionary_learning_trainer, "setting": setting}],
            steps=setting.steps,
            save_dir=directory,
            normalize_activations=normalize_activations,
            device="cpu",
        )
        return fastsae.load(Path(directory) / "trainer_0")


class _Clones:
    """Batches that may be read several times and changed in place, as trainSAE does."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.clone() for batch in self._batches)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and prints."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
