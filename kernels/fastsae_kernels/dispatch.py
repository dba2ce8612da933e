"""Triton or torch: the one module that decides, and the one way an operation is registered.

CUDA tensors run on Triton where it is installed; everything else runs on the sparse torch code that
each operation holds beside its kernels. Triton on a machine without a GPU is never touched.
Kernel files take ``jit``, ``tl`` and ``triton`` from here, so they import where Triton does not exist.

``FASTSAE_KERNELS=auto|triton|torch`` sets the choice for a process, ``use(...)`` for a block. Kernels
run on CPU tensors, for tests, under ``TRITON_INTERPRET=1`` set before the first import and
``use("triton")``.
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

if TYPE_CHECKING:
    import triton.language as tl

    # A kernel is compiled from its syntax and launched by its name: to a type checker it is anything.
    triton: Any = ...
    knobs: Any = ...
    jit: Any = ...
else:
    try:
        import triton
        import triton.language as tl
        from triton import knobs  # since 3.4: an older one is as none

        jit = triton.jit
    except ImportError:
        triton = None

        class tl:
            """What a kernel's definition, as opposed to its body, needs of triton.language."""

            constexpr = staticmethod(lambda value: value)

        def jit(function):
            return function


def cdiv(n: int, size: int) -> int:
    """How many of ``size`` hold ``n``. Triton's own takes the host as long as a launch."""
    return -(-n // size)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; one where kernels are only tried, on a CPU."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def power_of_2(n: int) -> int:
    """The smallest that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


HAS_TRITON = triton is not None
INTERPRETED = HAS_TRITON and bool(knobs.runtime.interpret)

Implementation = Literal["triton", "torch"]
Choice = Literal["auto", "triton", "torch"]

logger = logging.getLogger("fastsae_kernels")


def _checked(choice: str) -> str:
    if choice not in get_args(Choice):
        raise ValueError(
            f"unknown implementation {choice!r}: expected 'auto', 'triton' or 'torch' "
            "(in use(...) or the environment variable FASTSAE_KERNELS)"
        )
    return choice


_choice = _checked(os.environ.get("FASTSAE_KERNELS", "auto"))


@contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Run the operations inside the block on ``choice``; backward passes inside it included."""
    # A plain global, not a context variable: autograd runs CUDA backwards on threads of its own.
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before


def implementation(tensor: Tensor) -> Implementation:
    """Which code runs on ``tensor``.

    float64 always runs on torch: the kernels compute in float32. Raises RuntimeError if Triton was
    asked for where it cannot run.
    """
    can = HAS_TRITON and tensor.is_cuda != INTERPRETED and tensor.dtype != torch.float64
    if _choice == "triton" and not can:
        raise RuntimeError(
            f"Triton was asked for but cannot run on a {tensor.dtype} tensor on {tensor.device}: "
            "it needs an installed triton >= 3.4 and a CUDA tensor (or TRITON_INTERPRET=1 and a CPU "
            "tensor), and no float64; use 'auto' or 'torch'"
        )
    # The interpreter is for tests, which ask for it by name.
    on_triton = _choice == "triton" or (_choice == "auto" and can and not INTERPRETED)
    picked = "triton" if on_triton else "torch"
    _log_once(picked, tensor.device.type)
    return picked


@functools.cache
def _log_once(picked: Implementation, device: str) -> None:
    reason = " (no triton >= 3.4 is installed)" if device == "cuda" and not HAS_TRITON else ""
    logger.info("kernels on %s tensors: %s%s", device, picked, reason)


def register(
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    mutates_args: tuple[str, ...] = (),
) -> Callable[[Callable], Callable]:
    """Make a function the operation ``fastsae::<its name>`` of torch's library.

    ``fake`` gives the outputs' shapes and dtypes from the inputs'; ``setup_context`` and ``backward``
    are those of ``torch.library.register_autograd``. The function itself asks ``implementation``.

    Only ``custom_op`` is used: it passes ``opcheck``, ``torch.compile(fullgraph=True)`` and CUDA graph
    capture alike, on every device and under the interpreter, where ``triton_op`` cannot be traced.
    What it gives up, a compiler that sees into the launches, has nothing to fuse here.
    """

    def decorate(function: Callable) -> Callable:
        op = _Operation(_on_its_device(function), mutates_args)
        op.register_fake(fake)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
        return op

    return decorate


class _Operation(CustomOpDef):
    """What ``torch.library.custom_op`` makes, but called as the plain function where nobody looks at operations:
    torch's library takes the host longer than the launch of a kernel."""

    def __init__(self, function: Callable, mutates_args: tuple[str, ...]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        super().__init__("fastsae", function.__name__.lstrip("_"), schema, function)
        self.register_kernel(None)(function)
        names = [*inspect.signature(function).parameters]
        self._function, self._written = function, [names.index(name) for name in mutates_args]

    def __call__(self, *args):
        if torch.compiler.is_compiling() or _watched(args):
            return super().__call__(*args)
        result = self._function(*args)
        for i in self._written:
            if args[i] is not None:
                increment_version(args[i])
        return result


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether anything traces or differentiates what is done to ``args``, or asks for shapes alone, and so must
    see the operation."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    differentiates = torch.is_grad_enabled()
    for arg in args:
        for each in arg if isinstance(arg, list) else (arg,):
            if type(each) in (Tensor, Parameter) and not each.is_meta:
                if differentiates and each.requires_grad:
                    return True
            elif isinstance(each, Tensor):
                return True
    return False


def _on_its_device(function: Callable) -> Callable:
    """``function`` with the device of its first tensor as the current one, where Triton launches."""

    @functools.wraps(function)
    def guarded(first, *rest, **options):
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *rest, **options)

    return guarded


def save_inputs(ctx, inputs, output) -> None:
    """A ``setup_context`` for a backward that needs the inputs, all tensors, and nothing else."""
    ctx.save_for_backward(*inputs)
