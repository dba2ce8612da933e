"""What a training step costs on a GPU, modelled: nothing here is measured.

    python benchmarks/gpu_model.py                          the recipe's step, kernel by kernel
    python benchmarks/gpu_model.py --write --label after    into results/gpu_model.json and docs/emulator.md

One step runs on the stand-in for CUDA of the tests. Of every Triton kernel it launches, programs run in
the emulator, which counts instructions and bytes: all of them where others depend on what they leave,
else a sample. The assembler tells registers. ``ASSUMED`` makes microseconds of these.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / room) for room in ("", "kernels", "kernels/aot", "tests", "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from compile import resource_usage  # noqa: E402
from cuda_stand_in import Device, OnCuda  # noqa: E402
from measure import RECIPE, Shape, activations, git  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import fastsae  # noqa: E402
from emulator import matrix, program  # noqa: E402
from emulator.driver import Emulator, Function, arguments_of  # noqa: E402
from emulator.memory import Memory, Unwatched  # noqa: E402
from fastsae.training.initialize import new_sae  # noqa: E402
from fastsae.training.update import FusedUpdate  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results/gpu_model.json", ROOT / "docs/emulator.md"
MARKERS = "<!-- model: begin -->", "<!-- model: end -->"
LABELS = ("before", "after")

ASSUMED = {
    "copy, bytes/s": {"H100": 3.0e12, "H200": 4.3e12},
    "L2, bytes/s": 7.0e12,
    "products, FLOP/s": 790e12,
    "multiprocessors": 132,
    "clock, Hz": 1.75e9,
    "instructions of a multiprocessor a cycle": 2.6,
    "cycles between instructions of a warp, at least": 5,
    "between kernels of a graph, s": 1.2e-6,
    "tensors stay in L2 up to, bytes": 2**24,
}
"""Ceilings that stand for both GPUs, but for the copy; none was measured with these kernels."""
THREADS, REGISTERS, SHARED, PROGRAMS = 2048, 65536, 233472, 32  # of a multiprocessor
SECTOR = 32  # bytes that memory moves at least
SAMPLED, RUN_IN_FULL = 100_000, 8_000_000  # instructions of a launch's programs: as many, or up to
KERNELS_OF = {"cumsum": 2, "sort": 10}  # of torch: launches of an operation on a vector

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quota": {"latent_quota": 0.4},
    "38 % dead": {},
    "8-bit moments": {"moments": "8bit"},
}
DEAD = {"38 % dead": 0.38}


@dataclass(frozen=True)
class Launch:
    """One kernel of a step."""

    kernel: str
    programs: int = 0
    warps: int = 0
    instructions: float = 0  # of a warp, on average over programs
    longest: float = 0  # of a warp of the program that has most, of those that ran
    registers: int = 0
    spilled: int = 0
    shared: int = 0  # bytes of a program
    hbm: float = 0  # bytes
    l2: float = 0
    flops: float = 0  # of matrix products
    count: int = 1  # launches, where torch needs several

    @property
    def resident(self) -> int:
        """Programs on a multiprocessor at once."""
        if not self.warps:
            return 0
        # Registers are given to a warp 256 at a time; a program takes 1 KiB of shared memory more.
        of_a_warp = -(-self.registers * 32 // 256) * 256
        by = (THREADS // 32 // self.warps, REGISTERS // of_a_warp // self.warps)
        return min(*by, SHARED // (self.shared + 1024), PROGRAMS)

    def seconds(self, gpu: str) -> dict[str, float]:
        """Least time by what bounds it, the gap before the next kernel aside."""
        a: Any = ASSUMED
        sms, clock = a["multiprocessors"], a["clock, Hz"]
        found = {
            "memory": self.hbm / a["copy, bytes/s"][gpu],
            "L2": self.l2 / a["L2, bytes/s"],
            "products": self.flops / a["products, FLOP/s"],
        }
        if self.programs:
            each = clock * a["instructions of a multiprocessor a cycle"]
            issued = self.programs * self.warps * self.instructions
            waves = -(-self.programs // (sms * self.resident))
            alone = a["cycles between instructions of a warp, at least"] / clock
            found["issue"] = issued / (min(sms, self.programs) * each)
            found["latency"] = max(waves * self.instructions, self.longest) * alone
        return found


# --- what a kernel executes and moves ---


class Measured(program.Program):
    """Counts the bytes that its instructions touch, by buffer; sees no races."""

    traffic: Counter[tuple[int, bool]]

    def located(self, addresses, size, line, *, writes):
        for buffer, here, offsets in super().located(addresses, size, line, writes=writes):
            # An instruction of a program asks for a sector once, however many threads want it.
            self.traffic[buffer.base, writes] += SECTOR * len(np.unique(offsets // SECTOR))
            yield buffer, here, offsets

    def note_shared(self, *_: Any, **__: Any) -> None:
        """Nothing is looked for."""


class Blocks(dict[int, matrix.Descriptor]):
    """Descriptors: whoever asks for one copies a block."""

    def __init__(self, descriptors: dict[int, matrix.Descriptor], traffic: Counter) -> None:
        super().__init__(descriptors)
        self._traffic = traffic

    def __getitem__(self, number: int) -> matrix.Descriptor:
        found = super().__getitem__(number)
        size = found.block[0] * found.block[1] * found.tensor.element_size()
        self._traffic[found.tensor.data_ptr(), False] += size
        return found


class Sampler(Emulator):
    """Runs some of a launch's programs, those with a width all but a few; assembles what it compiles."""

    last: Launch | None = None

    def launch(self, function: Function, grid: tuple[int, int, int], values: Any) -> None:
        parameters, tensors, descriptors = arguments_of(function, values)
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        random.Random(0).shuffle(places)
        memory, traffic = Memory(tensors, Unwatched), Counter()
        counts, flops, limit = [], 0, SAMPLED
        with np.errstate(all="ignore"):
            for place in places:
                if sum(counts) > limit and len(counts) >= 4:
                    whole = sum(counts) / len(counts) * len(places)
                    if whole > RUN_IN_FULL or "D" in dict(function.signature):
                        break
                    limit = RUN_IN_FULL * 2
                one = Measured(
                    function.name, function.threads, memory, function.shared_bytes, place, grid,
                    parameters, self.races,
                )  # fmt: skip
                one.traffic, one.descriptors = traffic, Blocks(descriptors, traffic)
                function.run(one)
                counts.append(one.count)
                flops += one.flops
        sizes = {buffer.base: buffer.size for buffer in memory.buffers}
        sizes |= {d.tensor.data_ptr(): d.tensor.nbytes for d in descriptors.values()}
        share = len(places) / len(counts)
        moved = [(share * bytes_, sizes[base]) for (base, _), bytes_ in traffic.items()]
        registers, spilled = resource_usage(function.compiled.asm["cubin"])
        self.last = Launch(
            function.name, len(places), function.threads // 32,
            sum(counts) / len(counts), max(counts), registers, spilled, function.shared_bytes,
            *memory_bytes(moved), flops * share,
        )  # fmt: skip


