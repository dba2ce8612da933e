"""fastsae: ``fastsae train``'s own step, and its ``Trainer``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

import fastsae
from fastsae.training.update import UPDATES
from fastsae_kernels import reference
from fastsae_kernels.update.state import decode_moment

from .base import DEAD_AFTER, Problem, Trained, Trainer, Watch, Weights

CONSTANT: dict[str, Any] = {
    "lr_warmup_tokens": 0, "lr_decay_tokens": 0, "latent_quota": 0.0,
    "decoder_lr_ratio": 1.0, "adam_betas": (0.9, 0.999),
}  # fmt: skip
"""The learning rate of a problem is that of every step, and selection and Adam are those of the other trainers."""


class Fastsae(Trainer):
    exact = True
    settings: ClassVar[dict[str, Any]] = {}  # a GPU's steps replay graphs, as by default

    def prepare(self, weights: Weights) -> None:
        p = self.problem
        config = fastsae.TrainConfig(
            d_sae=p.shape.F, k=p.shape.k, batch_size=p.shape.B, lr=p.lr, k_aux=p.k_aux, **CONSTANT,
            dead_after_tokens=DEAD_AFTER, normalize="none", precision=p.precision, device=p.device,
            **self.settings,
        )  # fmt: skip
        sae = fastsae.SAE(p.shape.D, p.shape.F, p.shape.k, device=p.device)
        sae.precision = p.precision
        weights.copy_to(sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec)
        self.step = UPDATES[config.step](sae, config)

    def mark_dead(self, dead: Tensor) -> None:
        self.step.mark_dead(dead)

    @classmethod
    def eager(cls) -> type[Fastsae]:
        """The same without graphs."""
        settings = cls.settings | {"cuda_graph": False}
        return type(cls.__name__, (cls,), {"settings": settings})

    @classmethod
    def replays(cls, device: str) -> bool:
        return device.startswith("cuda") and cls.settings.get("cuda_graph", True)

    def state(self) -> dict[str, Tensor]:
        return self.step.state_dict()

    def train(self, batches: Iterator[Tensor], steps: int) -> None:
        for x in batches:
            self.counts = self.step(x).counts

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.step.sae.eval()(x, inference="batch")

    def moments(self) -> tuple[Tensor, Tensor]:
        state, rows = self.step.state_dict(), self.step.sae.W_dec.shape
        W_enc, W_dec = (state[f"adam.{name}.m"] for name in ("W_enc", "W_dec"))
        if self.rounded_moments:
            scales = (state[f"adam.{name}.m_scale"] for name in ("W_enc", "W_dec"))
            W_enc, W_dec = map(decode_moment, (W_enc, W_dec), scales)
        return (W_enc if W_enc.shape == rows else W_enc.T), W_dec

    @classmethod
    def train_sae(
        cls,
        problem: Problem,
        watch: Watch,
        scale_by_norm: bool = False,
        encoder_start: float = reference.ENCODER_START,
        **options: Any,
    ) -> fastsae.SAE:
        """``options``: fields of ``TrainConfig``; all else is as by default, and what is saved on the way
        comes from the run's checkpoints. ``scale_by_norm``: give activations a mean norm of 1, as
        earlier versions did, where the default gives one to their distances from their mean.
        ``encoder_start``: begin with so many times ``W_decᵀ`` in ``W_enc``, of which the default is a quarter."""
        p = problem
        batches: Iterable[Tensor] = p.batches
        scale = 1.0
        if scale_by_norm:
            options["normalize"] = "none"
            scale = float(p.batches[0].norm(dim=1).mean())
            batches = (x / scale for x in p.batches)

        def in_its_units(sae: fastsae.SAE) -> fastsae.SAE:
            with torch.no_grad():
                sae.b_enc *= scale
                sae.b_dec *= scale
                sae.activation.threshold *= scale
            return sae

        with tempfile.TemporaryDirectory() as directory:
            config = fastsae.TrainConfig(
                d_sae=p.shape.F, k=p.k, batch_size=p.shape.B, tokens=p.tokens, lr=p.lr, seed=p.seed,
                device=p.device, out=directory, name="run", report="none", wandb="disabled",
                checkpoint_every_tokens=max(1, p.tokens // 10), keep_checkpoints=10,
                **{**cls.settings, **options},
            )  # fmt: skip
            with mock.patch.object(reference, "ENCODER_START", encoder_start):
                (sae,) = fastsae.Trainer(config, batches).fit()
            saved = {int(p.name[5:]): p for p in Path(directory).glob("run/checkpoints/step_*")}
            for step, path in sorted(saved.items()):
                watch(step, lambda path=path: in_its_units(fastsae.load(path)))
            return in_its_units(sae)

    @classmethod
    def pipeline(cls, config: fastsae.TrainConfig) -> Trained:
        # Imported here: a step needs neither the language model's packages nor the text's.
        from .text import Timed, open_stream

        config = dataclasses.replace(config, **cls.settings)
        stream = open_stream(config)
        before = stream.seconds  # held-out rows are not trained on
        waiting = stream.next_batch = Timed(stream.next_batch)
        fit = Timed(lambda: fastsae.Trainer(config, stream).fit())
        (sae,) = fit()
        stages = {stage: seconds - before[stage] for stage, seconds in stream.seconds.items()}
        mixing = waiting.seconds - sum(stages.values())
        stages |= {"mix": mixing, "step": fit.seconds - waiting.seconds, "total": fit.seconds}
        return Trained(stages, lambda x: sae(x, inference="batch"))


class Autograd(Fastsae):
    settings: ClassVar = {"step": "autograd"}


class Quantized(Fastsae):
    rounded_moments = True  # when they are stored: the first step is exact
    settings: ClassVar = {"moments": "8bit"}
