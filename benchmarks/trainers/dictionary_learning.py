"""dictionary_learning: ``BatchTopKTrainer.update``, and ``trainSAE``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae

from .base import DEAD_AFTER, Problem, Trainer, Watch, Weights, quiet, watched
from .sparse_products import SparseProducts


class DictionaryLearning(Trainer):
    """Past the start of its threshold, which every later step tracks, and of its warm-up."""

    package = "dictionary_learning"

    def prepare(self, weights: Weights) -> None:
        self.trainer = new_trainer(self.problem)
        self.step = self.trainer.threshold_start_step + 1
        ae = self.trainer.ae
        weights.copy_to(ae.decoder.weight.T, ae.encoder.weight.T, ae.encoder.bias, ae.b_dec)
        for _ in range(self.trainer.warmup_steps):
            self.trainer.scheduler.step()

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.num_tokens_since_fired[dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        with self.problem.autocast():
            for x in batches:
                self.trainer.update(self.step, x)
                self.step += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        ae = self.trainer.ae
        return ae.decode(ae.encode(x, use_threshold=False))

    @classmethod
    def train_sae(cls, problem: Problem, watch: Watch) -> fastsae.SAE:
        from dictionary_learning.training import trainSAE

        trainer = new_trainer(problem)
        with quiet(), SparseProducts(), tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / "trainer_0"

            def current() -> fastsae.SAE:
                torch.save(trainer.ae.state_dict(), folder / "ae.pt")
                return fastsae.load(folder)

            trainSAE(
                data=watched(problem.batches, watch, current), steps=problem.steps, save_dir=directory,
                trainer_configs=[{"trainer": lambda: trainer}], device="cpu",
            )  # fmt: skip
            return current()


def new_trainer(problem: Problem) -> Any:
    """A trainer whose ``update(step, batch)`` trains on one batch."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    thousand = problem.scaled_steps(1000)
    trainer = BatchTopKTrainer(
        steps=problem.steps, activation_dim=problem.shape.D, dict_size=problem.shape.F, k=problem.k,
        layer=0, lm_name="", lr=problem.lr, warmup_steps=thousand, threshold_start_step=thousand,
        threshold_beta=1 - 1 / thousand, seed=problem.seed, device=problem.device,
    )  # fmt: skip
    trainer.dead_feature_threshold = problem.dead_after
    return trainer
