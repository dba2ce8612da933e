"""llamascopium: ``Trainer.fit``, without the metrics that it computes at every step unless told not to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import AUX, DEAD_AFTER, Trainer, Weights, quiet


class Llamascopium(Trainer):
    package = "llamascopium"

    def prepare(self, weights: Weights) -> None:
        from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
        from llamascopium.trainer import TrainerConfig

        p, s = self.problem, self.problem.shape
        self.sae = SparseAutoEncoder(
            SAEConfig(
                hook_point_in="x", hook_point_out="x", d_model=s.D, expansion_factor=s.F / s.D,
                act_fn="batchtopk", top_k=int(s.k), dtype=torch.float32, device=p.device,
                norm_activation="inference",  # as given
            )
        )  # fmt: skip
        weights.copy_to(self.sae.W_D, self.sae.W_E, self.sae.b_E, self.sae.b_D)
        with torch.no_grad():
            # Its encoder does not subtract the decoder's bias: the same pre-activations by another bias.
            self.sae.b_E.sub_(weights.b_dec @ weights.W_dec.T)
        self.new_config = lambda: TrainerConfig(
            l1_coefficient=None, auxk_coefficient=None if p.dead is None else AUX,
            dead_threshold=DEAD_AFTER, amp_dtype=torch.bfloat16 if p.low else torch.float32,
            lr=p.lr, lr_warm_up_steps=1, k_warmup_steps=0, skip_metrics_calculation=True,
            total_training_tokens=10**6 * s.B,  # the stream's end ends it
            n_checkpoints=0, exp_result_path=tempfile.mkdtemp(),
        )  # fmt: skip

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        from llamascopium.trainer import Trainer

        trainer, dead = Trainer(self.new_config()), self.problem.dead
        if dead is not None:
            initialize = trainer._initialize_dead_statistics

            def with_dead_latents(sae) -> None:
                initialize(sae)
                trainer.tokens_since_last_activation[dead] = DEAD_AFTER
                trainer.is_dead = dead.clone()

            trainer._initialize_dead_statistics = with_dead_latents
        given = []
        for x in batches:
            tokens = torch.zeros(len(x), dtype=torch.long, device=x.device)
            given.append({"x": x, "tokens": tokens, "mask": tokens == 0})
        with quiet():
            trainer.fit(self.sae, given)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.train().decode(self.sae.encode(x))