def memory_bytes(moved: list[tuple[float, int]]) -> tuple[float, float]:
    """Bytes from memory and through L2, of ``(bytes, size of the tensor)`` for each read and written."""
    kept: Any = ASSUMED["tensors stay in L2 up to, bytes"]
    from_memory = sum(min(bytes_, size) for bytes_, size in moved if size > kept)
    return from_memory, sum(bytes_ for bytes_, _ in moved)


# --- what a step launches ---


class Modelled(Device):
    """The stand-in: what is launched on it is emulated and kept."""

    def __init__(self, emulator: Sampler, run: Callable, known: dict[Any, Launch]) -> None:
        super().__init__(index=0, count=1)
        self.found: list[tuple[bool, Launch]] = []  # whether in the graph
        self.in_graph = False
        self._emulator, self._run_kernel, self._known = emulator, run, known
        self._call: Any = None
        self._calls = 0

    def launch(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        super().launch(kernel, grid, arguments)
        self._calls += 1
        key = (self._call, self._calls, kernel.__name__)
        if self._call is None or key not in self._known:
            held = {name: _held(value) for name, value in arguments.items()}
            with _disable_current_modes():
                self._run_kernel(kernel, grid=grid, warmup=False, **held)
            assert self._emulator.last is not None
            self._known[key] = self._emulator.last
        self.found.append((self.in_graph, self._known[key]))

    def _operation(self, func: Any, *rest: Any) -> Any:
        """What is called again with alike arguments launches the same: it is emulated once."""
        self._call, self._calls = (str(func), *map(_alike, tree_leaves(rest))), 0
        try:
            return super()._operation(func, *rest)
        finally:
            self._call = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.log.launches)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "aten" and len(self.log.launches) > before:
            self.found.append((self.in_graph, _of_torch(func, args, kwargs or {}, result)))
        return result


