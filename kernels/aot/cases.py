"""Every kernel in every configuration it is launched with, as ``compile.py`` takes it."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsae_kernels import aux_k, decoder_norm, encoder, segments, sparse_decoder, transpose
from fastsae_kernels.selection import triton_impl as selection
from fastsae_kernels.update import triton_impl as update

WIDTHS = (768, 1024, 1536, 2048, 2304, 4096)
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    ``signature`` maps every argument that is not a constexpr to its type in Triton's notation:
    ``"*fp32"`` a pointer, ``"i32"`` or ``"fp32"`` a scalar. Pointers and the integers named in
    ``divisible`` are taken to be multiples of 16, as a launch with real tensors would find them.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    capabilities: range = range(80, 1000)
    vector_loads: bool = True  # 128-bit global loads (or bulk tensor copies) are expected
    matrix: bool = False  # matrix instructions are expected: wgmma on sm_90, mma elsewhere
    representative: bool = False  # part of the slice that the tests compile


def pointers(kind: str, names: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{kind}" for name in names.split()}


# What an argument of a name is, unless a case says otherwise.
DIVISIBLE = ("B", "D", "F", "G", "K", "capacity", "columns", "groups", "list_capacity", "segments")
TYPES = (
    pointers("i1", "nonfinite")
    | pointers("i64", "step tokens")
    | pointers("i32", "counts histograms indices latent_counts list list_offsets listed offsets")
    | pointers("i32", "order owners positions row_offsets rows starts state")
    | pointers("fp32", "b_dec bias block_db_dec chunk_dW_dec chunk_dW_enc db_enc dz gradient lr m")
    | pointers("fp32", "max scalars sums threshold v values z")
    | dict.fromkeys((*DIVISIBLE, "k", "length", "rank", "search_steps"), "i32")
    | dict.fromkeys(("dY_scale", "eps"), "fp32")
)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def case(label: str, kernel, constants: dict[str, Any], types: dict[str, str] = {}, **more) -> Case:  # noqa: B006
    """``constants`` are those of the launch; an argument that is neither typed nor given is None."""
    types = TYPES | types
    signature = {n: types[n] for n in kernel.arg_names if n in types and n not in constants}
    constexprs = {n: constants.get(n) for n in kernel.arg_names if n not in signature}
    options: dict[str, Any] = {"divisible": DIVISIBLE}
    options |= {n: constants[n] for n in OPTIONS if n in constants}
    return Case(label, kernel, signature, constexprs, **options | more)


def all_cases() -> list[Case]:
    """Every case; no two have one label."""
    makers = (aux_k_cases, batch_topk_cases, csr_to_csc_cases, decoder_norm_cases, encoder_cases)
    makers += (fused_update_cases, group_max_cases, segment_cases, decoder_cases, topk_cases)
    cases = [case for make in makers for case in make()]
    duplicates = {c.label for c in cases if sum(c.label == d.label for d in cases) > 1}
    if duplicates:
        raise SystemExit(f"labels used twice: {sorted(duplicates)}")
    return cases


def aux_k_cases() -> Iterator[Case]:
    constants = {"BLOCK": aux_k.BLOCK_COLUMNS, "num_warps": aux_k.WARPS}
    yield case("aux_k keep largest", aux_k.keep_largest_kernel, constants, representative=True)


def batch_topk_cases() -> Iterator[Case]:
    passes, keys = {"PASSES": selection.DIGIT_PASSES}, {"BLOCK": selection.BLOCK_KEYS}
    kernel = selection.count_groups_kernel
    yield case("batch_topk count groups", kernel, keys | passes, representative=True)
    yield case("batch_topk list groups", selection.list_groups_kernel, keys)
    for digit in range(selection.DIGIT_PASSES):
        label, kernel = "batch_topk count group digits", selection.count_group_digits_kernel
        constants = keys | {"PASS": digit}
        yield case(f"{label}, pass {digit}", kernel, constants, representative=digit == 1)
    blocks = {"GROUP": selection.GROUP, "BLOCK": selection.BLOCK_GROUPS}
    emit = blocks | {"BLOCK": selection.BLOCK_EMIT, "num_warps": selection.ROW_WARPS}
    for dtype in DTYPES:
        types = pointers(dtype, "pre values")
        for digit in range(selection.DIGIT_PASSES):
            label, kernel = "batch_topk count entry digits", selection.count_entry_digits_kernel
            constants, chosen = blocks | {"PASS": digit}, digit == 3 and dtype == "fp32"
            label = f"{label}, pass {digit}, {dtype}"
            yield case(label, kernel, constants, types, representative=chosen)
        kernel = selection.count_entries_kernel
        yield case(f"batch_topk count entries {dtype}", kernel, blocks | passes, types)
        # A thread that emits holds 4 entries.
        more = {"vector_loads": dtype == "fp32", "representative": dtype == "bf16"}
        yield case(f"batch_topk emit {dtype}", selection.batch_emit_kernel, emit, types, **more)


def csr_to_csc_cases() -> Iterator[Case]:
    block, types = {"BLOCK": transpose.BLOCK_SORT}, pointers("i32", "out")
    for digit in (0, 1):
        shift, step = {"SHIFT": 8 * digit, **block}, transpose.STEP_SORT
        scatter = shift | {"LAST": digit == 1, "STEP": step, "num_warps": transpose.SORT_WARPS}
        for part, kernel, constants, chosen in (
            ("count", transpose.count_latents_kernel, shift, False),
            ("scatter", transpose.scatter_latents_kernel, scatter, digit == 1),
        ):
            label, more = f"csr_to_csc {part}, digit {digit}", {"representative": chosen}
            yield case(label, kernel, constants, types, vector_loads=False, **more)


def decoder_norm_cases() -> Iterator[Case]:
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        for name in ("project_gradient", "normalize_rows"):
            kernel = getattr(decoder_norm, f"{name}_kernel")
            constants, types = decoder_norm.row_blocks(width), pointers(dtype, "W_dec gradient out")
            chosen = width == 1536 and dtype == "fp32"
            label = f"{name}, D={width} {dtype}"
            yield case(label, kernel, constants, types, representative=chosen)


def encoder_cases() -> Iterator[Case]:
    sizes = (("bf16", 2), ("fp16", 2), ("fp32", 4))
    for (dtype, size), even in itertools.product(sizes, (True, False)):
        constants = encoder.CONSTANTS | encoder.POINTERS[size]._asdict() | {"EVEN_D": even}
        types, chosen = pointers(dtype, "x weight"), dtype == "bf16" and even
        label = f"encode pointers {dtype}{'' if even else ', ragged D'}"
        kernel = encoder.encode_pointers_kernel
        types |= pointers("fp32", "pre")
        yield case(label, kernel, constants, types, matrix=True, representative=chosen)
    for dtype, size in sizes:
        tile = encoder.DESCRIPTORS[size]
        operands = {"x": tile.BLOCK_B, "weight": tile.BLOCK_F}
        types = {
            f"{name}_descriptor": f"tensordesc<{dtype}[{rows},{tile.BLOCK_D}]>"
            for name, rows in operands.items()
        } | pointers("fp32", "pre")
        constants, kernel = encoder.CONSTANTS | tile._asdict(), encoder.encode_descriptors_kernel
        more = {"matrix": True, "capabilities": encoder.DESCRIPTOR_CAPABILITIES}
        label, chosen = f"encode descriptors {dtype}", dtype == "bf16"
        yield case(label, kernel, constants, types, representative=chosen, **more)


def fused_update_cases() -> Iterator[Case]:
    """Every kernel at every width, over the state's storage forms, with and without options."""
    options = pointers("fp32", "clip aux_dW_dec aux_dW_enc aux_db_enc") | pointers(
        "i32", "aux_slots"
    )
    constants = {"BETA1": 0.9, "BETA2": 0.999, "CHUNK": segments.CHUNK, "BLOCK_T": update.BLOCK_T}
    constants |= {"LOG_BETA1": math.log(0.9), "LOG_BETA2": math.log(0.999)}
    constants |= {"LATENTS_PER_PROGRAM": update.LATENTS_PER_PROGRAM}
    small = {"vector_loads": False, "representative": True}
    yield case("fused_update scalars", update.step_scalars_kernel, constants, options, **small)
    biases = constants | {"BLOCK": update.BLOCK_BIAS}
    yield case("fused_update biases", update.bias_update_kernel, biases, options, **small)
    forms = ("fp32", "bf16 copy", "bf16 split", "fp32 8-bit", "bf16 split 8-bit")
    for width, form in itertools.product(WIDTHS, forms):
        constants |= {"maxnreg": update.MAX_REGISTERS}
        quantized, rows = "8-bit" in form, constants | decoder_norm.row_blocks(width)
        here = pointers("bf16" if "bf16" in form else "fp32", "x dY")
        for name in ("W_enc", "W_dec"):
            here |= pointers("fp32", f"{name} {name}_m {name}_v")
            if "split" in form:
                here |= pointers("i16", f"{name} {name}_remainder")
            if "copy" in form:
                here |= pointers("bf16", f"{name}_copy")
            if quantized:
                here |= pointers("i8", f"{name}_m") | pointers("u8", f"{name}_v")
                here |= pointers("fp32", f"{name}_m_scale {name}_v_scale")
        chosen = {"representative": width == 1536 and "split" in form}
        for side, kernel, shape in (
            ("decoder", update.decoder_kernel, rows),
            ("encoder", update.encoder_kernel, constants | update.encoder_blocks(width, quantized)),
        ):
            label = f"fused_update {side}, aux-k and clipping, D={width} {form}"
            yield case(label, kernel, shape, here | options, **chosen)
            if not quantized:
                yield case(f"fused_update {side}, D={width} {form}", kernel, shape, here, **chosen)
                label, norm = f"gradient_norm {side}, D={width} {form}", pointers("fp32", "squares")
                yield case(label, kernel, shape, here | options | norm, **chosen)
        if not quantized:
            label = f"fused_update decoder chunks, D={width} {form}"
            yield case(label, update.decoder_chunks_kernel, rows, here, **chosen)


