"""Documents of local files: .txt, .jsonl and .parquet, the first two also compressed by gzip.

The readers of ``datasets`` do not do: they turn text that looks like a date into one, tell the position
of an error within a block instead of the file, and make a document of every single paragraph.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import ConfigError, StreamError
from .text import TextSource, as_text, no_column

DOCUMENT_CHARACTERS = 8_192
"""A .txt file is cut at the first blank line after this many characters."""
LONGEST_DOCUMENT = 65_536
"""Without a blank line, it is cut at the first line end (or line piece) after this many."""
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


def open_files(paths: Sequence[str], *, text_column: str = "text", seed: int = 0) -> TextSource:
    """Documents of local files, and of the files anywhere under local directories.

    ``.txt`` (UTF-8): a document is a run of whole paragraphs of about ``DOCUMENT_CHARACTERS``
    characters; joined again, the documents are the file. ``.jsonl`` and ``.parquet``: a document is
    the ``text_column`` of one record. ``.txt.gz`` and ``.jsonl.gz`` are read without unpacking.

    Every file is checked at once, so that a bad one is found now and not after hours of training.
    Raises StreamError: no such file, not UTF-8 (with the byte), not JSON (with the line), no such
    column. Raises ConfigError: an ending other than those.
    """
    files = [file for path in paths for file in _expand(Path(path))]
    for file in files:
        _check(file, text_column)
    name = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    return TextSource(files, lambda file: _read_file(file, text_column), name=name, seed=seed)


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
        raise StreamError(
            f"the text file {str(path)!r} does not exist; check the path given to --text-files"
        )
    if not _kind(path):
        raise ConfigError(
            f"the text file {str(path)!r} is of an unknown kind; expected an ending among "
            f"{', '.join(_SUFFIXES)}"
        )
    return [path]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore


def _check(path: Path, text_column: str) -> None:
    try:
        if _kind(path) == ".parquet":
            import pyarrow.parquet

            columns = pyarrow.parquet.read_schema(path).names
            if text_column not in columns:
                raise no_column(str(path), text_column, columns)
            return
        _check_utf8(path)
        next(_read_file(path, text_column), None)
    except (
        OSError,
        EOFError,
        ValueError,
    ) as error:  # ValueError: what pyarrow raises for a bad file
        raise StreamError(f"the text file {str(path)!r} cannot be read: {error}") from error


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
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
                    f"position {position}; convert it, for example with "
                    f"`iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}`"
                ) from None
            if not block:
                return
            read += len(block)


def _read_file(path: Path, text_column: str) -> Iterator[str]:
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, text_column)
    if kind in (".jsonl", ".jsonl.gz"):
        return _read_jsonl(path, text_column)
    return _read_txt(path)


def _read_txt(path: Path) -> Iterator[str]:
    with io.TextIOWrapper(_open(path), encoding="utf-8", newline="\n") as file:
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


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line) if not line.isspace() else {text_column: ""}
            except json.JSONDecodeError as error:
                raise StreamError(
                    f"{where}: not JSON ({error.msg}); a .jsonl file holds one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise StreamError(f"{where}: expected a JSON object, found {type(record).__name__}")
            if text_column not in record:
                raise no_column(where, text_column, record)
            yield as_text(record[text_column], where, text_column)


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for value in batch.column(0).to_pylist():
                yield as_text(value, str(path), text_column)
