"""What a run takes: its memory, counted, and its time and price, predicted from rates you measured.

    fastsae plan                                    memory of the recipe
    fastsae plan --d-sae 131072 --k 128 --gib 80    another shape, and what fits on a GPU of 80 GiB
    fastsae plan --tflops 790 --bandwidth 4.3       time, from what the GPU multiplies and copies

Memory is that of the tensors a run allocates. Times are predictions of a roofline, the least that each
stage of a step can take at the rates given; no rate is assumed. The rates above were measured on an H200.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config import TrainConfig
from ..errors import ConfigError
from .options import parse

GIB = 2**30
_RECIPE = TrainConfig()


@dataclass(frozen=True)
class PlanOptions:
    """The shape of a run, and the machine it is to run on."""

    d_in: int = 1536
    """Width of the language model."""
    d_sae: int = _RECIPE.resolve_d_sae(1536)
    """Dictionary size (latents)."""
    k: float = _RECIPE.k
    """Mean active latents per token."""
    batch_size: int = _RECIPE.batch_size
    """Tokens per step."""
    tokens: int = _RECIPE.tokens
    """Tokens of the run."""
    pool_tokens: int = _RECIPE.pool_tokens
    """Activations mixed with each other before they are trained on."""
    matryoshka: tuple[int, ...] = ()
    """Levels of a Matryoshka SAE."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Matrix products of the SAE."""
    moments: Literal["fp32", "8bit"] = "fp32"
    """Adam's moments."""
    dead_share: float = 0.0
    """Share of the latents that are dead, for the memory of the aux-k loss."""
    gib: float | None = None
    """The GPU's memory in GiB, to find the largest dictionary for."""
    model_gib: float = 6.2
    """What of it the language model takes; counted for Gemma 4 E2B in NF4 while it loads."""
    tflops: float | None = None
    """Measured rate of dense matrix products in --precision, in 10^12 operations per second."""
    bandwidth: float | None = None
    """Measured rate of a copy, reads and writes together, in 10^12 bytes per second."""
    harvest_tokens_per_second: float | None = None
    """Measured rate of the language model, as tokens_per_second_harvest in a run's metrics.jsonl."""
    usd_per_hour: float | None = None
    """Price of the machine."""

    def __post_init__(self) -> None:
        shared = {f.name for f in dataclasses.fields(self)} & vars(_RECIPE).keys()
        TrainConfig(**{name: getattr(self, name) for name in shared})  # checks them
        rates = ("tflops", "bandwidth", "harvest_tokens_per_second", "usd_per_hour")
        for name in ("d_in", "gib", *rates):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive finite number, got {value:g}")
        if not 0 <= self.model_gib < math.inf:
            raise ConfigError(f"model_gib must be at least 0, got {self.model_gib:g}")
        if not 0 <= self.dead_share <= 1:
            raise ConfigError(f"dead_share is a share of the latents, got {self.dead_share:g}")
        if (self.tflops is None) != (self.bandwidth is None):
            raise ConfigError("a step is predicted from two rates: both --tflops and --bandwidth")
        if self.tflops is None and (self.harvest_tokens_per_second or self.usd_per_hour):
            raise ConfigError("time and price need a step's; give --tflops and --bandwidth too")


def state_bytes(D: int, F: int, *, copy: bool = True, quantized: bool = False) -> int:
    """Bytes of all that a training step keeps: weights, moments, compute copies and counters.

    Args:
        copy: a 16-bit copy of both matrices, as bf16 training has.
        quantized: 8-bit moments with a scale per row.
    """
    matrices = 2 * F * D * (4 + (2 if quantized else 8) + (2 if copy else 0))
    scales = 2 * F * 8 if quantized else 0
    vectors = (F + D) * 12
    counters = F * 8
    return matrices + scales + vectors + counters


