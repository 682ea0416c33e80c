"""Rows of text from local files, streamed from an exact position.

A position ("state") is a small JSON value; going on from it gives exactly the rows that would have come next. One row
makes one document (`corpus.py`): a row of a table, a JSON object, a text file. The kinds of files are in `formats.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch_ref.spec.interface import UserError
from train.data.files import LINES, TABLES, TEXTS, find_files, in_words, kind_of, kinds_in_words
from train.data.formats import (
    FileRows,
    check_file,
    has_text_field,
    read_arrow,
    read_csv,
    read_json,
    read_json_lines,
    read_parquet,
    text_reader,
)

FORMER_DOCUMENT_BYTES = 8192
"""Longest document that was cut from a text file by runs begun before a file was one document."""

LARGE_DOCUMENT = 1 << 26
"""Size in bytes from which a text file that makes one document is told of."""


class Row(NamedTuple):
    value: Any
    """What the text field holds: text, UTF-8 bytes, `Bad`, or something else that may have text."""
    place: str
    """File (or dataset) and line or row, counted from 1."""


class Stream(Protocol):
    """An iterator of rows that knows where it is."""

    def __iter__(self) -> Iterator[Row]: ...

    def __next__(self) -> Row: ...

    def state(self) -> dict:
        """The position after the last row given."""

    def close(self) -> None: ...


class Source(Protocol):
    identity: dict
    """What makes the rows and their order what they are (see `compare_identity`)."""
    option: str
    """The option that names it, for messages."""

    def rows(self, state: dict | None) -> Stream:
        """One epoch's rows from a position on; None is the start."""


class FileSource:
    """Rows of local files, in the order of their names.

    A position is a file, the rows (or lines) of it already given, and, for files that are read by lines, the byte after
    them: a resumed stream seeks there. In parquet it starts at the row group that holds the row.

    Args:
        pattern: a file, a folder or a glob.
        text_field: column, key or nested field that holds the text; not asked for in text files.
        name: what the identity calls them.
        document_bytes: text files are cut into documents of at most this size; 0: each is one.
        without: files that are left out.
        option: which names them, for messages.
        former: find and read the files as runs did that began before nested fields, arrays and whole text files.
        runs: logs of runs in a folder are rows, as they were to runs that began before they were left out.
    """

    def __init__(
        self,
        pattern: str,
        text_field: str = "text",
        name: str = "local files",
        document_bytes: int = 0,
        without: Collection[Path] = (),
        former: bool = False,
        option: str = "--dataset",
        runs: bool = False,
    ):
        found = find_files(
            pattern, lambda file: has_text_field(file, text_field, option), without, former, option, runs
        )
        self.root, self.files, self.text_field, self.option = found.root, found.files, text_field, option
        if former:
            document_bytes = FORMER_DOCUMENT_BYTES
        self.readers = {
            ".parquet": read_parquet,
            **dict.fromkeys(TABLES[1:], read_arrow),
            **dict.fromkeys(LINES, read_json_lines if former else read_json),
            **dict.fromkeys((".csv", ".tsv"), read_csv),
            **dict.fromkeys(TEXTS, text_reader(document_bytes)),
        }
        for file in self.files:
            if not former or file.suffix == ".parquet":
                check_file(file, text_field, option)
        kinds = {kind_of(file) for file in self.files}
        self.identity = {
            "dataset": name,
            "text_field": text_field,
            "files": {self.label(file): fingerprint(file) for file in self.files},
            "versions": package_versions("pyarrow") if kinds & set(TABLES) else {},
        }
        if kinds & set(TEXTS) and not former:
            self.identity["text_files"] = f"cut at {document_bytes} bytes" if document_bytes else "whole"
        self.notes = [kinds_in_words(self.files)]
        """What to say of it in the log."""
        if found.left_out:
            self.notes.append(in_words(found.left_out))
        if again := len(self.files) - len({os.path.realpath(file) for file in self.files}):
            self.notes.append(f"{again:,} of these files are others once more, through links, and are read once more")
        if former and kinds & set(TEXTS):
            self.notes.append(
                f"text files are cut into documents of {document_bytes} bytes, as they were when the run began"
            )
        for file in self.files:
            if kind_of(file) in TEXTS and not document_bytes and file.stat().st_size >= LARGE_DOCUMENT:
                size = file.stat().st_size / 1e6
                self.notes.append(
                    f"{self.label(file)} is one document of {size:,.0f} MB, tokenized whole; see --document-bytes"
                )

    def label(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def rows(self, state: dict | None) -> FileStream:
        return FileStream(self, state or {"file": 0, "row": 0, "byte": 0})


class FileStream:
    def __init__(self, source: FileSource, state: dict):
        self._state = dict(state)
        self._rows = self._read(source)

    def _read(self, source: FileSource) -> Iterator[Row]:
        start = self._state
        for number in range(start["file"], len(source.files)):
            file, label = source.files[number], source.label(source.files[number])
            position = (start["row"], start["byte"]) if number == start["file"] else (0, 0)
            reader = source.readers[kind_of(file)]
            for value, line, row, byte in _naming(label, reader(file, source.text_field, *position)):
                self._state = {"file": number, "row": row, "byte": byte}
                yield Row(value, f"{label}:{line}")

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self._rows)

    def state(self) -> dict:
        return self._state

    def close(self) -> None:
        self._rows.close()


def _naming(label: str, rows: FileRows) -> FileRows:
    """The rows; an error in reading them names the file."""
    try:
        yield from rows
    except Exception as error:
        raise OSError(f"{label}: {in_one_line(error)}") from error


def fingerprint(file: Path) -> str:
    """Size and a hash of the first and last 64 KiB: enough to notice another file, cheap for hundreds of gigabytes.
    Raises `UserError` naming a file that cannot be read."""
    span = 1 << 16
    try:
        size = file.stat().st_size
        with open(file, "rb") as content:
            start = content.read(span)
            content.seek(max(size - span, 0))
            return f"{size} bytes, {hashlib.blake2b(start + content.read(), digest_size=8).hexdigest()}"
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error


def looks_like_hub_name(name: str) -> bool:
    """`name` or `owner/name`, and not the name of a data file."""
    parts = name.split("/")
    words = all(
        part and part[0].isalnum() and part.replace(".", "").replace("-", "").replace("_", "").isalnum()
        for part in parts
    )
    return words and len(parts) <= 2 and kind_of(Path(name)) is None


def package_versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def in_one_line(error: BaseException) -> str:
    """An error in one line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
