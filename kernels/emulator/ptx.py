"""PTX, the assembly language that Triton compiles to, as a list of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

BITS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands;`` on a ``line`` of the text, executed where the guard holds (or does not)."""

    line: int
    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[str, ...]
    threads: int  # of a program
    code: tuple[str | Instruction, ...]  # a string is a label
    widths: dict[str, int]  # bits of a register; of those with numbers by the name before it

    def bits(self, register: str) -> int:
        return self.widths.get(register) or self.widths[register.rstrip("0123456789")]


def parse(text: str) -> Kernel:
    """The one kernel of a module. Raises ValueError where it is not written as Triton writes it."""
    entry = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
    threads = re.search(r"\.reqntid (\d+)", text)
    if entry is None or threads is None:
        raise ValueError("expected PTX with one .entry and its .reqntid")
    begin = text.index("{", threads.end())
    first_line = text.count("\n", 0, begin) + 1
    code: list[str | Instruction] = []
    widths: dict[str, int] = {}
    scopes: list[
        dict[str, str]
    ] = []  # of the blocks around, what their own names are called outside
    blocks = 0
    for line, statement in _statements(text[begin + 1 :], first_line):
        if statement == "{":
            blocks += 1
            scopes.append({})
            continue
        if statement == "}":
            if not scopes:
                break
            scopes.pop()
            continue
        if declared := re.match(r"\.reg\s+\.(?:pred|[bsuf](\d+))\s+(.*)", statement, re.S):
            for name in re.findall(r"[%$\w]+", re.sub(r"<\d+>", "", declared[2])):
                if scopes:
                    scopes[-1][name] = f"{name}_{blocks}"
                    name = f"{name}_{blocks}"
                widths[name] = BITS[declared[1] or "pred"]
            continue
        if statement.startswith("."):
            continue
        for scope in scopes:
            for name, new in scope.items():
                statement = re.sub(rf"(?<![\w%$]){re.escape(name)}(?!\w)", new, statement)
        if statement.endswith(":"):
            name = statement[:-1]
            if scopes:
                name = scopes[-1].setdefault(name, f"{name}_{blocks}")
            code.append(name)
            continue
        code.append(_instruction(line, statement))
    parameters = tuple(re.findall(r"(\w+_param_\d+)", entry[2]))
    return Kernel(entry[1], parameters, int(threads[1]), tuple(code), widths)


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """Statements, labels with their colon, and braces around blocks, each with its line."""
    body = re.sub(r"//[^\n]*|^\s*\.(loc|file|section)\b[^\n]*", "", body, flags=re.M)
    text = ""
    for character in body:
        line += character == "\n"
        if character == ";" or (character in "{}" and not text.strip()):
            yield line, text.strip() if character == ";" else character
            text = ""
        elif character == ":" and re.fullmatch(r"\s*[$\w]+", text):
            yield line, text.strip() + ":"
            text = ""
        else:
            text += character


def _instruction(line: int, statement: str) -> Instruction:
    guard = re.match(r"@(!?)([%\w]+)\s+", statement)
    opcode, *rest = statement[guard.end() if guard else 0 :].split(None, 1)
    operands = tuple(_split(rest[0])) if rest else ()
    if guard is None:
        return Instruction(line, None, False, opcode, operands)
    return Instruction(line, guard[2], bool(guard[1]), opcode, operands)


def _split(operands: str) -> Iterator[str]:
    """At the commas outside of braces and brackets."""
    depth, text = 0, ""
    operands = re.sub(r"\s*([\[\]{}|])\s*", r"\1", operands)
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            yield text.strip()
            text = ""
        else:
            text += character
    yield text.strip()