def step_bytes(B: int, D: int, F: int, k: float, *, dead: int = 0, levels: int = 1) -> int:
    """Bytes that come and go within a step: pre-activations, the selection, and a few ``[B, D]``, of which
    each of several ``levels`` has its residual and its gradient, scaled and rounded.

    With ``dead`` latents also aux-k's compacted pre-activations and gradients. An upper estimate: not
    all live at the same time.
    """
    K = int(k * B)
    dense = 4 * B * F + 4 * B * (F // 32 + 1)
    selection = K * (4 + 4 + 4 + 4) + 4 * (B + F)
    activations = (6 + 4 * (levels - 1)) * 4 * B * D
    aux = dead * (3 * 4 * B + 2 * 4 * D)
    return dense + selection + activations + aux


def run_bytes(
    B: int, D: int, F: int, k: float, *, pool_tokens: int, dead_share: float = 0.0, levels: int = 1,
    **kept: bool,
) -> int:  # fmt: skip
    """Bytes of a whole run beside the language model: state, step, and two pools of 16-bit activations.

    ``kept`` are the options of :func:`state_bytes`.
    """
    pools = 2 * pool_tokens * D * 2
    step = step_bytes(B, D, F, k, dead=round(dead_share * F), levels=levels)
    return state_bytes(D, F, **kept) + step + pools


def largest_F(gib: float, B: int, D: int, k: float, **options) -> int:
    """The largest multiple of 1024 latents whose run takes at most ``gib`` GiB; 0 if none does."""
    need = lambda thousands: run_bytes(B, D, thousands * 1024, k, **options)
    return bisect_right(range(1, 2**30), gib * GIB, key=need) * 1024


class Rates(NamedTuple):
    """What a device does per second."""

    flops: float  # operations of dense matrix products in the training precision
    bandwidth: float  # bytes of a copy, reads and writes together


def stage_bytes(
    B: int, D: int, F: int, k: float, *, low: int = 2, quantized: bool = False
) -> dict[str, int]:
    """Fewest bytes that each stage of a step without dead latents reads and writes.

    ``low`` is the size of an operand in bytes: 2 in bf16, 4 in fp32 (which has no copy to write).
    """
    K = int(k * B)
    per_weight = (12 if quantized else 24) + (2 if low == 2 else 0)
    return {
        "encode": low * (B * D + D * F) + 4 * B * F,
        "selection": 4 * B * F + 4 * B * F // 32 * 6 + K * 128 * 6 + K * 8,
        "decode": K * D * low + 12 * B * D,
        "update": 2 * D * F * per_weight + 2 * K * D * low,
    }


def stage_seconds(B: int, D: int, F: int, k: float, rates: Rates, **options) -> dict[str, float]:
    """Least seconds of each stage: those of its bytes, and of the encoder's product if they are more."""
    moved = stage_bytes(B, D, F, k, **options)
    seconds = {stage: count / rates.bandwidth for stage, count in moved.items()}
    return seconds | {"encode": max(2 * B * D * F / rates.flops, seconds["encode"])}


def main(arguments: Sequence[str], prog: str) -> None:
    """The command. Raises ConfigError."""
    print("\n".join(describe(parse(PlanOptions, arguments, prog, __doc__))))  # noqa: T201


def describe(o: PlanOptions) -> list[str]:
    """What the command prints."""
    shape = (o.batch_size, o.d_in, o.d_sae, o.k)
    quantized = o.moments == "8bit"
    kept = {"copy": o.precision == "bf16", "quantized": quantized}
    levels = len(o.matryoshka) or 1
    extra = {"pool_tokens": o.pool_tokens, "dead_share": o.dead_share, "levels": levels, **kept}
    state = state_bytes(o.d_in, o.d_sae, **kept) / GIB
    step = step_bytes(*shape, dead=round(o.dead_share * o.d_sae), levels=levels) / GIB
    need = run_bytes(*shape, **extra) / GIB
    lines = [
        f"{o.d_sae:,} latents of width {o.d_in}, k {o.k:g}, {o.batch_size:,} tokens a step, "
        f"{o.precision}, {o.moments} moments",
        "",
        "memory (counted)         GiB",
        f"  training state    {state:8.2f}",
        f"  within a step     {step:8.2f}   at most",
        f"  two pools         {need - state - step:8.2f}",
        f"  together          {need:8.2f}   beside the language model and CUDA itself",
    ]
    if o.gib is not None:
        free = o.gib - o.model_gib
        largest = largest_F(free, o.batch_size, o.d_in, o.k, **extra)
        lines.append(
            f"  {'fits' if need <= free else 'does not fit'} in {o.gib:g} GiB less {o.model_gib:g} for the "
            f"language model; the largest dictionary there is {largest:,} ({largest / o.d_in:.0f} x width)"
        )
    if o.tflops is None or o.bandwidth is None:
        return [*lines, "", "give --tflops and --bandwidth of your GPU to have its time predicted"]
    rates = Rates(1e12 * o.tflops, 1e12 * o.bandwidth)
    stages = stage_seconds(*shape, rates, low=2 if kept["copy"] else 4, quantized=quantized)
    seconds = sum(stages.values())
    lines += [
        "",
        f"predicted at {o.tflops:g} TFLOP/s and {o.bandwidth:g} TB/s",
        *(f"  {stage:28}{1e3 * value:9.3f} ms" for stage, value in stages.items()),
        f"  {'step':28}{1e3 * seconds:9.3f} ms   {o.batch_size / seconds:,.0f} tokens per second",
    ]
    what = "run, the SAE alone"
    if o.harvest_tokens_per_second is not None:
        seconds += o.batch_size / o.harvest_tokens_per_second
        what = "run, with the language model"
    hours = -(-o.tokens // o.batch_size) * seconds / 3600
    lines.append(f"  {what:28}{hours:9.2f} h    {o.tokens:,} tokens")
    if o.usd_per_hour is not None:
        lines.append(f"  {'price':28}{hours * o.usd_per_hour:9.2f} USD")
    return lines
