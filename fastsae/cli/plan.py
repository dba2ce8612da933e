"""What a run takes: its memory, counted, and its time and price, predicted from rates you measured.

    fastsae plan                                    memory of the recipe
    fastsae plan --d-sae 131072 --k 128 --gib 80    another shape, and what fits on a GPU of 80 GiB
    fastsae plan --tflops 790 --bandwidth 4.3       time, from what the GPU multiplies and copies
    fastsae plan --gpus 8 --batch-size 8192         memory of a GPU of 8, and the bytes that it receives

Memory is that of the tensors a run allocates. Times are predictions of a roofline, the least that each
stage of a step can take at the rates given; the rates above were measured on an H200. Without rates, the
step is modelled on an H100 and on an H200, at rates that are assumed.
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
    reuse: int = _RECIPE.reuse
    """Times that each activation is trained on; --tokens counts all of them."""
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
    """Price of the machine, of each of several --nodes."""
    gpus: int = 1
    """GPUs in all, each with a process of its own."""
    nodes: int = 1
    """Machines that they are in, as many in each."""
    lanes: int | None = None
    """Streams that the text is dealt to. [as many as GPUs]"""
    latent_shards: int | None = None
    """Pieces of the dictionary. [as many as GPUs; 1 of a Matryoshka SAE]"""
    nvlink_gbyte: float | None = None
    """Measured rate at which a GPU receives from others of its node, in 10^9 bytes per second."""
    network_gbit: float | None = None
    """Measured rate at which a GPU receives from other nodes, in 10^9 bits per second."""

    def __post_init__(self) -> None:
        shared = {f.name for f in dataclasses.fields(self)} & vars(_RECIPE).keys()
        config = TrainConfig(**{name: getattr(self, name) for name in shared})  # checks them
        rates = ("tflops", "bandwidth", "harvest_tokens_per_second", "usd_per_hour")
        links = {"nvlink_gbyte": self.gpus > self.nodes, "network_gbit": self.nodes > 1}
        for name in ("d_in", "gib", "gpus", "nodes", *rates, *links):
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
        if self.gpus % self.nodes:
            raise ConfigError(
                f"gpus = {self.gpus} are not as many in each of nodes = {self.nodes}; --gpus counts those of "
                f"all nodes"
            )
        _, lanes, shards = self.split
        if self.gpus > lanes:
            raise ConfigError(
                f"lanes = {lanes} are fewer than gpus = {self.gpus}: each has one at least; raise --lanes"
            )
        config = dataclasses.replace(config, lanes=lanes, latent_shards=shards)
        config.resolve_d_sae(self.d_in)  # checks them too
        for name, is_used in links.items():
            flag, given = f"--{name.replace('_', '-')}", getattr(self, name) is not None
            if given and not (is_used and self.tflops):
                raise ConfigError(
                    f"{flag} is a rate between GPUs, for the time of a step; give --gpus (and --nodes), --tflops and "
                    f"--bandwidth too"
                )
            if is_used and not given and self.tflops:
                raise ConfigError(f"a step of {self.gpus} GPUs is predicted from {flag}, too")

    @property
    def split(self) -> Split:
        """The parts of the run, as training cuts it."""
        shards = 1 if self.matryoshka else self.gpus
        return Split(self.gpus, self.lanes or self.gpus, self.latent_shards or shards)


class Split(NamedTuple):
    """A run's parts, over its GPUs. What is said of a GPU is said of the one that has most."""

    gpus: int = 1
    lanes: int = 1
    shards: int = 1

    @property
    def lanes_here(self) -> int:
        """Lanes of a GPU."""
        return -(-self.lanes // self.gpus)

    @property
    def shards_here(self) -> int:
        """Shards of a GPU."""
        return -(-self.shards // self.gpus)

    def latents_here(self, F: int) -> int:
        """Those of ``F`` latents that are in a GPU's shards, or one more."""
        return -(-F * self.shards_here // self.shards)

    def pool_tokens_here(self, pool_tokens: int) -> int:
        """Those of ``pool_tokens`` that are in a GPU's lanes; each of several keeps four forward passes, as
        large as the recipe's, at least."""
        if self.lanes == 1:
            return pool_tokens
        least = 4 * _RECIPE.harvest_batch * _RECIPE.context_length
        return self.lanes_here * max(least, pool_tokens // self.lanes)

    def tokens_here(self, B: int) -> int:
        """Those of a batch of ``B`` tokens that a GPU harvests, or one more for each of its lanes."""
        return self.lanes_here * -(-B // self.lanes)


ALONE = Split()


def state_bytes(D: int, F: int, *, quantized: bool = False) -> int:
    """Bytes of all that a training step keeps: weights, moments and counters.

    A bf16 operand is the upper half of its weight. ``quantized``: 8-bit moments with a scale per row.
    """
    matrices = 2 * F * D * (4 + (2 if quantized else 8))
    scales = 2 * F * 8 if quantized else 0
    vectors = (F + D) * 12
    counters = F * 8
    return matrices + scales + vectors + counters


def step_bytes(
    B: int, D: int, F: int, k: float, *, dead: int = 0, levels: int = 1, split: Split = ALONE
) -> int:
    """Bytes that come and go within a step: pre-activations, the selection, and a few ``[B, D]``, of which
    each of several ``levels`` has its residual and its gradient, scaled and rounded.

    With ``dead`` latents also aux-k's compacted pre-activations and gradients. Of a dictionary in shards,
    pre-activations of one at a time; of each of a GPU's a selection, looked at by its digits, and a partial sum,
    which is put together, sent, and received from others. An upper estimate: not all live at the same time.
    """
    K, shard = int(k * B), -(-F // split.shards)
    dense = 4 * B * shard + 4 * B * (shard // 32 + 1)
    digits, sums = (48, 4) if split.shards > 1 else (0, 0)
    selection = split.shards_here * (K * (4 + 4 + 4 + 4 + digits) + 4 * (B + shard))
    activations = (6 + 4 * (levels - 1) + sums * split.shards_here) * 4 * B * D
    aux = dead * (3 * 4 * B + 2 * 4 * D)
    return dense + selection + activations + aux


def run_bytes(
    B: int, D: int, F: int, k: float, *, pool_tokens: int, dead_share: float = 0.0, levels: int = 1,
    split: Split = ALONE, **kept: bool,
) -> int:  # fmt: skip
    """Bytes of a GPU in a whole run beside the language model: state, step, and two pools of 16-bit
    activations.

    ``kept`` are the options of :func:`state_bytes`.
    """
    here = split.latents_here(F)
    pools = 2 * split.pool_tokens_here(pool_tokens) * D * 2
    step = step_bytes(B, D, F, k, dead=round(dead_share * here), levels=levels, split=split)
    return state_bytes(D, here, **kept) + step + pools


def largest_F(gib: float, B: int, D: int, k: float, **options) -> int:
    """The largest multiple of 1024 latents whose run takes at most ``gib`` GiB; 0 if none does."""
    need = lambda thousands: run_bytes(B, D, thousands * 1024, k, **options)
    return bisect_right(range(1, 2**30), gib * GIB, key=need) * 1024


class Rates(NamedTuple):
    """What a device does per second."""

    flops: float  # operations of dense matrix products in the training precision
    bandwidth: float  # bytes of a copy, reads and writes together


def stage_bytes(
    B: int, D: int, F: int, k: float, *, low: int = 2, quantized: bool = False, split: Split = ALONE
) -> dict[str, int]:
    """Fewest bytes that each stage of a step without dead latents reads and writes, on a GPU whose latents
    are as active as others.

    ``low`` is the size of an operand in bytes: 2 in bf16, 4 in fp32.
    """
    K, here = int(k * B), split.latents_here(F)
    active = K * here // F
    per_weight = 12 if quantized else 24
    # All that is selected may be in one shard: each lists as many.
    listed = split.shards_here * (K * 128 * 6 + K * 8)
    return {
        "encode": low * (B * D + D * here) + 4 * B * here,
        "selection": 4 * B * here + 4 * B * here // 32 * 6 + listed,
        "decode": active * D * low + 12 * B * D,
        "update": 2 * D * here * per_weight + 2 * active * D * low,
    }


def stage_seconds(
    B: int, D: int, F: int, k: float, rates: Rates, *, split: Split = ALONE, **options
) -> dict[str, float]:
    """Least seconds of each stage: those of its bytes, and of the encoder's product if they are more."""
    moved = stage_bytes(B, D, F, k, split=split, **options)
    seconds = {stage: count / rates.bandwidth for stage, count in moved.items()}
    product = 2 * B * D * split.latents_here(F) / rates.flops
    return seconds | {"encode": max(product, seconds["encode"])}


ASSUMED = {"H100": Rates(790e12, 3.0e12), "H200": Rates(790e12, 4.3e12)}
KERNELS, GAP = 35, 1.2e-6
"""Of a step without dead latents, and the seconds between two in a CUDA graph."""
RECIPE, MEASURED = (1024, 1536, 24576, 64), 863e-6
"""Seconds of a step of that shape on an H200: ``benchmarks/results/performance.json``."""


def modelled_seconds(B: int, D: int, F: int, k: float, gpu: str) -> float:
    """Seconds of a step in bf16, with moments in fp32, on a GPU of ``ASSUMED``; nothing here is measured.

    At the recipe's shape within 15 % of what ``benchmarks/gpu_model.py`` makes of each
    kernel's instructions and bytes.
    """
    return sum(stage_seconds(B, D, F, k, ASSUMED[gpu]).values()) + KERNELS * GAP


def main(arguments: Sequence[str], prog: str) -> None:
    """The command. Raises ConfigError."""
    print("\n".join(describe(parse(PlanOptions, arguments, prog, __doc__))))  # noqa: T201


def describe(o: PlanOptions) -> list[str]:
    """What the command prints."""
    shape = (o.batch_size, o.d_in, o.d_sae, o.k)
    quantized = o.moments == "8bit"
    kept = {"quantized": quantized}
    levels, split = len(o.matryoshka) or 1, o.split
    here = split.latents_here(o.d_sae)
    options = {"levels": levels, "split": split}
    extra = {"pool_tokens": o.pool_tokens, "dead_share": o.dead_share, **options, **kept}
    state = state_bytes(o.d_in, here, **kept) / GIB
    step = step_bytes(*shape, dead=round(o.dead_share * here), **options) / GIB
    need = run_bytes(*shape, **extra) / GIB
    lines = [
        f"{o.d_sae:,} latents of width {o.d_in}, k {o.k:g}, {o.batch_size:,} tokens a step, "
        f"{o.precision}, {o.moments} moments",
    ]
    if split != ALONE:
        lines += [
            f"{o.gpus:,} GPUs in nodes of {o.gpus // o.nodes:,}, {split.lanes:,} lanes, {split.shards:,} latent "
            f"shards; of the GPU that has most:",
            f"{here:,} latents, and {split.tokens_here(o.batch_size):,} tokens of a step to harvest",
        ]
    lines += [
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
    received = received_each_step(o) if o.gpus > 1 else {}
    total = sum(received.values())
    outside = outside_bytes(received, o.gpus, o.nodes)
    if received:
        lines += ["", "received (counted)        MB   each step"]
        lines += [f"  {purpose:18}{count / 1e6:8.2f}" for purpose, count in received.items()]
        lines.append(f"  together          {total / 1e6:8.2f}")
    if outside:
        lines.append(
            f"  from other nodes  {outside / 1e6:8.2f}   if gathers and sums go round all GPUs, once into each node"
        )
    if o.tflops is None or o.bandwidth is None:
        if (o.gpus, o.precision, o.moments) == (1, "bf16", "fp32"):
            lines += ["", "modelled, not measured; the SAE alone, no latent dead"]
            for gpu in ASSUMED:
                seconds = modelled_seconds(*shape, gpu)
                lines.append(
                    f"  step on an {gpu}    {1e3 * seconds:8.2f} ms   {o.batch_size / seconds:,.0f} tokens per second"
                )
            modelled = 1e3 * modelled_seconds(*RECIPE, "H200")
            lines.append(
                f"one was measured: the recipe's on an H200, {1e3 * MEASURED:.2f} ms, modelled to take {modelled:.2f}"
            )
        return [*lines, "", "give --tflops and --bandwidth of your GPU to have its time predicted"]
    rates = Rates(1e12 * o.tflops, 1e12 * o.bandwidth)
    low = 2 if o.precision == "bf16" else 4
    stages = stage_seconds(*shape, rates, low=low, quantized=quantized, split=split)
    at = f"{o.tflops:g} TFLOP/s and {o.bandwidth:g} TB/s"
    if o.nvlink_gbyte is not None:
        at += f", {o.nvlink_gbyte:g} GB/s received"
        stages["receive, in the node"] = (total - outside) / (1e9 * o.nvlink_gbyte)
    if o.network_gbit is not None:
        at += f", {o.network_gbit:g} Gbit/s from other nodes"
        stages["receive, from other nodes"] = 8 * outside / (1e9 * o.network_gbit)
    if o.gpus > 1:
        at += ", one after the other, no latency"
    seconds = sum(stages.values())
    lines += [
        "",
        f"predicted at {at}",
        *(f"  {stage:28}{1e3 * value:9.3f} ms" for stage, value in stages.items()),
        f"  {'step':28}{1e3 * seconds:9.3f} ms   {o.batch_size / seconds:,.0f} tokens per second",
    ]
    what = "run, the SAE alone"
    if o.harvest_tokens_per_second is not None:
        seconds += split.tokens_here(o.batch_size) / o.reuse / o.harvest_tokens_per_second
        what = "run, with the language model"
    hours = -(-o.tokens // o.batch_size) * seconds / 3600
    lines.append(f"  {what:28}{hours:9.2f} h    {o.tokens:,} tokens")
    if o.usd_per_hour is not None:
        lines.append(f"  {'price':28}{hours * o.usd_per_hour * o.nodes:9.2f} USD")
    return lines


def received_each_step(o: PlanOptions) -> dict[str, int]:
    """Bytes that the GPU which receives most receives in a step, by purpose: what training counts, in the part of
    the run that has a latent quota."""
    from ..training.traffic import received_bytes  # imports torch, which one GPU's plan needs not

    split, k_aux = o.split, max(1, round(2 * o.k))
    by_rank = [
        received_bytes(
            rank=rank, size=split.gpus, d_in=o.d_in, d_sae=o.d_sae, shards=split.shards, lanes=split.lanes,
            tokens=o.batch_size, budget=int(o.k * o.batch_size), quota=_RECIPE.latent_quota, k_aux=k_aux,
            aux_runs=o.dead_share > 0,
        )
        for rank in range(split.gpus)
    ]  # fmt: skip
    most = max(by_rank, key=lambda received: sum(received.values()))
    # A dictionary in one piece is trained by one process, which needs the batch alone.
    return most if split.shards > 1 else {n: most[n] for n in ("activations", "agreement")}


def outside_bytes(received: dict[str, int], gpus: int, nodes: int) -> int:
    """Those of the ``received`` that come from other nodes. Partial sums, aux-k's among them, are sent from each
    to each; all else goes round, and a node's GPUs share what enters it."""
    here = gpus // nodes
    if nodes == 1:
        return 0
    direct = sum(received.get(purpose, 0) for purpose in ("partial sums", "aux-k"))
    return direct * (gpus - here) // (gpus - 1) + (sum(received.values()) - direct) // here
