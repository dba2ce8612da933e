"""Which device a run uses, in which precision, and how much of its memory."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from .errors import ConfigError


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that exists; ``auto`` is CUDA where there is one,
    and CUDA without a number the device of torchrun's ``LOCAL_RANK``, or the first.

    Raises:
        ConfigError: CUDA is asked for and absent, or has no such index.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        own = int(os.environ.get("LOCAL_RANK", "0")) if resolved.index is None else resolved.index
        if own >= count:
            raise ConfigError(
                f"device = {str(device)!r}, but PyTorch {torch.__version__} sees {count} CUDA devices on "
                f"this machine; use --device cpu (or auto), or install a driver and a CUDA build of PyTorch"
            )
        resolved = torch.device("cuda", own)
    return resolved


def resolve_precision(precision: str, device: torch.device) -> Any:
    """``auto`` as the precision it stands for: bf16 on CUDA, fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what takes longer than fp32, or is fp32 by another name.

    Raises:
        ConfigError: bf16 or tf32 on a CPU.
    """
    does = {"bf16": "rounds operands and multiplies in fp32, which takes longer", "tf32": "is fp32"}
    if device.type == "cpu" and precision in does:
        raise ConfigError(
            f"precision = {precision!r} is for training on CUDA: on a CPU it {does[precision]}; use "
            f"--precision fp32, or auto"
        )


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has held so far: allocated on a CUDA device, resident on a CPU.

    None where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
