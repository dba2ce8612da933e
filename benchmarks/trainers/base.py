"""What a trainer is, and what is equal for all of them.

Each takes the steps of its own training code, at its own defaults where the others have no name for
them; the fields of :class:`Problem` and Adam's betas are equal. Counts of steps that only one has are
scaled to the length of the run. ``dead`` marks latents that each counts as dead, so that its aux loss
runs (in sparsify and llamascopium, where it is off by default, with weight ``AUX``).
"""

from __future__ import annotations

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from measure import Shape, activations
from torch import Tensor

import fastsae
from fastsae_kernels import reference

DEAD_AFTER = 10_000_000
LR = 3e-4
AUX = 1 / 32  # weight of the aux loss where a peer leaves it off; dictionary_learning's default
NOMINAL_STEPS = 100_000  # length of run for which the peers' counts of steps are meant
BATCHES = 4  # different ones that a timed trainer goes round


@dataclass(frozen=True)
class Problem:
    """What is equal for all: the size, the batches, the run, the precision, and which latents are dead."""

    shape: Shape
    batches: Sequence[Tensor]  # each [B, D]
    device: str = "cpu"
    precision: str = "fp32"  # or bf16, in the way that each documents
    dead: Tensor | None = None  # [F] bool
    lr: float | None = LR  # None: the trainer's own default
    steps: int = NOMINAL_STEPS
    dead_after: int = DEAD_AFTER
    seed: int = 0
    rounded: bool = False  # whether b_dec is 0 and both weights bf16 numbers to begin with

    @classmethod
    def synthetic(
        cls, shape: Shape, device: str, precision: str = "fp32", dead_share: float = 0.0
    ) -> Problem:
        """``BATCHES`` made-up batches, and ``dead_share`` of the latents dead."""
        dead = None
        if dead_share:
            order = torch.randperm(shape.F, generator=torch.Generator().manual_seed(2))
            dead = torch.zeros(shape.F, dtype=torch.bool, device=device)
            dead[order[: round(dead_share * shape.F)].to(device)] = True
        return cls(shape, activations(shape, BATCHES, device), device, precision, dead)

    @property
    def k(self) -> Any:
        """``k`` as the whole number that most trainers ask for, where it is one."""
        return int(self.shape.k) if self.shape.k == int(self.shape.k) else self.shape.k

    @property
    def k_aux(self) -> int:
        """Dead latents per token in everybody's aux loss: what the peers take. Our own default is 2k."""
        return max(1, self.shape.D // 2)

    @property
    def low(self) -> bool:
        return self.precision == "bf16"

    @property
    def tokens(self) -> int:
        return self.steps * self.shape.B

    def scaled_steps(self, nominal: int) -> int:
        """``nominal`` steps of a run of ``NOMINAL_STEPS``, as the same share of this run."""
        return max(1, round(nominal * self.steps / NOMINAL_STEPS))

    def autocast(self) -> torch.autocast:
        """Where ``precision`` is bf16, products in bf16."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.low)


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

    @torch.no_grad()
    def copy_to(self, W_dec: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
        """Into a trainer's own tensors, ``W_enc [D, F]``."""
        W_dec.copy_(self.W_dec)
        W_enc.copy_(self.W_dec.T)
        b_enc.copy_(self.b_enc)
        b_dec.copy_(self.b_dec)


Watch = Callable[[int, Callable[[], fastsae.SAE]], None]


def watched(
    batches: Iterable[Tensor], watch: Watch, current: Callable[[], fastsae.SAE]
) -> Iterator[Tensor]:
    """``batches`` for a trainer that asks for the next one when it has trained on the last."""
    for done, batch in enumerate(batches):
        watch(done, current)
        yield batch


class Trained(NamedTuple):
    """What a run from text to SAE took and gave."""

    seconds: dict[str, float]  # by stage, and "total"; loading is in none
    reconstruct: Callable[[Tensor], Tensor]  # x [n, D] to x̂, selected as in training


class Trainer(ABC):
    """A trainer in the middle of its training."""

    package: str | None = None  # what must be installed
    per_token = False  # whether it selects k latents of each token instead of k on average
    exact = False  # whether a step is the reference's, to rounding
    rounded_moments = False  # whether moments are kept in 8 bits
    coarse_selection = False  # whether bf16 rounds the pre-activations that it selects among
    counts: Tensor | None = None  # tokens [F] of each latent in the last step, where it knows

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._cycle = cycle(problem.batches)
        self.prepare(Weights(problem))

    @abstractmethod
    def prepare(self, weights: Weights) -> None:
        """Build the trainer and give it ``weights``."""

    def run(self, steps: int) -> None:
        """Train for ``steps`` more steps."""
        if self.problem.dead is not None:
            self.mark_dead(self.problem.dead)
        self.train(islice(self._cycle, steps), steps)

    @abstractmethod
    def train(self, batches: Iterator[Tensor], steps: int) -> None: ...

    def mark_dead(self, dead: Tensor) -> None:  # noqa: B027
        """Tell the trainer which latents are dead, again: some may have been active since."""

    @classmethod
    def replays(cls, device: str) -> bool:
        """Whether its steps there are replayed graphs, which must be the eager steps to the last bit."""
        return False

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """``x̂ [B, D]`` with the weights as they are, selected as in training."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's first moments of ``W_enc`` and ``W_dec``, both ``[F, D]``; of exact trainers."""
        raise NotImplementedError

    @classmethod
    def train_sae(cls, problem: Problem, watch: Watch, **options: Any) -> fastsae.SAE:
        """A run of its own on all of the batches, from its own initial weights, read from its own files.

        ``watch`` is called with the number of steps done, and what gives the SAE as it is then.
        """
        raise NotImplementedError

    @classmethod
    def pipeline(cls, config: fastsae.TrainConfig) -> Trained:
        """A run of its own from the text of ``config`` to an SAE."""
        raise NotImplementedError


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