def _held(value: Any) -> Any:
    base = getattr(value, "base", None)
    if isinstance(base, OnCuda) and not isinstance(value, Tensor):  # a tensor descriptor
        value = copy.copy(value)
        value.base = base.held
    return value.held if isinstance(value, OnCuda) else value


def _alike(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return repr(value)


def _of_torch(func: Any, args: Any, kwargs: Any, result: Any) -> Launch:
    """An operation of torch: it reads what it is given and writes what it gives."""
    name = func._schema.name.removeprefix("aten::")
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnCuda)]
    made = [t for t in tree_leaves(result) if isinstance(t, OnCuda)]
    # Those that only write, and those that look up single rows.
    read = given[1:] if name in ("copy_", "fill_", "zero_") else given
    most = max([t.nbytes for t in made], default=0)
    looks_up = name in ("index", "index_select", "gather", "embedding")
    moved = [(min(most, t.nbytes) if looks_up else _bytes(t), _bytes(t)) for t in read]
    moved += [(_bytes(t), _bytes(t)) for t in made]
    flops = 2 * args[0].numel() * made[0].shape[-1] if name in ("mm", "addmm") else 0
    vector = bool(given) and given[0].dim() == 1
    count = KERNELS_OF.get(name, 1) if vector else 1
    return Launch(f"torch {name}", 0, 0, 0, 0, 0, 0, 0, *memory_bytes(moved), flops, count)


def _bytes(t: Tensor) -> int:
    """What is really there of a tensor that may be expanded."""
    there = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return t.element_size() * int(np.prod(there))


def steps(shape: Shape, emulator: Sampler) -> Iterator[tuple[str, list[tuple[bool, Launch]]]]:
    """Each of ``VARIANTS`` by name, with the kernels of a step in order and whether a graph holds them."""
    torch.set_num_threads(1)
    run, known = triton.JITFunction.run, {}
    (x,) = activations(shape, 1, "cpu")
    for name, changes in VARIANTS.items():
        config = fastsae.TrainConfig(
            d_sae=shape.F, k=shape.k, batch_size=shape.B, device="cuda:0", precision="bf16",
            **{"latent_quota": 0.0, "cuda_graph": False, **changes},
        )  # fmt: skip
        device = Modelled(emulator, run, known)
        with device.installed():
            sae = new_sae(config, shape.D, shape.F)
            sae.b_dec.data.copy_(x.mean(0))
            step = FusedUpdate(sae, config)
            dead = torch.arange(shape.F, device=config.device) < int(DEAD.get(name, 0) * shape.F)
            step.mark_dead(dead)
            on_device, batch = step._on_device, x.to(config.device)

            def in_graph(*arguments, device=device, on_device=on_device):
                device.in_graph = True
                result = on_device(*arguments)
                device.in_graph = False
                return result

            step._on_device = in_graph
            device.found.clear()
            step(batch)
        yield name, device.found


# --- tables ---


def rows(found: list[tuple[bool, Launch]]) -> list[dict[str, Any]]:
    """A row a kernel and whether a graph holds it, in order of their first launch; launches added up."""
    together: dict[Any, list[Launch]] = {}
    for in_graph, launch in found:
        together.setdefault((in_graph, launch.kernel), []).append(launch)
    table = []
    for (in_graph, kernel), launches in together.items():
        count = sum(each.count for each in launches)
        programs = sum(each.programs for each in launches)
        total = sum(each.programs * each.instructions for each in launches)
        last, gap = launches[-1], ASSUMED["between kernels of a graph, s"]
        row = {"kernel": kernel, "in graph": in_graph, "launches": count, "programs": programs}
        row |= {"warps": last.warps, "instructions a warp": round(total / max(1, programs))}
        row |= {
            "registers": max(each.registers for each in launches),
            "spilled": max(each.spilled for each in launches),
            "shared": max(each.shared for each in launches),
            "programs a multiprocessor": min(each.resident for each in launches),
            "HBM MB": round(sum(each.hbm for each in launches) / 1e6, 1),
            "L2 MB": round(sum(each.l2 for each in launches) / 1e6, 1),
            "GFLOP": round(sum(each.flops for each in launches) / 1e9, 1),
        }
        for gpu in ASSUMED["copy, bytes/s"]:  # pyright: ignore[reportGeneralTypeIssues]
            spent = [each.seconds(gpu) for each in launches]
            seconds = sum(max(each.values()) for each in spent) + gap * count  # pyright: ignore
            row[f"{gpu} us"] = round(1e6 * seconds, 2)
            longest = max(spent, key=lambda each: max(each.values()))
            row[f"{gpu} bound"] = max(longest, key=lambda name: longest[name])
        table.append(row)
    return table


