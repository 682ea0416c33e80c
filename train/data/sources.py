"""Rows of text from local files and from the Python documentation, streamed from an exact position.

A position ("state") is a small JSON value; going on from it gives exactly the rows that would have come next. One row
makes one document (`corpus.py`):
* a row of a parquet file or a line of a `.jsonl` / `.json` / `.ndjson` file: the text in one field;
* a `.txt` or `.md` file, whole if it has at most `TEXT_DOCUMENT_BYTES`, else each piece of at most that size, cut
  after a blank line where there is one (nothing is lost: the pieces joined are the file);
* a module or a topic of the Python documentation (`python-docs`), about 2 MB of English that every CPython carries.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import write_whole

TEXT_DOCUMENT_BYTES = 8192
"""Longest document cut from a text file, in bytes: about one sequence of 2048 tokens."""


class Bad(NamedTuple):
    """Stands in for the text of a row that has none."""

    reason: str


class Row(NamedTuple):
    value: Any
    """What the text field holds: text, UTF-8 bytes, `Bad`, or something that is not text."""
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

    def rows(self, state: dict | None) -> Stream:
        """One epoch's rows from a position on; None is the start."""


class FileSource:
    """Rows of local files, in the order of their names.

    A position is a file, the rows of it already given, and (for files that are read by lines) the byte after them: a
    resumed stream seeks there. In parquet it starts at the row group that holds the row.
    """

    def __init__(self, pattern: str, text_field: str = "text", name: str = "local files"):
        self.root, self.files = find_files(pattern)
        self.text_field = text_field
        for file in self.files:
            if file.suffix == ".parquet":
                check_parquet(file, text_field)
        self.identity = {
            "dataset": name,
            "text_field": text_field,
            "files": {self.label(file): fingerprint(file) for file in self.files},
            "versions": package_versions("pyarrow") if any(file.suffix == ".parquet" for file in self.files) else {},
        }

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
            for value, line, row, byte in READERS[file.suffix](file, source.text_field, *position):
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


FileRows = Iterator[tuple[Any, int, int, int]]
"""(value, its line or row from 1, rows given so far, byte after the row)"""


