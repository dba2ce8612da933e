"""Every trainer that is timed, behind one face: build it, ``run(n)`` steps of it on given batches.

fastsae's step and two of plain torch need torch alone; the peers' packages are imported when theirs is
built. Each takes the steps of its own trainer, at its own defaults where ours has no name for it: the
batch, k, learning rate and precision are equal. ``dead`` marks latents that each counts as dead, so that
its aux loss runs (in sparsify and llamascopium, where it is off by default, with the others' 1/32).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from measure import Shape
from torch import Tensor

import fastsae
from fastsae.training.update import UPDATES
from fastsae_kernels import reference

DEAD_AFTER = 10_000_000
LR = 3e-4
AUX = 1 / 32
"""Weight of the aux loss where a peer leaves it off; what dictionary_learning has by default."""


@dataclass(frozen=True)
class Problem:
    """What is equal for all: the size, the batches, the precision, and which latents are dead."""

    shape: Shape
    batches: list[Tensor]  # each [B, D]
    device: str = "cpu"
    precision: str = "fp32"  # or bf16
    dead: Tensor | None = None  # [F] bool
    lr: float = LR
    rounded: bool = False
    """Whether ``x - b_dec`` and both weights are bf16 numbers to begin with; the batches are the caller's."""

    @property
    def k_aux(self) -> int:
        """Dead latents per token in everybody's aux loss: what the peers take. Our own default is 2k."""
        return max(1, self.shape.D // 2)

    @property
    def low(self) -> bool:
        return self.precision == "bf16"


class Weights:
    """Equal weights for everybody: random unit rows, ``W_enc = W_decᵀ``, dead latents biased down."""

    def __init__(self, problem: Problem) -> None:
        shape, generator = problem.shape, torch.Generator().manual_seed(1)
        rows = torch.randn(shape.F, shape.D, generator=generator)
        self.W_dec = reference.normalize_rows(rows).to(problem.device)
        self.b_enc = torch.zeros(shape.F, device=problem.device)
        self.b_dec = problem.batches[0].mean(0)
        if problem.rounded:
            self.W_dec, self.b_dec = self.W_dec.bfloat16().float(), torch.zeros_like(self.b_dec)
        if problem.dead is not None:
            # Two standard deviations down: still positive now and then, almost never selected.
            self.b_enc[problem.dead] = -2 * float((problem.batches[0] - self.b_dec).std())


class Runner(ABC):
    """A trainer in the middle of its training."""

    per_token = False
    """Whether it selects k latents of each token instead of k on average."""
    exact = False
    """Whether a step is the reference's, to rounding."""
    coarse_selection = False
    """Whether bf16 rounds the pre-activations that it selects among."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._cycle = cycle(problem.batches)
        self.prepare(Weights(problem))

    @abstractmethod
    def prepare(self, weights: Weights) -> None:
        """Build the trainer and give it ``weights``."""

    def run(self, steps: int) -> None:
        """Train for ``steps`` more steps."""
        self.mark_dead()
        self.train(islice(self._cycle, steps), steps)

    @abstractmethod
    def train(self, batches: Iterator[Tensor], steps: int) -> None: ...

    def mark_dead(self) -> None:  # noqa: B027
        """Tell the trainer which latents are dead, again: some may have been active since."""

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """``x̂ [B, D]`` with the weights as they are, selected as in training."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's first moments of ``W_enc`` and ``W_dec``, both ``[F, D]``; of exact runners."""
        raise NotImplementedError


# --- fastsae ---


class Fastsae(Runner):
    exact = True
    step_name = "fused"

    def config(self) -> fastsae.TrainConfig:
        p = self.problem
        return fastsae.TrainConfig(
            d_sae=p.shape.F,
            k=p.shape.k,
            batch_size=p.shape.B,
            lr=p.lr,
            k_aux=p.k_aux,
            dead_after_tokens=DEAD_AFTER,
            normalize="none",
            precision=p.precision,  # pyright: ignore
            step=self.step_name,  # pyright: ignore
            device=p.device,
        )

    def prepare(self, weights: Weights) -> None:
        p, config = self.problem, self.config()
        sae = fastsae.SAE(p.shape.D, p.shape.F, p.shape.k, device=p.device)
        sae.precision = p.precision  # pyright: ignore
        with torch.no_grad():
            sae.W_dec.copy_(weights.W_dec)
            sae.W_enc.copy_(weights.W_dec.T)
            sae.b_enc.copy_(weights.b_enc)
            sae.b_dec.copy_(weights.b_dec)
        self.step = UPDATES[config.step](sae, config)

    def mark_dead(self) -> None:
        if self.problem.dead is not None:
            self.step.tokens_since_active.masked_fill_(self.problem.dead, DEAD_AFTER)

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        for x in batches:
            self.result = self.step(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.step.sae.eval()(x, inference="batch")

    def moments(self) -> tuple[Tensor, Tensor]:
        state, rows = self.step.state_dict(), self.step.sae.W_dec.shape
        W_enc, W_dec = (state[f"adam.{name}.m"] for name in ("W_enc", "W_dec"))
        return (W_enc if W_enc.shape == rows else W_enc.T), W_dec


class FastsaeAutograd(Fastsae):
    """``--step autograd``."""

    step_name = "autograd"


# --- the same mathematics in plain torch, as trainers of BatchTopK SAEs write it ---


def dense_objective(
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    x: Tensor,
    K: int,
    dead: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor]:
    """What is minimised, and which latents were active ``[F]``; everything dense, ``W_enc [F, D]``."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    active = torch.relu(pre)
    top = active.flatten().topk(K, sorted=False)
    z = torch.zeros_like(active).flatten().scatter(0, top.indices, top.values).view_as(active)
    residual = x - (z @ W_dec + b_dec)
    objective = residual.float().square().sum(1).mean().log()
    if dead is not None:
        # Zero, and its gradient takes back what aux-k would give b_dec: cheaper than another product.
        given = torch.relu(pre + (b_dec - b_dec.detach()) @ W_enc.T)
        best = torch.where(dead, given, 0).topk(k_aux, dim=-1, sorted=False)
        z_aux = torch.zeros_like(active).scatter(-1, best.indices, best.values)
        target = residual.detach().float()
        error = (z_aux @ W_dec - target).float().square().mean()
        scale = (dead.sum() / k_aux).clamp(max=1) / (target - target.mean(0)).square().mean()
        objective = objective + 18.75 * scale * error
    return objective, (z > 0).any(0)


class Dense(Runner):
    exact = True
    coarse_selection = True
    compiled = False

    def prepare(self, weights: Weights) -> None:
        start = (weights.W_dec.clone(), weights.W_dec, weights.b_enc, weights.b_dec)
        self.parameters = [p.clone().requires_grad_() for p in start]
        self.adam = torch.optim.Adam(self.parameters, lr=self.problem.lr, fused=True)
        self.since = torch.zeros(
            self.problem.shape.F, dtype=torch.int64, device=self.problem.device
        )
        self.objective: Callable = (
            torch.compile(dense_objective) if self.compiled else dense_objective
        )

    def mark_dead(self) -> None:
        if self.problem.dead is not None:
            self.since.masked_fill_(self.problem.dead, DEAD_AFTER)

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        for x in batches:
            self._step(x)

    def _step(self, x: Tensor) -> None:
        p = self.problem
        dead = None if p.dead is None else self.since >= DEAD_AFTER
        with torch.autocast(p.device.split(":")[0], torch.bfloat16, enabled=p.low):
            objective, fired = self.objective(*self.parameters, x, p.shape.K, dead, p.k_aux)
        objective.backward()
        with torch.no_grad():
            W_dec = self.parameters[1]
            assert W_dec.grad is not None
            along = (W_dec.grad * W_dec).sum(1, keepdim=True)
            W_dec.grad -= along * W_dec
            self.adam.step()
            self.adam.zero_grad()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            self.since += len(x)
            self.since.masked_fill_(fired, 0)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        W_enc, W_dec, b_enc, b_dec = self.parameters
        pre = reference.pre_activations(x, W_enc.T, b_enc, b_dec)
        mask = reference.batch_topk_mask(pre, self.problem.shape.K)
        return reference.decode(pre * mask, W_dec, b_dec)

    def moments(self) -> tuple[Tensor, Tensor]:
        first, second = (self.adam.state[p]["exp_avg"] for p in self.parameters[:2])
        return first, second


class Compiled(Dense):
    compiled = True


# --- peers ---


def _setting(problem: Problem):
    from peers import Setting

    s = problem.shape
    return Setting(
        d_in=s.D,
        d_sae=s.F,
        k=int(s.k) if s.k == int(s.k) else s.k,  # pyright: ignore
        batch_size=s.B,
        steps=100_000,
        dead_after_tokens=DEAD_AFTER,
        lr=problem.lr,
        device=problem.device,
        autocast=problem.low,
    )


class SAELens(Runner):
    """Its ``SAETrainer.fit``, of a ``BatchTopKTrainingSAE``."""

    def prepare(self, weights: Weights) -> None:
        from peers import quiet, saelens_trainer

        self.quiet = quiet
        with quiet():
            self.trainer = saelens_trainer(_setting(self.problem), iter(()))
        self.trainer.cfg.total_training_samples = 0
        sae = self.trainer.sae
        with torch.no_grad():
            sae.W_dec.copy_(weights.W_dec)
            sae.W_enc.copy_(weights.W_dec.T)
            sae.b_enc.copy_(weights.b_enc)
            sae.b_dec.copy_(weights.b_dec)

    def mark_dead(self) -> None:
        if self.problem.dead is not None:
            self.trainer.n_forward_passes_since_fired[self.problem.dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        self.trainer.data_provider = batches
        self.trainer.cfg.total_training_samples += steps * self.problem.shape.B
        with self.quiet():
            self.trainer.fit()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae.train()(x)


class DictionaryLearning(Runner):
    """Its ``BatchTopKTrainer.update``, past the start of its threshold, which every later step tracks."""

    def prepare(self, weights: Weights) -> None:
        from peers import dictionary_learning_trainer

        self.trainer = dictionary_learning_trainer(_setting(self.problem))
        self.step = self.trainer.threshold_start_step + 1
        ae = self.trainer.ae
        with torch.no_grad():
            ae.decoder.weight.copy_(weights.W_dec.T)
            ae.encoder.weight.copy_(weights.W_dec)
            ae.encoder.bias.copy_(weights.b_enc)
            ae.b_dec.copy_(weights.b_dec)
        for _ in range(self.trainer.warmup_steps):  # the learning rate after its warm-up
            self.trainer.scheduler.step()

    def mark_dead(self) -> None:
        if self.problem.dead is not None:
            self.trainer.num_tokens_since_fired[self.problem.dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        p = self.problem
        with torch.autocast(p.device.split(":")[0], torch.bfloat16, enabled=p.low):
            for x in batches:
                self.trainer.update(self.step, x)
                self.step += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        ae = self.trainer.ae
        return ae.decode(ae.encode(x, use_threshold=False))


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


class Sparsify(Runner):
    """Its ``Trainer.fit``, at its default optimizer, on a model that replays the batches."""

    per_token = True

    def prepare(self, weights: Weights) -> None:
        if not self.problem.device.startswith("cuda"):
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels fail without a GPU
        from peers import quiet

        with quiet():
            from sparsify import SparseCoderConfig, TrainConfig, Trainer

            s = self.problem.shape
            config = TrainConfig(
                SparseCoderConfig(num_latents=s.F, k=int(s.k)),
                batch_size=1,
                hookpoints=["layer"],
                auxk_alpha=0.0 if self.problem.dead is None else AUX,
                dead_feature_threshold=DEAD_AFTER - 1,
                log_to_wandb=False,
                save_every=10**9,
            )
            model = _Replay(torch.cat(self.problem.batches))
            self.trainer = Trainer(config, _Rows(0, 1, s.B, len(self.problem.batches)), model)  # pyright: ignore
        self.quiet = quiet
        self.trainer.save = lambda: None  # what it writes when a run ends is no part of a step
        self.sae = self.trainer.saes["layer"]
        with torch.no_grad():
            self.sae.W_dec.copy_(weights.W_dec)
            self.sae.encoder.weight.copy_(weights.W_dec)
            self.sae.encoder.bias.copy_(weights.b_enc)
            self.sae.b_dec.copy_(weights.b_dec)

    def mark_dead(self) -> None:
        if self.problem.dead is not None:
            self.trainer.num_tokens_since_fired["layer"][self.problem.dead] = DEAD_AFTER

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        s, done = self.problem.shape, self.trainer.global_step
        self.trainer.dataset = _Rows(0, done + steps, s.B, len(self.problem.batches))  # pyright: ignore
        with self.quiet():
            self.trainer.fit()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out


class Llamascopium(Runner):
    """Its ``Trainer.fit``, without the metrics that it computes at every step unless told not to."""

    def prepare(self, weights: Weights) -> None:
        from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
        from llamascopium.trainer import Trainer, TrainerConfig
        from peers import quiet

        self.quiet, p, s = quiet, self.problem, self.problem.shape
        self.sae = SparseAutoEncoder(
            SAEConfig(
                hook_point_in="x",
                hook_point_out="x",
                d_model=s.D,
                expansion_factor=s.F / s.D,
                act_fn="batchtopk",
                top_k=int(s.k),
                norm_activation="inference",  # as given
                dtype=torch.float32,
                device=p.device,
            )
        )
        with torch.no_grad():
            self.sae.W_D.copy_(weights.W_dec)
            self.sae.W_E.copy_(weights.W_dec.T)
            # Its encoder does not subtract the decoder's bias: the same pre-activations by another bias.
            self.sae.b_E.copy_(weights.b_enc - weights.b_dec @ weights.W_dec.T)
            self.sae.b_D.copy_(weights.b_dec)
        self._trainer = lambda: Trainer(
            TrainerConfig(
                l1_coefficient=None,
                auxk_coefficient=None if p.dead is None else AUX,
                dead_threshold=DEAD_AFTER,
                amp_dtype=torch.bfloat16 if p.low else torch.float32,
                lr=p.lr,
                lr_warm_up_steps=1,
                k_warmup_steps=0,
                skip_metrics_calculation=True,
                total_training_tokens=10**6 * s.B,  # the stream's end ends it
                n_checkpoints=0,
                exp_result_path=tempfile.mkdtemp(),
            )
        )

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        trainer, dead = self._trainer(), self.problem.dead
        if dead is not None:
            initialize = trainer._initialize_dead_statistics

            def with_dead_latents(sae) -> None:
                initialize(sae)
                assert trainer.tokens_since_last_activation is not None
                trainer.tokens_since_last_activation[dead] = DEAD_AFTER
                trainer.is_dead = dead.clone()

            trainer._initialize_dead_statistics = with_dead_latents
        given = [
            {
                "x": x,
                "tokens": torch.zeros(len(x), dtype=torch.long, device=x.device),
                "mask": torch.ones(len(x), dtype=torch.bool, device=x.device),
            }
            for x in batches
        ]
        with self.quiet():
            trainer.fit(self.sae, given)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.train().decode(self.sae.encode(x))


RUNNERS: dict[str, type[Runner]] = {
    "fastsae": Fastsae,
    "fastsae, autograd": FastsaeAutograd,
    "torch, eager": Dense,
    "torch, compiled": Compiled,
    "SAELens": SAELens,
    "dictionary_learning": DictionaryLearning,
    "sparsify": Sparsify,
    "llamascopium": Llamascopium,
}
OURS = "fastsae"
PACKAGES = {
    "SAELens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "llamascopium": "llamascopium",
}


def missing(name: str) -> str | None:
    """Which package trainer ``name`` needs and does not find."""
    package = PACKAGES.get(name)
    return package if package and importlib.util.find_spec(package) is None else None
