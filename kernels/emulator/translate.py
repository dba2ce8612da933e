"""A kernel's PTX as a Python function of one program.

A basic block becomes a branch of a loop over blocks, an instruction a line. Registers are local variables.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from typing import Any

from . import arithmetic, matrix
from .arithmetic import UNSIGNED, Unknown
from .ptx import Instruction, Kernel

NOTHING = ("cp.async.commit", "cp.async.wait", "wgmma.fence", "wgmma.commit", "wgmma.wait", "fence", "bar.warp")  # fmt: skip
"""What orders things that happen at once here."""
THIRD_IS_WIDE, THIRD_IS_GUARD, LAST_IS_SHORT = ("mad.wide",), ("selp",), ("shl", "shr")


def translate(kernel: Kernel) -> Callable[[Any], None]:
    """The function that runs a :class:`Program`. Raises Unknown for an instruction it does not know."""
    translator = _Translator(kernel)
    source = translator.source()
    names: dict[str, Any] = {
        "merge": arithmetic.merge,
        "widen": arithmetic.widen,
        "matrix": matrix,
        "np": arithmetic.np,
    }
    names |= {f"u{bits}": dtype for bits, dtype in UNSIGNED.items()} | {"u1": arithmetic.np.bool_}
    names |= translator.operations
    file = f"<{kernel.name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
    exec(compile(source, file, "exec"), names)
    return names["run"]


class _Translator:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.operations: dict[str, Callable] = {}
        self._registers: dict[str, int] = {}
        self._lines: list[str] = []

    def source(self) -> str:
        blocks: list[list[Instruction]] = [[]]
        self._block_of: dict[str, int] = {}
        for item in self.kernel.code:
            if isinstance(item, str):
                blocks.append([])
                self._block_of[item] = len(blocks) - 1
                continue
            blocks[-1].append(item)
            if item.opcode.startswith("bra") or item.opcode == "ret":
                blocks.append([])
        body: list[str] = []
        for number, block in enumerate(blocks):
            self._lines = [f"program.count += {len(block)}"]
            for instruction in block:
                self._translate(instruction)
            self._lines.append(f"block = {number + 1}")
            body += [f"  if block == {number}:", *(f"   {line}" for line in self._lines)]
        start = [f" {name} = u{bits}(0)" for name, bits in self._registers.items()]
        head = ["def run(program):", " block = 0", " P = program.parameters", *start]
        return "\n".join([*head, f" while block < {len(blocks)}:", *body])

    # --- operands ---

    def _value(self, operand: str, bits: int = 32) -> str:
        """The value of a register, or of a constant of ``bits``."""
        if operand.startswith(("%tid", "%ctaid", "%nctaid", "%laneid")):
            return f"program.special['{operand}']"
        if operand == "global_smem":
            return "u32(0)"
        if operand in self.kernel.parameters:
            return f"P[{self.kernel.parameters.index(operand)}]"
        if match := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", operand):
            return f"u{32 if match[1] == 'f' else 64}({int(match[2], 16)})"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            return str(bool(number)) if bits == 1 else f"u{bits}({number & (2**bits - 1)})"
        return self._register(operand)

    def _register(self, name: str) -> str:
        local = "r_" + re.sub(r"\W", "_", name.lstrip("%"))
        self._registers[local] = self.kernel.bits(name)
        return local

    def _address(self, operand: str, bits: int) -> str:
        match = re.fullmatch(r"\[([%$\w]+)(?:\s*\+\s*(-?\w+))?\]", operand)
        if match is None:
            raise Unknown(f"address {operand}")
        base = self._value(match[1], bits)
        offset = int(match[2] or "0", 0) & (2**bits - 1)
        return f"{base} + u{bits}({offset})" if offset else base

    def _guard(self, instruction: Instruction) -> str:
        if instruction.guard is None:
            return "None"
        register = self._register(instruction.guard)
        return f"np.logical_not({register})" if instruction.negated else register

    def _set(self, instruction: Instruction, target: str, value: str) -> None:
        if target == "_":
            return
        register, guard = self._register(target), self._guard(instruction)
        new = value if guard == "None" else f"merge({guard}, {value}, {register})"
        self._lines.append(f"{register} = {new}")

    def _set_all(self, instruction: Instruction, targets: list[str], value: str) -> None:
        """Several registers to the elements of ``value``."""
        self._lines.append(f"found = {value}")
        for i, target in enumerate(targets):
            self._set(instruction, target, f"found[{i}]")

    # --- instructions ---

    def _translate(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode.startswith(NOTHING):
            return
        for prefix, method in self._SPECIAL.items():
            if opcode.startswith(prefix):
                method(self, instruction)
                return
        base, _, name = opcode.rpartition(".")
        digits = re.search(r"\d+$", name.removesuffix("x2"))
        bits = 32 if name.endswith("x2") else int(digits[0]) if digits else 1
        target, *operands = instruction.operands
        widths = [bits] * len(operands)
        if base.startswith(THIRD_IS_WIDE) and len(operands) == 3:
            widths[2] = 2 * bits
        if base.startswith(THIRD_IS_GUARD):
            widths[2] = 1
        if base.startswith((*LAST_IS_SHORT, "bfe")):
            widths[1:] = [32] * (len(operands) - 1)
        values = ", ".join(map(self._value, operands, widths))
        self._set(instruction, target, f"{self._operation(opcode)}({values})")

    def _operation(self, opcode: str) -> str:
        name = "op_" + opcode.replace(".", "_")
        self.operations[name] = arithmetic.operation(opcode)
        return name

    def _branch(self, i: Instruction) -> None:
        target = f"block = {self._block_of[i.operands[0]]}"
        if i.guard is None:
            self._lines += [target, "continue"]
        else:
            self._lines += [f"if program.branches({self._guard(i)}, {i.line}):", f" {target}", " continue"]  # fmt: skip

    def _return(self, i: Instruction) -> None:
        test = "" if i.guard is None else f"if program.branches({self._guard(i)}, {i.line}): "
        self._lines.append(test + "return")

    def _compare(self, i: Instruction) -> None:
        """``setp``, whose result may be combined with another predicate."""
        *parts, name = i.opcode.split(".")
        bits = int(name[1:])
        a, b = (self._value(operand, bits) for operand in i.operands[1:3])
        value = f"{self._operation(f'{parts[0]}.{parts[1]}.{name}')}({a}, {b})"
        if len(i.operands) == 4:
            sign = {"and": "&", "or": "|", "xor": "^"}[parts[2]]
            value = f"({value} {sign} {self._value(i.operands[3], 1)})"
        self._set(i, i.operands[0], value)

    def _move(self, i: Instruction) -> None:
        """``mov``, which also joins registers to a wider one and parts them."""
        target, source = i.operands
        bits = _size(i.opcode) if not i.opcode.endswith("pred") else 1
        half = bits // 2
        if source.startswith("{"):
            low, high = (f"u{bits}(1) * {self._value(r, half)}" for r in _list(source))
            self._set(i, target, f"({low} | (({high}) << u{bits}({half})))")
        elif target.startswith("{"):
            value = self._value(source, bits)
            for shift, part in enumerate(_list(target)):
                moved = f"({value} >> u{bits}({shift * half})).astype(u{half})"
                self._set(i, part, moved)
        else:
            self._set(i, target, self._value(source, bits))

    def _load_parameter(self, i: Instruction) -> None:
        name = i.operands[1].strip("[]").split("+")[0]
        value = f"P[{self.kernel.parameters.index(name)}]"
        self._set(i, i.operands[0], self._widened(i, i.operands[0], value))

    def _widened(self, i: Instruction, target: str, value: str) -> str:
        """What was loaded, in a register that may be wider."""
        bits, kind = self.kernel.bits(target), i.opcode.rpartition(".")[2]
        if bits == _size(i.opcode):
            return value
        return f"widen({value}, u{bits}, {kind[0] == 's'})"

    def _load(self, i: Instruction) -> None:
        size, targets = _size(i.opcode) // 8, _list(i.operands[0])
        shared = "shared" in i.opcode
        address = self._address(i.operands[1], 32 if shared else 64)
        call = "load_shared" if shared else "load"
        self._lines.append(
            f"found = program.{call}({address}, {size}, {len(targets)}, {self._guard(i)}, {i.line})"
        )
        for n, target in enumerate(targets):
            self._set(i, target, self._widened(i, target, f"found[{n}]"))

    def _store(self, i: Instruction) -> None:
        bits = _size(i.opcode)
        shared = "shared" in i.opcode
        address = self._address(i.operands[0], 32 if shared else 64)
        values = ", ".join(self._value(r, max(bits, 16)) for r in _list(i.operands[1]))
        call = "store_shared" if shared else "store"
        self._lines.append(
            f"program.{call}({address}, [{values}], {bits // 8}, {self._guard(i)}, {i.line})"
        )

    def _atomic(self, i: Instruction) -> None:
        """``atom``, and ``red`` that returns nothing."""
        parts = i.opcode.split(".")
        how = next(p for p in parts if p in ("add", "max", "min", "or"))
        shared, returns = "shared" in i.opcode, parts[0] == "atom"
        target, address, value = i.operands if returns else ("_", *i.operands)
        bits = int(parts[-1][1:])
        call = "change_shared" if shared else "change"
        dtype = f"np.{arithmetic.numpy_type(parts[-1]).__name__}"
        changed = (
            f"program.{call}('{how}', {self._address(address, 32 if shared else 64)}, "
            f"{self._value(value, bits)}, {dtype}, {self._guard(i)}, {i.line})"
        )
        self._lines.append(f"found = {changed}")
        self._set(i, target, "found")

    def _shuffle(self, i: Instruction) -> None:
        how, targets = i.opcode.split(".")[2], i.operands[0].split("|")
        values = ", ".join(map(self._value, i.operands[1:4]))
        self._set_all(i, targets, f"program.shuffle('{how}', {values})")

    def _vote(self, i: Instruction) -> None:
        self._set(i, i.operands[0], f"program.ballot({self._value(i.operands[1], 1)})")

    def _reduce(self, i: Instruction) -> None:
        _, _, how, name = i.opcode.split(".")
        dtype = f"np.{arithmetic.numpy_type(name).__name__}"
        self._set(
            i, i.operands[0], f"program.reduce('{how}', {self._value(i.operands[1])}, {dtype})"
        )

    def _elect(self, i: Instruction) -> None:
        self._set_all(i, i.operands[0].split("|"), "(u32(0), program.lane == 0)")

    def _load_matrices(self, i: Instruction) -> None:
        targets, transposed = _list(i.operands[0]), "trans" in i.opcode
        address = self._address(i.operands[1], 32)
        call = f"matrix.load_matrices(program, {address}, {len(targets)}, {transposed}, {i.line})"
        self._set_all(i, targets, call)

    def _store_matrices(self, i: Instruction) -> None:
        values = ", ".join(map(self._value, _list(i.operands[1])))
        address, transposed = self._address(i.operands[0], 32), "trans" in i.opcode
        self._lines.append(
            f"matrix.store_matrices(program, {address}, [{values}], {transposed}, {i.line})"
        )

    def _copy_async(self, i: Instruction) -> None:
        to, of, size, *have = i.operands
        there = self._value(have[0] if have else size)
        self._lines.append(
            f"matrix.copy_async(program, {self._address(to, 32)}, {self._address(of, 64)}, "
            f"{int(size, 0)}, {there}, {self._guard(i)}, {i.line})"
        )

    def _copy_block(self, i: Instruction) -> None:
        match = re.fullmatch(r"\[([%\w]+),\s*\{([^}]*)\}\]", i.operands[1])
        if match is None:
            raise Unknown(f"{i.opcode} {i.operands[1]}")
        place = ", ".join(self._value(p.strip()) for p in match[2].split(","))
        self._lines.append(
            f"matrix.copy_block(program, {self._address(i.operands[0], 32)}, "
            f"{self._value(match[1], 64)}, [{place}], {self._address(i.operands[2], 32)}, "
            f"{self._guard(i)}, {i.line})"
        )

    def _mbarrier(self, i: Instruction) -> None:
        kind, guard = i.opcode.split(".")[1], self._guard(i)
        if kind == "init":
            at, count = self._address(i.operands[0], 32), int(i.operands[1])
            self._lines.append(f"matrix.begin_barrier(program, {at}, {count}, {guard})")
        elif kind == "inval":
            at = self._address(i.operands[0], 32)
            self._lines.append(f"matrix.end_barrier(program, {at}, {guard})")
        elif i.opcode.startswith("mbarrier.arrive.expect_tx"):
            at, size = self._address(i.operands[1], 32), int(i.operands[2])
            self._lines.append(f"matrix.expect(program, {at}, {size}, {guard})")
        elif kind == "try_wait":
            at, parity = self._address(i.operands[1], 32), self._value(i.operands[2])
            self._set(i, i.operands[0], f"matrix.wait(program, {at}, {parity}, {i.line})")
        else:
            raise Unknown(i.opcode)

    def _multiply(self, i: Instruction) -> None:
        shape = re.search(r"m(\d+)n(\d+)k(\d+)\.f32\.(\w+)", i.opcode)
        if shape is None:
            raise Unknown(i.opcode)
        sums = _list(i.operands[0])
        a, b, keep = (self._value(o, w) for o, w in zip(i.operands[1:4], (64, 64, 1), strict=True))
        M, N, K, kind = shape.groups()
        values = ", ".join(map(self._value, sums))
        call = f"matrix.multiply(program, [{values}], {a}, {b}, {keep}, ({M}, {N}, {K}), '{kind}', {i.line})"
        self._set_all(i, sums, call)

    def _barrier(self, i: Instruction) -> None:
        self._lines.append("program.barrier()")

    def _copy_address(self, i: Instruction) -> None:
        self._set(i, i.operands[0], self._value(i.operands[1], 64))

    _SPECIAL: dict[str, Callable[[_Translator, Instruction], None]] = {  # noqa: RUF012
        "bra": _branch, "ret": _return, "setp": _compare, "mov": _move, "ld.param": _load_parameter,
        "ld.": _load, "st.": _store, "atom": _atomic, "red.": _atomic, "shfl": _shuffle,
        "vote": _vote, "redux": _reduce, "elect": _elect, "ldmatrix": _load_matrices,
        "stmatrix": _store_matrices, "cp.async.bulk.tensor": _copy_block, "cp.async.c": _copy_async,
        "mbarrier": _mbarrier, "wgmma.mma_async": _multiply, "bar.sync": _barrier,
        "barrier.cta.sync": _barrier, "cvta": _copy_address,
    }  # fmt: skip


def _list(operand: str) -> list[str]:
    return [r.strip() for r in operand.strip("{}").split(",")]


def _size(opcode: str) -> int:
    """Bits of the type that an opcode ends in."""
    return int(re.sub(r"\D", "", opcode.rpartition(".")[2]))
