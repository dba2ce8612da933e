"""sparsify: ``Trainer.fit`` at its default optimizer; k of each token, and an aux loss that gives the
encoder no gradient."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fastsae

from .base import AUX, DEAD_AFTER, Problem, Trained, Trainer, Watch, Weights, quiet


class Sparsify(Trainer):
    """On a model that replays the batches."""

    package = "sparsify"
    per_token = True

    def prepare(self, weights: Weights) -> None:
        s, batches = self.problem.shape, self.problem.batches
        with quiet():
            self.trainer = new_trainer(
                _Rows(0, 1, s.B, len(batches)), _Replay(torch.cat(batches)), s.F, s.k,
                batch_size=1, hookpoints=["layer"], dead_feature_threshold=DEAD_AFTER - 1,
                auxk_alpha=0.0 if self.problem.dead is None else AUX,
            )  # fmt: skip
        self.sae = sae = self.trainer.saes["layer"]
        weights.copy_to(sae.W_dec, sae.encoder.weight.T, sae.encoder.bias, sae.b_dec)

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.num_tokens_since_fired["layer"][dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        s, done = self.problem.shape, self.trainer.global_step
        self.trainer.dataset = _Rows(0, done + steps, s.B, len(self.problem.batches))
        with quiet():
            self.trainer.fit()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out

    @classmethod
    def train_sae(cls, problem: Problem, watch: Watch) -> fastsae.SAE:
        s, steps = problem.shape, problem.steps
        model = _ReplayBatches(problem.batches, watch)
        with quiet(), tempfile.TemporaryDirectory() as directory:
            trainer = new_trainer(
                _Rows(0, steps, s.B, steps), model, s.F, s.k, batch_size=1, hookpoints=["layer"],
                lr=problem.lr, init_seeds=[problem.seed], dead_feature_threshold=problem.dead_after,
            )  # fmt: skip

            def current() -> fastsae.SAE:
                for optimizer in trainer.optimizers:
                    optimizer.eval()  # the averaged weights
                trainer.saes["layer"].save_to_disk(directory)
                for optimizer in trainer.optimizers:
                    optimizer.train()
                return fastsae.load(directory)

            model.current = current
            trainer.fit()
            return current()

    @classmethod
    def pipeline(cls, config: fastsae.TrainConfig) -> Trained:
        """It wants its text tokenised beforehand, and runs every layer."""
        from datasets import Dataset

        from .text import documents, language_model

        model, tokenizer, d_in = language_model(config)
        texts, context = documents(config), config.context_length
        start = time.perf_counter()
        ids: list[int] = []
        for text in texts:
            if len(ids) >= config.tokens:
                break
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows = config.tokens // context
        if len(ids) < rows * context:
            raise ValueError(f"the text has {len(ids):,} tokens, fewer than {config.tokens:,}")
        tokenised = time.perf_counter()
        with quiet():
            packed = torch.tensor(ids[: rows * context]).view(rows, context)
            trainer = new_trainer(
                Dataset.from_dict({"input_ids": packed}).with_format("torch"), model,
                config.resolve_d_sae(d_in), config.k,
                batch_size=max(1, config.batch_size // context), layers=[config.layer],
            )  # fmt: skip
            trainer.fit()
        end = time.perf_counter()
        (sae,) = trainer.saes.values()
        stages = {"tokenise": tokenised - start, "harvest, step": end - tokenised}
        return Trained(stages | {"total": end - start}, lambda x: sae(x).sae_out)


def new_trainer(dataset: Any, model: Any, latents: int, k: float, **settings: Any) -> Any:
    """A ``Trainer`` that writes nothing; ``settings``: fields of its ``TrainConfig``."""
    if model.device.type != "cuda":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels fail without a GPU
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    coder = SparseCoderConfig(num_latents=latents, k=int(k))
    config = TrainConfig(coder, log_to_wandb=False, save_every=10**9, **settings)
    trainer = Trainer(config, dataset, model)
    trainer.save = lambda: None  # what it writes when a run ends is no part of a step
    return trainer


class _Replay(torch.nn.Module):
    """A language model whose only layer gives back stored rows: token ids are their numbers."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.layer = rows, torch.nn.Identity()
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> _Replay:
        return self

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def forward(self, input_ids: Tensor, **_) -> Tensor:
        return self.layer(self.rows[input_ids])


class _ReplayBatches(_Replay):
    """The same of batches that are made when they are asked for, each once."""

    current: Callable[[], fastsae.SAE] | None = None

    def __init__(self, batches: Sequence[Tensor], watch: Watch) -> None:
        super().__init__(batches[0])
        self.batches, self.watch = batches, watch

    def forward(self, input_ids: Tensor, **_) -> Tensor:
        done = int(input_ids[0, 0]) // len(self.rows)
        if self.current is not None:
            self.watch(done, self.current)
        return self.layer(self.batches[done][None])


class _Rows(torch.utils.data.Dataset):
    """``n`` sequences of ``B`` row numbers, going round the stored batches."""

    def __init__(self, first: int, n: int, B: int, stored: int) -> None:
        self.first, self.n, self.B, self.stored = first, n, B, stored

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return {"input_ids": torch.arange(self.B) + (self.first + i) % self.stored * self.B}

    def select(self, indices: range) -> _Rows:
        return _Rows(self.first + indices.start, len(indices), self.B, self.stored)