def total(table: list[dict[str, Any]], column: str, **where: bool) -> float:
    return sum(r[column] for r in table if all(r["in graph"] == w for w in where.values()))


def kernel_table(table: list[dict[str, Any]]) -> list[str]:
    """One step, kernel by kernel: all of torch's in a line."""
    ours = [row for row in table if not row["kernel"].startswith("torch ")]
    rest = [row for row in table if row["kernel"].startswith("torch ")]
    head = (
        "kernel",
        "launches",
        "programs",
        "warps",
        "instructions a warp",
        "registers",
        "CTAs an SM",
    )
    head += ("HBM MB", "L2 MB", "bound", "H100 us", "H200 us")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * 8 + " --- | ---: | ---: |"]
    for r in ours:
        name = r["kernel"] if r["in graph"] else f"{r['kernel']}, outside the graph"
        lines.append(
            f"| {name} | {r['launches']} | {r['programs']:,} | {r['warps']} "
            f"| {r['instructions a warp']:,} | {r['registers']} | {r['programs a multiprocessor']} "
            f"| {r['HBM MB']:,.1f} | {r['L2 MB']:,.1f} | {r['H100 bound']} "
            f"| {r['H100 us']:,.1f} | {r['H200 us']:,.1f} |"
        )
    sums = [
        sum(r[name] for r in rest) for name in ("launches", "HBM MB", "L2 MB", "H100 us", "H200 us")
    ]
    lines.append("| torch | {} | | | | | | {:,.1f} | {:,.1f} | | {:,.1f} | {:,.1f} |".format(*sums))
    return lines


def page(results: dict[str, Any]) -> str:
    """The section of the docs, of all that is in ``results``."""
    labels = [label for label in LABELS if label in results]
    about = [f"{label}: commit {results[label]['commit']}" for label in labels]
    lines = [f"Of {results[labels[-1]]['shape']}; {'; '.join(about)}.", ""]
    columns = [f"{what}, {label}" for what in ("kernels", "H100 us", "H200 us") for label in labels]
    lines += [f"| step, modelled | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name in VARIANTS:
        cells = [
            f"{total(results[label]['steps'][name], column):,.0f}"
            for column in ("launches", "H100 us", "H200 us")
            for label in labels
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for label in labels:
        table = results[label]["steps"]["plain"]
        lines += ["", f"The plain step, {label}:", "", *kernel_table(table)]
    return "\n".join(lines)


def modelled_commit() -> str:
    """The last commit that changed what is modelled; ``-dirty`` behind it where something did since."""
    code = ("fastsae", "kernels/fastsae_kernels")
    last = git("log", "-1", "--format=%h", "--abbrev=7", "--", *code)
    return last + "-dirty" * bool(git("status", "--porcelain", "--", *code))


def _in_a_line(found: re.Match[str]) -> str:
    return " ".join(found[0].split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Shape.parse, default=RECIPE, help="B,D,F,k [the recipe's]")
    parser.add_argument("--label", choices=LABELS, default="after")
    parser.add_argument(
        "--write", action="store_true", help="the results, and the page of the docs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    found, emulator = {}, Sampler("normal")
    emulator.install(assemble=True)
    for name, launches in steps(options.shape, emulator):
        found[name] = rows(launches)
        sums = (total(found[name], column) for column in ("launches", "H100 us", "H200 us"))
        print(
            "{}: {:.0f} kernels, modelled {:.0f} us on an H100, {:.0f} on an H200".format(
                name, *sums
            )
        )
        print("\n".join(kernel_table(found[name])), flush=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    run = {
        "commit": modelled_commit(),
        "versions": versions,
        "shape": str(options.shape),
        "steps": found,
    }
    if options.write:
        before = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
        results = {
            "assumed": ASSUMED,
            **{label: before[label] for label in LABELS if label in before},
        }
        results[options.label] = run
        # A kernel is one line, so that a change of it is.
        text = re.sub(r"\{\s*\"kernel\"[^}]*\}", _in_a_line, json.dumps(results, indent=1))
        options.out.write_text(text + "\n", "utf-8")
        if options.out == RESULTS:
            from report import write_between_markers  # draws, too, which nobody else here wants

            write_between_markers(page(results), PAGE, *MARKERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
