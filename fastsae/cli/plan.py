"""What fits on which GPU, how long a step takes there, and what a run costs, before anything is rented.

    python -m fastsae.plan                          the recipe, on every GPU of the table
    python -m fastsae.plan --d-sae 131072 --k 128   another shape
    python -m fastsae.plan --gib 22                 the largest dictionary for that much memory

Memory is counted: the same tensors that a run allocates. **Times are predictions** of a roofline, each
stage limited by what the device can multiply, copy or gather; ``Device.source`` says which of these
rates were measured. Nothing here was confirmed by a run on the device it is about.

Needs the standard library alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Rates that bound a step, and the memory a program can have."""

    name: str
    memory_gib: float
    flops: float  # per second, dense matrix products in the training precision
    bandwidth: float  # bytes per second, a copy's reads and writes together
    gather: float  # bytes per second, rows of a few KB at random places
    source: str


DEVICES = (
    Device("H200", 139, 790e12, 4.3e12, 5.5e12, "products and copy measured, gather assumed"),
    Device("H100 80 GB", 78, 700e12, 3.0e12, 5.0e12, "assumed"),
    Device("A100 80 GB", 79, 270e12, 1.8e12, 3.5e12, "assumed"),
    Device("A100 40 GB", 39, 270e12, 1.4e12, 3.5e12, "assumed"),
    Device("RTX 4090", 23.5, 155e12, 0.93e12, 3.0e12, "assumed"),
)

MODEL_GIB = 6.2
"""Counted: Gemma 4 E2B in NF4 while it loads; once cut after layer 17 it takes 3.4."""
MODEL_GFLOP = 1.25
"""Assumed: per token, Gemma 4 E2B through layer 17."""
MODEL_EFFICIENCY = 0.4
"""Assumed: share of the device's product rate that the language model's forward pass reaches."""
RESERVED_GIB = 1.5
"""Assumed: the CUDA context, libraries, and the language model's own activations."""


# --- memory -------------------------------------------------------------------------------------


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


