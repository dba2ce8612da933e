"""The pages of the project as its tests read them: fenced blocks, command lines, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Their order is the order in which they are run: the guide makes the runs that later pages look at.
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md", "docs/guide.md", "docs/recipe.md", "docs/distributed.md", "docs/stream.md",
        "docs/evaluation.md", "docs/attach.md", "docs/sharing.md", "docs/mathematics.md", "docs/performance.md", "docs/quality.md",
        "docs/limits.md", "docs/emulator.md", "CONTRIBUTING.md",
    )
)  # fmt: skip

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``reason`` says why it is not run, if it is not."""

    language: str
    body: str
    reason: str | None
    line: int

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, of a block in bash."""
        lines = self.body.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [command for line in words if line for command in _split(line)]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["body"], m["reason"], text.count("\n", 0, m.start("body")))
        for m in _BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def flags(text: str) -> set[str]:
    """Every ``--flag`` in a text."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Link targets inside the repository."""
    return [link for link in _LINK.findall(prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def _split(words: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands
