"""Compile every kernel for every GPU architecture, on a machine without one, and check the result.

    python kernels/aot/compile.py                 the full matrix
    python kernels/aot/compile.py --slice         a representative part, in minutes on two cores
    python kernels/aot/compile.py --write         the full matrix, and its table into kernels/README.md
    python kernels/aot/compile.py --only encode   the cases whose label contains a word

Checked of each: it compiles; no register spills to local memory; its shared memory fits the device
(the compiler does not check that); it loads 128 bits at a time where a launch would; the matrix
instructions are the architecture's own. Exits with 1 if anything fails. Must run without
TRITON_INTERPRET, which turns kernels into Python.
"""

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KERNELS))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import fastsae_kernels  # noqa: E402
from fastsae_kernels.aot import Case  # noqa: E402

# Bytes of shared memory one program can have.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
README = KERNELS / "README.md"
BEGIN, END = "<!-- ahead-of-time table: begin -->", "<!-- ahead-of-time table: end -->"


@dataclass(frozen=True)
class Result:
    label: str
    capability: int
    num_warps: int
    registers: int
    spills: int  # bytes of local memory per thread
    shared: int  # bytes per program
    faults: tuple[str, ...]


def all_cases() -> list[Case]:
    """The ``aot_cases()`` of every module of the package that has any."""
    cases = []
    for module in sorted(m.name for m in pkgutil.iter_modules(fastsae_kernels.__path__)):
        listed = getattr(importlib.import_module(f"fastsae_kernels.{module}"), "aot_cases", None)
        cases += listed() if listed else []
    duplicates = {c.label for c in cases if sum(c.label == d.label for d in cases) > 1}
    if duplicates:
        raise SystemExit(f"labels used twice: {sorted(duplicates)}")
    return cases


def capabilities() -> list[int]:
    """The architectures of the table that the installed Triton's assembler knows."""
    known = [80, 86, 89, 90]
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return known + ([100, 120] if version >= (3, 3) else [])


def compile_case(case: Case, capability: int):
    divisible = [name for name, kind in case.signature.items() if kind.startswith("*")]
    divisible += [name for name in case.divisible if name in case.signature]
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={n: "constexpr" if n in case.constexprs else case.signature[n] for n in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options |= {"maxnreg": case.maxnreg} if case.maxnreg else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as the assembler left them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = str(cuobjdump) if cuobjdump.exists() else "cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def check(index: int, capability: int) -> Result:
    """Compile one case, by its place in the list: a kernel does not travel between processes."""
    case = all_cases()[index]
    faults: list[str] = []
    try:
        compiled = compile_case(case, capability)
    except Exception as error:
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return Result(case.label, capability, case.num_warps, 0, 0, 0, (reason,))
    registers, spills = resource_usage(compiled.asm["cubin"])
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    if spills:
        faults.append(f"spills {spills} bytes")
    if shared > SHARED_MEMORY[capability]:
        faults.append(f"shared memory {shared} > {SHARED_MEMORY[capability]}")
    wide = (
        r"ld\.global\S*\.v4\.[bf]32",
        r"ld\.global\S*\.v2\.[bf]64",
        r"cp\.async\S*[^;]*, 0x10",
        "cp.async.bulk",
    )
    if case.vector_loads and not any(re.search(pattern, ptx) for pattern in wide):
        faults.append("no 128-bit load")
    matrix = {90: "wgmma", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    if case.matrix and matrix not in ptx:
        faults.append(f"no {matrix} instruction")
    return Result(case.label, capability, case.num_warps, registers, spills, shared, tuple(faults))


def table(results: list[Result]) -> str:
    """One row a case: registers per thread / shared memory in KiB, by architecture."""
    columns = sorted({r.capability for r in results})
    by_label: dict[str, dict[int, Result]] = {}
    for result in results:
        by_label.setdefault(result.label, {})[result.capability] = result
    head = ["kernel", "warps", *(f"sm_{c}" for c in columns)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for label, row in by_label.items():
        cells = []
        for capability in columns:
            r = row.get(capability)
            spilled = f", {r.spills} B spilled" if r and r.spills else ""
            cells.append(f"{r.registers} / {r.shared / 1024:.1f}{spilled}" if r else "")
        lines.append(" | ".join([label, str(next(iter(row.values())).num_warps), *cells]))
    lines = [f"| {line} |" for line in lines]
    note = (
        f"Registers per thread / shared memory in KiB, as compiled by Triton {triton.__version__}. "
        f"{len(results)} compilations, {sum(r.spills > 0 for r in results)} with spills."
    )
    return f"{note}\n\n" + "\n".join(lines)


def write(text: str) -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", action="store_true", help="the representative cases alone")
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.write and (options.slice or options.only):
        parser.error("--write needs the full matrix: leave out --slice and --only")
    if fastsae_kernels.dispatch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: unset it, nothing can be compiled under it")

    todo = [
        (index, capability)
        for index, case in enumerate(all_cases())
        for capability in ([80, 90] if options.slice else capabilities())
        if capability in case.capabilities
        and options.only in case.label
        and (case.representative or not options.slice)
    ]
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for result in pool.map(check, *zip(*todo, strict=True)):
            results.append(result)
            print(
                f"sm_{result.capability:<4} {result.label:60} {result.registers:4} registers "
                f"{result.shared:7} B shared  {'; '.join(result.faults) or 'ok'}",
                flush=True,
            )
    if options.write:
        write(table(results))
    failed = [r for r in results if r.faults]
    print(f"{len(results)} compiled, {len(failed)} with faults")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