def step_bytes(B: int, D: int, F: int, k: float, *, dead: int = 0) -> int:
    """Bytes that come and go within a step: pre-activations, the selection, and a few ``[B, D]``.

    With ``dead`` latents also aux-k's compacted pre-activations and gradients. An upper estimate: not
    all live at the same time.
    """
    K = int(k * B)
    dense = 4 * B * F + 4 * B * (F // 32 + 1)
    selection = K * (4 + 4 + 4 + 4) + 4 * (B + F)
    activations = 6 * 4 * B * D
    aux = dead * (3 * 4 * B + 2 * 4 * D)
    return dense + selection + activations + aux


def run_bytes(
    B: int,
    D: int,
    F: int,
    k: float,
    *,
    pool_tokens: int,
    dead_share: float = 0.0,
    quantized: bool = False,
) -> int:
    """Bytes of a whole run beside the language model: state, step, and two pools of 16-bit activations."""
    pool = 2 * pool_tokens * D * 2
    dead = round(dead_share * F)
    return state_bytes(D, F, quantized=quantized) + step_bytes(B, D, F, k, dead=dead) + pool


def largest_F(gib: float, B: int, D: int, k: float, **options) -> int:
    """The largest multiple of 1024 latents whose run takes at most ``gib`` GiB; 0 if none does."""
    low, high = 0, 1
    while run_bytes(B, D, high * 1024, k, **options) <= gib * GIB:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if run_bytes(B, D, middle * 1024, k, **options) <= gib * GIB:
            low = middle
        else:
            high = middle
    return low * 1024


# --- time ---------------------------------------------------------------------------------------


def stage_seconds(
    B: int, D: int, F: int, k: float, device: Device, *, low: int = 2, quantized: bool = False
) -> dict[str, float]:
    """Least seconds of each stage of a step without dead latents, by what bounds it.

    ``low`` is the size of an operand in bytes: 2 in bf16, 4 in fp32 (which has no copy to write).
    """
    K = int(k * B)
    per_weight = (12 if quantized else 24) + (2 if low == 2 else 0)
    return {
        "encode": max(
            2 * B * D * F / device.flops, (low * (B * D + D * F) + 4 * B * F) / device.bandwidth
        ),
        "selection": (4 * B * F // 32 * 6 + K * 128 * 6 + K * 8) / device.bandwidth
        + 4 * B * F / device.bandwidth,
        "decode": K * D * low / device.gather + 12 * B * D / device.bandwidth,
        "update": 2 * D * F * per_weight / device.bandwidth + 2 * K * D * low / device.gather,
    }


def step_seconds(B: int, D: int, F: int, k: float, device: Device, **options) -> float:
    """The stages' least seconds, one after the other."""
    return sum(stage_seconds(B, D, F, k, device, **options).values())


def model_seconds(tokens: int, device: Device, gflop: float = MODEL_GFLOP) -> float:
    """Seconds of the language model's forward passes over ``tokens``."""
    return tokens * gflop * 1e9 / (MODEL_EFFICIENCY * device.flops)


# --- command line -------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> str:
    B, D, F, k = options.batch_size, options.d_in, options.d_sae, options.k
    extra = {
        "pool_tokens": options.pool_tokens,
        "dead_share": options.dead_share,
        "quantized": options.adam_8bit,
    }
    need = run_bytes(B, D, F, k, **extra) / GIB
    beside = options.model_gib + RESERVED_GIB
    lines = [
        f"B={B} tokens, D={D}, F={F:,} latents, k={k:g}, bf16, {'8-bit' if options.adam_8bit else 'fp32'} moments",
        f"memory: training state {state_bytes(D, F, quantized=options.adam_8bit) / GIB:.2f} GiB, with step and pools "
        f"{need:.2f} GiB; beside it {beside:.1f} GiB for the language model and CUDA (counted, assumed)",
        "",
        f"times are PREDICTED by a roofline, none is measured; {options.tokens / 1e6:,.0f}M tokens:",
        f"{'GPU':12} {'fits':5} {'largest F':>10} {'step':>9} {'SAE alone':>13} {'with model':>13} {'run':>8}"
        f" {'cost':>8}  rates",
    ]
    for device in DEVICES:
        step = step_seconds(B, D, F, k, device, quantized=options.adam_8bit)
        both = step + model_seconds(B, device, options.model_gflop)
        hours = options.tokens / B * both / 3600
        cost = f"{hours * options.price:.2f}" if options.price else "-"
        largest = largest_F(device.memory_gib - beside, B, D, k, **extra)
        fits = "yes" if need + beside <= device.memory_gib else "no"
        lines.append(
            f"{device.name:12} {fits:5} {largest:>10,} {1e3 * step:>6.2f} ms {B / step / 1e6:>7.2f} Mtok/s"
            f" {B / both / 1e6:>7.2f} Mtok/s {hours:>6.2f} h {cost:>8}  {device.source}"
        )
    if options.gib:
        free = options.gib - beside
        largest = largest_F(free, B, D, k, **extra)
        lines += ["", f"{options.gib:g} GiB: largest F {largest:,} ({largest / D:.0f}x)"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastsae.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--d-in", type=int, default=1536, help="model width D [1536]")
    parser.add_argument("--d-sae", type=int, default=24576, help="latents F [24576]")
    parser.add_argument("--k", type=float, default=64, help="mean active latents per token [64]")
    parser.add_argument("--batch-size", type=int, default=1024, help="tokens per step B [1024]")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the run [100M]")
    parser.add_argument(
        "--pool-tokens", type=int, default=262_144, help="activations mixed [262144]"
    )
    parser.add_argument("--dead-share", type=float, default=0.0, help="share of dead latents [0]")
    parser.add_argument("--adam-8bit", action="store_true", help="8-bit moments")
    parser.add_argument(
        "--model-gib", type=float, default=MODEL_GIB, help=f"language model's memory [{MODEL_GIB}]"
    )
    parser.add_argument(
        "--model-gflop",
        type=float,
        default=MODEL_GFLOP,
        help=f"language model's GFLOP per token [{MODEL_GFLOP}]",
    )
    parser.add_argument("--price", type=float, default=0.0, help="price of an hour, any currency")
    parser.add_argument("--gib", type=float, help="memory to find the largest dictionary for")
    options = parser.parse_args(arguments)
    for name in ("d_in", "d_sae", "k", "batch_size", "tokens"):
        if getattr(options, name) <= 0:
            parser.error(
                f"--{name.replace('_', '-')} must be positive, got {getattr(options, name):g}"
            )
    print(table(options))  # noqa: T201


if __name__ == "__main__":
    main()
