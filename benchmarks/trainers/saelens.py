"""SAELens: ``SAETrainer.fit`` of a ``BatchTopKTrainingSAE``, and ``LanguageModelSAETrainingRunner``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

import fastsae

from .base import DEAD_AFTER, LR, Problem, Trained, Trainer, Watch, Weights, quiet, watched
from .sparse_products import SparseProducts


class SAELens(Trainer):
    package = "sae_lens"

    def prepare(self, weights: Weights) -> None:
        with quiet():
            self.trainer = new_trainer(self.problem, iter(()))
        self.trainer.cfg.total_training_samples = 0
        sae = self.trainer.sae
        weights.copy_to(sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec)

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired[dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        self.trainer.data_provider = batches
        self.trainer.cfg.total_training_samples += steps * self.problem.shape.B
        with quiet():
            self.trainer.fit()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae.train()(x)

    @classmethod
    def train_sae(
        cls, problem: Problem, watch: Watch, start_at_mean: bool = False, **options: Any
    ) -> fastsae.SAE:
        """``options``: fields of its SAE's config; with ``matryoshka_widths`` that is the Matryoshka's.
        ``start_at_mean``: begin with ``b_dec`` there, which it does not by itself."""
        with quiet(), SparseProducts(), tempfile.TemporaryDirectory() as directory:
            trainer = new_trainer(problem, iter(()), **options)
            if start_at_mean:
                with torch.no_grad():
                    trainer.sae.b_dec.copy_(torch.cat(problem.batches[:8]).mean(0))

            def current() -> fastsae.SAE:
                trainer.sae.save_inference_model(directory)
                return fastsae.load(directory)

            trainer.data_provider = watched(problem.batches, watch, current)
            trainer.fit()
            return current()

    @classmethod
    def pipeline(cls, config: fastsae.TrainConfig) -> Trained:
        """Its runner as a user starts it, without evaluations, logging and saving."""
        import sae_lens
        from datasets import Dataset
        from sae_lens.load_model import HookedProxyLM

        from .text import Timed, documents, language_model

        model, tokenizer, d_in = language_model(config)
        hook = f"model.layers.{config.layer}"
        with quiet():
            sae_config = sae_lens.BatchTopKTrainingSAEConfig(
                d_in=d_in, d_sae=config.resolve_d_sae(d_in), k=config.k
            )
            runner = sae_lens.LanguageModelSAETrainingRunner(
                sae_lens.LanguageModelSAERunnerConfig(
                    sae=sae_config, model_name=config.model, hook_name=hook,
                    model_class_name="AutoModelForCausalLM", dataset_path="text",
                    is_dataset_tokenized=False, streaming=False, context_size=config.context_length,
                    store_batch_size_prompts=config.harvest_batch,
                    n_batches_in_buffer=config.pool_tokens // config.context_length,
                    train_batch_size_tokens=config.batch_size, training_tokens=config.tokens,
                    lr=config.peak_lr(sae_config.d_sae, d_in), exclude_special_tokens=True, device="cpu", verbose=False,
                    logger=sae_lens.LoggingConfig(log_to_wandb=False), n_checkpoints=0, checkpoint_path=None,
                    output_path=None,
                ),
                override_dataset=Dataset.from_dict({"text": documents(config)}),
                override_model=HookedProxyLM(model, tokenizer, [hook]),
            )  # fmt: skip
            store, run = runner.activations_store, Timed(runner.run)
            waiting = Timed(store.get_data_loader().__next__)
            store._dataloader = (waiting() for _ in count())
            sae = run()
        stages = {"tokenise, harvest, mix": waiting.seconds, "step": run.seconds - waiting.seconds}
        return Trained(stages | {"total": run.seconds}, sae.train())


def new_trainer(problem: Problem, batches: Iterator[Tensor], **sae_config: Any) -> Any:
    """An ``SAETrainer`` whose ``fit`` trains on all ``batches``."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(problem.seed)
    shape, lr = problem.shape, problem.lr or LR  # its runner's default
    kinds = (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
    if "matryoshka_widths" in sae_config:
        kinds = (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
    sae = kinds[1](d_in=shape.D, d_sae=shape.F, k=problem.k, device=problem.device, **sae_config)
    config = SAETrainerConfig(
        total_training_samples=problem.tokens, train_batch_size_samples=shape.B,
        lr=lr, lr_end=lr / 10,  # of a decay that is off
        # Dead is a count of steps *above* the window here, of at least so many tokens elsewhere.
        dead_feature_window=-(-problem.dead_after // shape.B) - 1,
        device=problem.device, autocast=problem.low,
    )  # fmt: skip
    return SAETrainer(config, kinds[0](sae), batches)
