"""Every kernel in every configuration it is launched with: operations run, and their launches are kept.

What is launched depends on shapes alone, not on what other kernels computed. So here they compute
nothing, and small tensors on a CPU stand for those of a GPU.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import fastsae_kernels as kernels
from fastsae_kernels import dispatch, encoder, sparse_decoder, step

# What several widths share is listed under the first of them.
WIDTHS = (1536, 768, 1024, 2048, 2304, 4096)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTEGERS = {"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32}
INTEGERS |= {"i64": torch.int64, "i1": torch.bool}
TYPES = {dtype: name for name, dtype in (FLOATS | INTEGERS).items()}
# The forms in which a state is stored, with the dtype of the activations beside it.
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16 split": (torch.bfloat16, {"split": True}),
    "fp32 8-bit": (torch.float32, {"quantized_moments": True}),
    "bf16 split 8-bit": (torch.bfloat16, {"split": True, "quantized_moments": True}),
}
# Multiples of 16 like the sizes of a training run, so that Triton specialises to the same.
TOKENS, LATENTS, ACTIVE = 32, 512, 16
LEVELS = torch.tensor([16, 64, LATENTS], dtype=torch.int32)  # of Matryoshka, at the first width
# Kernels that need not load 128 bits at a time: they scatter, or a thread has too little to do.
NARROW = {"count entries", "mark entries", "step scalars"}
NARROW_IN_16_BITS = {"batch emit", "row emit"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    ``signature`` maps every argument that is not a constexpr to its type in Triton's notation:
    ``"*fp32"`` a pointer, ``"i32"`` or ``"fp32"`` a scalar. ``divisible`` are multiples of 16.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    capabilities: range = range(80, 1000)
    vector_loads: bool = True  # 128-bit global loads (or bulk tensor copies) are expected
    matrix: bool = False  # matrix instructions are expected: wgmma on sm_90, mma elsewhere
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    enable_fp_fusion: bool = True
    representative: bool = False  # part of the slice that the tests compile


def _case(variant: str, kernel, arguments: dict[str, Any]) -> Case:
    """The case of a launch, its arguments specialised as Triton does it."""
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            constexprs[name] = value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible += [name] * (value.data_ptr() % 16 == 0)
        elif isinstance(value, int | float):
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            divisible += [name] * (isinstance(value, int) and value % 16 == 0)
        else:
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    name = kernel.__name__.removesuffix("_kernel").replace("_", " ")
    narrow = NARROW if signature.get("pre_ptr") == "*fp32" else NARROW | NARROW_IN_16_BITS
    by_descriptors = name == "encode descriptors"
    return Case(
        name + variant, kernel, signature, constexprs, tuple(divisible),
        capabilities=encoder.DESCRIPTOR_CAPABILITIES if by_descriptors else range(80, 1000),
        vector_loads=name not in narrow,
        matrix=name.startswith("encode "),
        **arguments,  # the options of the launch
    )  # fmt: skip


class _Cases(dict[str, Case]):
    """Cases by all that a compilation depends on."""

    @contextmanager
    def record(self, variant: str, representative: bool = False) -> Iterator[None]:
        """Add what is launched in the block; of a kernel's launches the last is ``representative``."""
        launches: list[Case] = []

        def run(kernel, *, grid, warmup, **arguments):
            launches.append(_case(variant, kernel, arguments))

        with mock.patch.object(triton.JITFunction, "run", run):
            yield
        for case in launches:
            alike = [other for other in launches if other.label == case.label]
            count = f", launch {alike.index(case) + 1}" if case != alike[0] else ""
            key = repr(replace(case, label=""))
            known = self.get(key) or replace(case, label=case.label + count)
            chosen = known.representative or (representative and case == alike[-1])
            self[key] = replace(known, representative=chosen)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case once; no two have one label."""
    cases = _Cases()
    with mock.patch.object(dispatch, "INTERPRETED", True), dispatch.use("triton"):
        _selection(cases)
        _encoder(cases)
        for width in WIDTHS:
            _decoder(cases, width)
            _step(cases, width)
            _update(cases, width)
    return tuple(cases.values())


def _csr(dtype: torch.dtype) -> kernels.CSR:
    values = torch.zeros(TOKENS * ACTIVE, dtype=dtype)
    return kernels.CSR(values, values.int(), torch.zeros(TOKENS + 1, dtype=torch.int32))


def _selection(cases: _Cases) -> None:
    for name, dtype in FLOATS.items():
        pre = torch.zeros(TOKENS, LATENTS, dtype=dtype)
        with cases.record(f" {name}", name == "fp32"):
            kernels.batch_topk(pre, TOKENS * ACTIVE)
            kernels.topk(pre, ACTIVE)
        with cases.record(f" {name}, peaks", name == "fp32"):
            kernels.batch_topk(pre, TOKENS * ACTIVE, quota=1.0)
            kernels.batch_topk(pre, TOKENS * ACTIVE, quota=0.5)
    with cases.record("", True):
        kernels.csr_to_csc(_csr(torch.float32), LATENTS)


def _encoder(cases: _Cases) -> None:
    for (name, dtype), descriptors, width in itertools.product(
        FLOATS.items(), (True, False), (WIDTHS[0], WIDTHS[0] + 16)
    ):
        x, W = (torch.zeros(rows, width, dtype=dtype) for rows in (TOKENS, LATENTS))
        ragged = "" if width in WIDTHS else ", ragged D"
        serve = mock.patch.object(encoder, "_descriptors_serve", lambda *_, yes=descriptors: yes)
        for peaks in ("", ", peaks"):
            chosen = name == "bf16" and not ragged
            with serve, cases.record(f" {name}{ragged}{peaks}", chosen):
                encoder._encode_triton(x, W, torch.zeros(LATENTS), bool(peaks))


def _decoder(cases: _Cases, width: int) -> None:
    for name, dtype in FLOATS.items():
        csr = _csr(dtype)
        x, W = (torch.zeros(rows, width, dtype=dtype) for rows in (TOKENS, LATENTS))
        since = torch.zeros(LATENTS, dtype=torch.int64)
        with cases.record(f", D={width} {name}", width == WIDTHS[0] and name == "bf16"):
            kernels.sparse_decode(csr, W, W[0])
            kernels.sparse_decode_loss(csr, W, W[0], x)
            sparse_decoder._value_gradients(x, *csr, W)
            kernels.aux_k_gradients(
                x.float(), x.float(), W, since.float(), W, W[0].float(), since,
                dead_after=10, max_dead=LATENTS, k_aux=ACTIVE,
            )  # fmt: skip
            kernels.project_gradient(W, W)
            kernels.normalize_rows(W)
        if width == WIDTHS[0]:
            with cases.record(f", nested, D={width} {name}"):
                kernels.nested_decode_loss(csr, W, W[0], x, LEVELS)


def _step(cases: _Cases, width: int) -> None:
    one, count = torch.ones(()), torch.ones((), dtype=torch.int64)
    since = torch.zeros(LATENTS, dtype=torch.int64)
    for name, dtype in FLOATS.items():
        x, residual = torch.zeros(TOKENS, width, dtype=dtype), torch.zeros(1, TOKENS, width)
        chosen = width == WIDTHS[0] and name == "bf16"
        with cases.record(f", D={width} {name}", chosen):
            for scale in (None, one):
                step.centred_input(x, scale, residual[0, 0], dtype)
            step.output_gradient(residual, one, dtype)
        if chosen:
            with cases.record("", True):
                step.step_objective(residual[0, :, 0].contiguous(), one, 1.0, "log")
                step.track_selection_(one, count, since, one, since.int(), TOKENS, 0.01)
            with cases.record(f", nested, D={width} {name}"):
                step.output_gradient(residual.expand(3, -1, -1), one, dtype)


def _update(cases: _Cases, width: int) -> None:
    """Over the forms of the state, with and without options; 8-bit moments with them."""
    csr, one = _csr(torch.float32), torch.ones(())
    csc = kernels.CSC(csr.indices, csr.indices, torch.zeros(LATENTS + 1, dtype=torch.int32))
    W, rows = torch.zeros(LATENTS, width), torch.zeros(ACTIVE, width)
    aux = kernels.AuxGradients(rows, rows[:, 0].clone(), rows, torch.zeros(LATENTS).int())
    biases = [kernels.BiasState.start(torch.zeros(n)) for n in (LATENTS, width)]
    for form, (dtype, options) in FORMS.items():
        x = torch.zeros(TOKENS, width, dtype=dtype)
        W_enc, W_dec = (kernels.MatrixState.start(W.clone(), **options) for _ in "ed")
        parameters = (W_enc, biases[0], W_dec, biases[1])
        chosen = width == WIDTHS[0] and "split" in form
        with_options = {"": {}, ", aux-k and clipping": {"aux_gradients": aux, "clip": one}}
        for label, more in with_options.items():
            if more or "8-bit" not in form:
                with cases.record(f"{label}, D={width} {form}", chosen):
                    kernels.fused_update_(*parameters, csr, csc, x, x, one, one.long(), **more)
        if width == WIDTHS[0]:
            dY = x.expand(len(LEVELS), -1, -1).contiguous()
            with cases.record(f", nested, D={width} {form}"):
                kernels.fused_update_(*parameters, csr, csc, x, dY, one, one.long(), levels=LEVELS)
            with cases.record(f", transcoder, D={width} {form}"):
                kernels.fused_update_(*parameters, csr, csc, x, x, one, one.long(), tied=False)
        with cases.record(f", gradient norm, D={width} {form}", chosen):
            kernels.gradient_norm(W_enc, W_dec, biases[1].weight, csr, csc, x, x, aux_gradients=aux)


def unlikely(case: Case) -> Iterator[Case]:
    """The same launch with integers that Triton specialises otherwise: none a multiple of 16; each, and
    all of them, equal to 1, which makes constants of them. What 128-bit loads are for is not there then."""
    integers = [name for name, kind in case.signature.items() if kind == "i32"]
    base = replace(case, vector_loads=False, representative=False)
    yield replace(base, label=f"{case.label}, none divisible", divisible=())
    for ones in [[name] for name in integers] + ([integers] if len(integers) > 1 else []):
        yield replace(
            base,
            label=f"{case.label}, {' = '.join(ones)} = 1",
            signature={name: kind for name, kind in case.signature.items() if name not in ones},
            constexprs={**case.constexprs, **dict.fromkeys(ones, 1)},
            divisible=tuple(name for name in case.divisible if name not in ones),
        )