def group_max_cases() -> Iterator[Case]:
    constants = {"GROUP": selection.GROUP, "BLOCK": selection.BLOCK_GROUPS}
    for dtype in DTYPES:
        kernel, types = selection.group_max_kernel, pointers(dtype, "pre")
        chosen = dtype == "fp32"
        yield case(f"group_max {dtype}", kernel, constants, types, representative=chosen)


def segment_cases() -> Iterator[Case]:
    constants, kernel = (
        {"CHUNK": segments.CHUNK, "BLOCK": segments.SCAN_BLOCK},
        segments.long_segments_kernel,
    )
    # The ends are the beginnings, one further: no 128-bit loads.
    yield case("long segments", kernel, constants, vector_loads=False, representative=True)


def decoder_cases() -> Iterator[Case]:
    kernels = {
        "chunks": sparse_decoder.chunk_sums_kernel,
        "rows": sparse_decoder.weighted_row_sums_kernel,
        "loss": sparse_decoder.decode_loss_kernel,
        "value gradients": sparse_decoder.value_gradients_kernel,
    }
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        types = pointers(dtype, "table W_dec x dx_hat out residual values bias")
        types |= pointers("fp32", "squares")
        chosen = width == 1536 and dtype == "bf16"
        for part, kernel in kernels.items():
            label, constants = (
                f"sparse_decode {part}, D={width} {dtype}",
                sparse_decoder.tile_blocks(width),
            )
            yield case(label, kernel, constants, types, representative=chosen)


def topk_cases() -> Iterator[Case]:
    shared = {"GROUP": selection.GROUP, "num_warps": selection.ROW_WARPS}
    select = shared | {"PASSES": selection.DIGIT_PASSES, "BLOCK_KEYS": selection.BLOCK_KEYS}
    for part, kernel, constants in (
        ("select", selection.row_select_kernel, select | {"BLOCK": selection.BLOCK_GROUPS}),
        ("emit", selection.row_emit_kernel, shared | {"BLOCK": selection.BLOCK_EMIT}),
    ):
        for dtype in DTYPES:
            # A thread that emits holds 4 entries.
            more = {
                "vector_loads": part == "select" or dtype == "fp32",
                "divisible": (*DIVISIBLE, "k"),
            }
            chosen, types = part == "select" and dtype == "fp32", pointers(dtype, "pre values")
            yield case(
                f"topk {part} {dtype}", kernel, constants, types, representative=chosen, **more
            )
