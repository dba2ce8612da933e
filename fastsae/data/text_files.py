"""Documents of local files: .txt, .jsonl and .parquet, the first two also compressed by gzip.

The readers of ``datasets`` do not do: they turn text that looks like a date into one, tell the position
of an error within a block instead of the file, and make a document of every single paragraph.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, StreamError
from ..files import describe_content, fingerprint
from ..lm.encoding import Document
from ..lm.hub_access import is_transient
from .text import TextSource, as_document, no_column

DOCUMENT_CHARACTERS = 8_192
"""A .txt file is cut at the first blank line after this many characters."""
LONGEST_DOCUMENT = 65_536
"""Without a blank line, it is cut at the first line end (or line piece) after this many."""
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_NULS = 0.02
"""Share of NUL bytes from which on a file is no text of one byte a character and more."""


def open_files(paths: Sequence[str], *, text_column: str = "text", **options: Any) -> TextSource:
    """Documents of local files, and of the files anywhere under local directories.

    ``.txt`` (UTF-8): a document is a run of whole paragraphs of about ``DOCUMENT_CHARACTERS``
    characters; joined again, the documents are the file. ``.jsonl`` and ``.parquet``: a document is
    the ``text_column`` of one record: text, a chat, or token ids. ``.txt.gz`` and ``.jsonl.gz`` are
    read without unpacking. ``options``: ``seed`` and ``skip_bad_lines`` of :class:`TextSource`.

    Every file is checked at once, so that a bad one is found now and not after hours of training.
    Raises StreamError: no such file, not UTF-8 (with the byte), not JSON (with the line), no such
    column. Raises ConfigError: an ending other than those.
    """
    files = [file for path in paths for file in _expand(Path(path))]
    skip = options.get("skip_bad_lines", False)
    content = {str(file): _check(file, text_column, skip) for file in files}
    name = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    read = lambda file: _read_file(file, text_column)
    return TextSource(files, read, name=name, content=content, **options)


def _kind(path: Path) -> str | None:
    return next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        if not files:
            raise StreamError(
                f"the directory {str(path)!r} holds no text: expected files ending in {', '.join(_SUFFIXES)}"
            )
        return files
    if not path.exists():
        raise StreamError(f"the text file {str(path)!r} does not exist; check the path")
    if not _kind(path):
        raise ConfigError(
            f"the text file {str(path)!r} is of an unknown kind; expected an ending among "
            f"{', '.join(_SUFFIXES)}"
        )
    return [path]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore


def _check(path: Path, text_column: str, skip_bad_lines: bool) -> str:
    """Raise StreamError for a file that cannot be read; returns what tells it apart from others."""
    try:
        if _kind(path) == ".parquet":
            import pyarrow.parquet

            columns = pyarrow.parquet.read_schema(path).names
            if text_column not in columns:
                raise no_column(str(path), text_column, columns)
            content = fingerprint(path)
        else:
            content = _check_encoding(path)
    except (OSError, EOFError, ValueError) as error:  # ValueError: pyarrow, for a bad file
        raise _unreadable(path, error) from error
    first = next(_read_file(path, text_column), None)
    if isinstance(first, StreamError) and not skip_bad_lines:
        raise first
    return content


def _unreadable(path: Path, error: Exception) -> StreamError:
    return StreamError(f"the text file {str(path)!r} cannot be read: {error}")


def _check_encoding(path: Path) -> str:
    """Raise StreamError unless the whole file is UTF-8; returns its size and hash."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, nuls, found = 0, 0, hashlib.sha256()
    with _open(path) as file:
        while True:
            block = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = read - pending + error.start
                raise StreamError(
                    f"the text file {str(path)!r} is not UTF-8: byte {error.object[error.start]:#04x} at "
                    f"position {position}; {_advice(path)}"
                ) from None
            nuls += block.count(0)
            found.update(block)
            if not block:
                break
            read += len(block)
    if nuls > _NULS * read:
        raise StreamError(
            f"the text file {str(path)!r} is not UTF-8: {nuls / read:.0%} of it are NUL bytes; "
            f"{_advice(path)}"
        )
    return describe_content(read, found.hexdigest())


_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # which begins as that of UTF-16
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_CONTAINERS = (
    (b"\x1f\x8b", "gzip", "name it .gz, as in .txt.gz"),
    (b"BZh", "bzip2", "unpack it"),
    (b"\xfd7zXZ", "xz", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it"),
    (b"PK\x03\x04", "zip, as office documents are", "unpack it, or save it as text"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"%PDF", "PDF", "save it as text"),
)


def _advice(path: Path) -> str:
    """What to do with a file that is not UTF-8, by what its beginning looks like."""
    with _open(path) as file:
        start = file.read(1 << 16)
    for mark, kind, remedy in _CONTAINERS:
        if start.startswith(mark):
            return f"it is a file of another kind ({kind}): {remedy}"
    encoding = next((name for name, marks in _MARKS.items() if start.startswith(marks)), None)
    if encoding is None and start.count(0) > _NULS * len(start):
        # Most characters of most texts have a high byte of 0: where it stands tells the encoding.
        empty = "".join("x0"[start[i::4].count(0) * 4 > len(start) // 4] for i in range(4))
        encodings = {"x0x0": "utf-16le", "0x0x": "utf-16be", "x000": "utf-32le", "000x": "utf-32be"}
        encoding = encodings.get(empty)
        if encoding is None:
            return "it is not text"
    convert = f"iconv -f {encoding or 'latin1'} -t utf-8 {path.name} > utf8-{path.name}"
    if encoding is None:
        return f"convert it; if it is Latin-1, with `{convert}`"
    return f"it looks like {encoding.upper()}: convert it with `{convert}`"


def _read_file(path: Path, text_column: str) -> Iterator[Document | StreamError]:
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, text_column)
        elif kind in (".jsonl", ".jsonl.gz"):
            yield from _read_jsonl(path, text_column)
        else:
            yield from _read_txt(path)
    except (OSError, EOFError, ValueError) as error:
        if is_transient(error):  # a network drive
            raise
        raise _unreadable(path, error) from error


def _read_txt(path: Path) -> Iterator[str]:
    # The mark that some editors put in front is no text.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n") as file:
        document: list[str] = []
        length = 0
        while line := file.readline(LONGEST_DOCUMENT):
            document.append(line)
            length += len(line)
            if (length >= DOCUMENT_CHARACTERS and line.isspace()) or length >= LONGEST_DOCUMENT:
                yield "".join(document)
                document, length = [], 0
        if document:
            yield "".join(document)


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document | StreamError]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            yield _record(line, f"{path}, line {number}", text_column)


def _record(line: bytes, where: str, text_column: str) -> Document | StreamError:
    if line.isspace():
        return ""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:  # also what is not UTF-8, or a number of too many digits
        return StreamError(
            f"{where}: not JSON ({getattr(error, 'msg', error)}); a .jsonl file holds one JSON object a "
            f"line"
        )
    except RecursionError:
        return StreamError(f"{where}: JSON that is nested too deeply")
    if not isinstance(record, dict):
        return StreamError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_column not in record:
        return no_column(where, text_column, record)
    return as_document(record[text_column], where, text_column)


def _read_parquet(path: Path, text_column: str) -> Iterator[Document | StreamError]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield as_document(value, f"{path}, row {number}", text_column)