def read_parquet(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    import pyarrow
    import pyarrow.parquet

    # One thread and a small buffer: nothing is left running when the stream is dropped half read, and a row group of
    # a gigabyte is never held whole.
    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as parquet:
        group, first = 0, 0
        while group < parquet.num_row_groups and first + parquet.metadata.row_group(group).num_rows <= row:
            first += parquet.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, parquet.num_row_groups))
        for batch in parquet.iter_batches(1024, row_groups=groups, columns=[text_field], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: text that is not valid UTF-8 must spoil its own row only.
            for value in column.cast(pyarrow.large_binary()).slice(max(row - first, 0)):
                row += 1
                yield Bad("no text") if value.as_py() is None else value.as_py(), row, row, 0
            first += batch.num_rows


def check_parquet(file: Path, text_field: str) -> None:
    """Raises `UserError` if the file is not parquet or its text field is missing or holds something else."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--dataset: {file} can't be read as parquet: {first_line(error)}") from error
    if text_field not in schema.names:
        raise UserError(f"--text-field {text_field}: {file} has no such column, only {', '.join(schema.names)}")
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    kinds = pyarrow.types
    if not any(is_text(kind) for is_text in (kinds.is_string, kinds.is_large_string, kinds.is_string_view)):
        raise UserError(f"--text-field {text_field}: that column of {file} holds {kind}, not text")


def read_json_lines(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    with open(file, "rb") as lines:
        lines.seek(byte)
        for line in lines:
            row += 1
            byte += len(line)
            if line.strip():
                yield parse_json_line(line, text_field), row, row, byte


def parse_json_line(line: bytes, text_field: str) -> Any:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Bad("invalid UTF-8")
    except (ValueError, RecursionError):
        return Bad("not JSON")
    if not isinstance(record, dict):
        return Bad(f"not a JSON object with the field {text_field!r}")
    return record.get(text_field, Bad(f"the field {text_field!r} is missing"))


def read_text(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    with open(file, "rb") as text:
        text.seek(byte)
        while piece := text.read(TEXT_DOCUMENT_BYTES):
            if len(piece) == TEXT_DOCUMENT_BYTES and text.read(1):
                piece = piece[: cut_point(piece)]
            byte += len(piece)
            text.seek(byte)
            line = row + 1
            row += piece.count(b"\n")
            yield piece.removeprefix(b"\xef\xbb\xbf"), line, row, byte


def cut_point(piece: bytes) -> int:
    """Where to cut a piece of text: after the last blank line in its second half, else the last line end there, else
    before the last character."""
    for end in (b"\n\n", b"\n"):
        if (found := piece.rfind(end, len(piece) // 2)) >= 0:
            return found + len(end)
    continuation = 0
    while continuation < 3 and piece[-1 - continuation] & 0xC0 == 0x80:
        continuation += 1
    return len(piece) - 1 - continuation


READERS: dict[str, Callable[[Path, str, int, int], FileRows]] = {
    ".parquet": read_parquet,
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".ndjson": read_json_lines,
    ".txt": read_text,
    ".md": read_text,
}


def find_files(pattern: str) -> tuple[Path, list[Path]]:
    """The files that a path, a folder (searched with its subfolders) or a glob names, sorted, and the folder that
    their names are relative to. Raises `UserError` if there are none that can be read."""
    path = Path(pattern)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*"))
        found = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    else:
        found = [path] if path.is_file() else [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = sorted(file for file in found if file.is_file() and file.suffix in READERS)
    if not files:
        what = "is not" if path.is_file() else "there is no file there that is"
        raise UserError(f"--dataset {pattern}: {what} of a kind that can be read: {' '.join(READERS)}")
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    return root, files


def fingerprint(file: Path) -> str:
    """Size and a hash of the first and last 64 KiB: enough to notice another file, cheap for hundreds of gigabytes."""
    size, span = file.stat().st_size, 1 << 16
    with open(file, "rb") as content:
        start = content.read(span)
        content.seek(max(size - span, 0))
        return f"{size} bytes, {hashlib.blake2b(start + content.read(), digest_size=8).hexdigest()}"


PYTHON_DOCS = "python-docs"
_NOT_DOCUMENTATION = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
"""Folders of the standard library that are left out."""


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference's topics and of each standard-library module's docstrings, in an order
    that depends only on the Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart; the docstrings alone still make a corpus
        topics = {}
    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for folder, subfolders, files in os.walk(library := sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_DOCUMENTATION)
        for file in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            if text := module_docstrings(module, file):
                yield f"module {module}", text


def module_docstrings(module: str, file: Path) -> str:
    """Every docstring of a module under the full name of what it describes, in the order of the source."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    described = []

    def visit(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):
            described.append(f"{name}\n\n{text}")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(described)


def python_docs_source(file: Path, keep: bool = False) -> FileSource:
    """`python-docs` as rows of a JSON-lines file, written if it is not there (or unless `keep`).

    The text differs between Python versions. A run keeps its own copy, and so can go on under another Python."""
    if not (keep and file.exists()):
        lines = (json.dumps({"name": name, "text": text}) + "\n" for name, text in python_documents())
        write_whole(file, "".join(lines).encode())
    return FileSource(str(file), name=PYTHON_DOCS)


def looks_like_hub_name(name: str) -> bool:
    """`name` or `owner/name`, and not the name of a data file."""
    parts = name.split("/")
    words = all(
        part and part[0].isalnum() and part.replace(".", "").replace("-", "").replace("_", "").isalnum()
        for part in parts
    )
    return words and len(parts) <= 2 and Path(name).suffix not in READERS


def package_versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def first_line(error: BaseException) -> str:
    """An error in one line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
