"""Compile every kernel for every GPU architecture, on a machine without one, and check the result.

    python kernels/aot/compile.py                 the full matrix
    python kernels/aot/compile.py --slice         a representative part, a tenth of it
    python kernels/aot/compile.py --write         the full matrix, into registers.csv and kernels/README.md
    python kernels/aot/compile.py --only encode   the cases whose label contains a word
    python kernels/aot/compile.py --unlikely      the representative part with integers that are 1, or no
                                                  multiples of 16; there registers may spill

Checked of each: it compiles; no register spills to local memory, or few where a launch caps the registers;
its shared memory fits the device (the compiler does not check that); it loads 128 bits at a time where a launch would; the matrix
instructions are the architecture's own. Exits with 1 if anything fails. Must run without
TRITON_INTERPRET, which turns kernels into Python.
"""

import argparse
import csv
import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import triton  # noqa: E402
from cases import Case, all_cases, unlikely  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastsae_kernels.dispatch import INTERPRETED  # noqa: E402

# Bytes of shared memory one program can have, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SPILLED_UNDER_A_CAP = 128
"""Bytes of a thread. On an H200 the decoder's rows took 274 µs under a cap that spilled 96, and 304 under none: more
programs run at once. More than 96 was not measured, nor another GPU."""
TABLE, README = HERE / "registers.csv", HERE.parent / "README.md"
BEGIN, END = "<!-- ahead-of-time table: begin -->", "<!-- ahead-of-time table: end -->"
# The rows of the table that kernels/README.md shows.
SHOWN = (
    "group max fp32",
    "gather entries fp32",
    "batch emit fp32",
    "row select fp32",
    "place entries",
    "encode pointers bf16",
    "encode descriptors bf16",
    "decode loss, D=1536 bf16",
    "decoder, aux-k and clipping, D=1536 bf16 split",
    "encoder, aux-k and clipping, D=1536 bf16 split",
)


@dataclass(frozen=True)
class Result:
    case: str
    warps: int
    architecture: str
    registers: int = 0  # per thread
    spilled: int = 0  # bytes of local memory per thread
    shared: int = 0  # bytes per program
    faults: tuple[str, ...] = ()


def compile_case(case: Case, capability: int):
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options |= {"maxnreg": case.maxnreg} if case.maxnreg else {}
    options |= {"enable_fp_fusion": case.enable_fp_fusion}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as the assembler left them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(cuobjdump) if cuobjdump.exists() else "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def check(case: Case, capability: int) -> Result:
    faults, place = [], (case.label, case.num_warps, f"sm_{capability}")
    try:
        compiled = compile_case(case, capability)
    except Exception as error:
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return Result(*place, faults=(reason,))
    registers, spilled = resource_usage(compiled.asm["cubin"])
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    if spilled > (SPILLED_UNDER_A_CAP if case.maxnreg else 0):
        faults.append(f"spills {spilled} bytes")
    if shared > SHARED_MEMORY[capability]:
        faults.append(f"shared memory {shared} > {SHARED_MEMORY[capability]}")
    wide = r"ld\.global\S*\.(v4\.[bf]32|v2\.[bf]64)|cp\.async\S*[^;]*, 0x10|cp\.async\.bulk"
    if case.vector_loads and not re.search(wide, ptx):
        faults.append("no 128-bit load")
    matrix = {90: "wgmma", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    if case.matrix and matrix not in ptx:
        faults.append(f"no {matrix} instruction")
    return Result(*place, registers, spilled, shared, tuple(faults))


@functools.cache
def unlikely_cases() -> tuple[Case, ...]:
    chosen = (case for case in all_cases() if case.representative)
    return tuple(other for case in chosen for other in unlikely(case))


def check_index(index: int, capability: int, odd: bool) -> Result:
    """:func:`check` of a case by its place in the list: a kernel does not travel between processes."""
    if not odd:
        return check(all_cases()[index], capability)
    result = check(unlikely_cases()[index], capability)
    return replace(result, faults=tuple(f for f in result.faults if "spills" not in f))


def write(results: list[Result]) -> None:
    """All rows into registers.csv, those of ``SHOWN`` into kernels/README.md."""
    columns = ("case", "warps", "architecture", "registers", "spilled", "shared")
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows([getattr(result, column) for column in columns] for result in results)
    architectures = list(dict.fromkeys(result.architecture for result in results))
    lines = [["kernel", "warps", *architectures], ["---"] * (2 + len(architectures))]
    for label in SHOWN:
        found = {r.architecture: r for r in results if r.case == label}
        here = map(found.get, architectures)
        cells = [f"{r.registers} / {r.shared / 1024:.1f}" if r else "" for r in here]
        lines.append([label, str(next(iter(found.values())).warps), *cells])
    text = (
        f"Registers per thread / shared memory in KiB, as compiled by Triton {triton.__version__}. "
        f"{len(results)} compilations, {sum(r.spilled > 0 for r in results)} with spills.\n\n"
    )
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every GPU architecture.")
    parser.add_argument("--slice", action="store_true", help="the representative cases alone")
    parser.add_argument("--unlikely", action="store_true", help="integers 1, or not divisible")
    parser.add_argument("--write", action="store_true", help="write registers.csv and the README")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: every core")
    options = parser.parse_args()
    if options.write and (options.slice or options.only or options.unlikely):
        parser.error("--write needs the full matrix: leave out --slice, --only and --unlikely")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: unset it, nothing can be compiled under it")

    capabilities = [90] if options.unlikely else [80, 90] if options.slice else SHARED_MEMORY
    todo = [
        (index, capability, options.unlikely)
        for index, case in enumerate(unlikely_cases() if options.unlikely else all_cases())
        for capability in capabilities
        if capability in case.capabilities
        and options.only in case.label
        and (case.representative or not options.slice)
    ]
    if not todo:
        parser.error(f"--only {options.only}: no label contains it")
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for result in pool.map(check_index, *zip(*todo, strict=True)):
            results.append(result)
            print(
                f"[{len(results)}/{len(todo)}] {result.architecture:6} {result.case:54} "
                f"{result.registers:4} registers {result.shared:7} B shared  "
                f"{'; '.join(result.faults) or 'ok'}",
                flush=True,
            )
    if options.write:
        write(results)
    failed = [r for r in results if r.faults]
    print(f"{len(results)} compiled, {len(failed)} with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
