"""The demo's text: English prose of the documentation inside the installed Python packages."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from ..files import describe_content
from .text import TextSource

TEXT = "docstrings"
"""What ``--dataset`` calls it."""

_PACKAGES = ("numpy", "torch")
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_PLAIN = str.maketrans({"`": "", "–": "—", "“": '"', "”": '"'})
_NOT_PROSE = re.compile(r"[^A-Za-z0-9 ,.;:!?'()“”—-]|https?:|\w\(|\w\.\w|_")


def open_text(seed: int) -> TextSource:
    """The documents as a text source, in an order drawn from ``seed``."""
    found = documents()
    shard = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    everything = "\n\n".join(found).encode()
    content = describe_content(len(everything), hashlib.sha256(everything).hexdigest())
    name = "installed documentation"
    return TextSource([shard], iter, name=name, seed=seed, content={name: content})


def documents(packages: Sequence[str] = _PACKAGES) -> list[str]:
    """Prose of the documentation installed with Python: one document per page or source file.

    Several MB, in a fixed order: the same on every call on the same machine. The
    packages are not imported: docstrings are cut out of their source files.
    """
    seen: set[str] = set()
    found = []
    for texts in _texts(packages):
        paragraphs = []
        for paragraph in (paragraph for text in texts for paragraph in _prose(text)):
            if paragraph not in seen:  # licences and shared descriptions repeat many times
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            found.append("\n".join(paragraphs))
    return found


def _texts(packages: Sequence[str]) -> Iterator[list[str]]:
    """The language reference's pages, then the docstrings of every source file."""
    for _, page in sorted(topics.items()):
        yield [page]
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                yield _DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore"))


def _prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are plain English sentences, in the model's alphabet."""
    for block in re.split(r"\n\s*\n", docstring):
        paragraph = " ".join(block.translate(_PLAIN).split())
        paragraph = re.sub(r'"([^"]*)"', r"“\1”", paragraph)
        if len(paragraph) < 60:
            continue
        if len(_NOT_PROSE.findall(paragraph)) * 100 > len(paragraph):
            continue
        yield paragraph
