"""Rows out of files of each kind, from an exact position: parquet, Arrow and Feather, JSON (one object a line, or an
array of them), CSV and TSV, text; those of lines and text also compressed.

A reader is called with (file, text field, rows or lines given so far, byte after them) and gives, for each row on from
there, (what the text field holds, its line or row from 1, rows or lines so far, byte after it). In compressed files the
byte is that of the text, and all before it is read again.

`datasets` and `pyarrow` would read CSV and JSON too, but a row that is not well formed ends their reading or is dropped
without a word, and a position is the start of a block. The standard library's parsers, given line after line, spoil
one row only and go on from any byte.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch_ref.spec.interface import UserError
from train.data.files import COMPRESSIONS, LINES, TABLES, kind_of
from train.data.records import Bad, pick, text_column

FileRows = Iterator[tuple[Any, int, int, int]]

LONGEST_CELL = 1 << 26
"""Longest CSV cell, in characters: where a quote never closes, the file is not swallowed whole."""

LONGEST_LINE = 1 << 28
"""Bytes of a line, or of a row in an array, that are held: what a compressed file unpacks to has no bound."""
LONGEST_TEXT = 1 << 30
"""Bytes of a compressed text file that is one document."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD = 1 << 16


# ------------------------------------------------------------------------------------------------------------ bytes


def open_bytes(file: Path, byte: int = 0) -> IO[bytes]:
    """The bytes of a file, decompressed, from one on."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    opener = openers.get(file.suffix.lower())
    if opener is None:
        stream = open(file, "rb")
        stream.seek(byte)
        return stream
    stream = opener(file, "rb")
    while byte:
        byte -= len(stream.read(min(byte, 1 << 20))) or byte
    return stream


def _open_zstd(file: Path, mode: str) -> IO[bytes]:
    import pyarrow

    # Through Python's own file: any name can be opened.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(open(file, mode)), "zstd"))


def foreign_encoding(head: bytes) -> str | None:
    """The encoding that the first bytes of a text show to be another than UTF-8, if they do."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    halves = head[: len(head) // 2 * 2][::2], head[1::2]
    zeros = [half.count(0) / max(len(half), 1) for half in halves]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (max(zeros) > 0.3 and min(zeros) < 0.1 and len(head) > 3):
        return "UTF-16"
    return None


def _not_utf8(encoding: str) -> str:
    return f"{encoding}, not UTF-8: convert it (iconv -f {encoding} -t UTF-8)"


def bounded_lines(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines, each with its length; of one longer than `LONGEST_LINE` only the beginning, without its end."""
    while line := stream.readline(LONGEST_LINE):
        length, last = len(line), line
        while len(last) == LONGEST_LINE and not last.endswith(b"\n") and (last := stream.readline(LONGEST_LINE)):
            length += len(last)
        yield line, length


# ------------------------------------------------------------------------------------------------------------- text


def text_reader(document_bytes: int) -> Callable[[Path, str, int, int], FileRows]:
    """Reads text files, each as one row, or in pieces of at most `document_bytes` if that is not 0."""

    def read(file: Path, text_field: str, row: int, byte: int) -> FileRows:
        if byte and not document_bytes:
            return
        bound = document_bytes or (LONGEST_TEXT + 1 if file.suffix.lower() in COMPRESSIONS else -1)
        with open_bytes(file, byte) as stream:
            left = b""
            while piece := left + stream.read(bound - len(left) if bound > 0 else -1):
                left = b""
                if not document_bytes and bound > 0 and len(piece) == bound:
                    size = f"unpacks to more than {LONGEST_TEXT >> 20} MiB"
                    reason = f"{size}, too long for one document: --document-bytes cuts it"
                    yield Bad(reason), row + 1, row + 1, len(piece)
                    return
                if document_bytes and len(piece) == document_bytes and stream.peek(1):
                    cut = cut_point(piece)
                    piece, left = piece[:cut], piece[cut:]
                byte += len(piece)
                line, row = row + 1, row + piece.count(b"\n")
                encoding = foreign_encoding(piece[:_HEAD])
                yield Bad(_not_utf8(encoding)) if encoding else piece.removeprefix(_BYTE_ORDER_MARK), line, row, byte

    return read


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


# ------------------------------------------------------------------------------------------------------------- JSON


def read_json(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    """An array of objects, if the first character says so, or else an object a line."""
    with open_bytes(file) as start:
        is_array = start.read(_HEAD).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["
    return (read_json_array if is_array else read_json_lines)(file, text_field, row, byte)


def read_json_lines(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    with open_bytes(file, byte) as lines:
        for line, length in bounded_lines(lines):
            row += 1
            byte += length
            if length > len(line):
                yield Bad(f"a line of {length:,} bytes, more than {LONGEST_LINE >> 20} MiB"), row, row, byte
            elif line.strip():
                yield parse_json_line(line, text_field), row, row, byte


def parse_json_line(line: bytes, text_field: str) -> Any:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Bad("invalid UTF-8")
    except (ValueError, RecursionError):
        return Bad("not JSON")
    return _field_of(record, text_field)


def _field_of(record: Any, text_field: str) -> Any:
    return (
        pick(record, text_field)
        if isinstance(record, dict)
        else Bad(f"not a JSON object with the field {text_field!r}")
    )


def read_json_array(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    with io.TextIOWrapper(open_bytes(file), "utf-8-sig", errors="surrogateescape") as text:
        for number, record in enumerate(itertools.islice(array_elements(text), row, None), row + 1):
            yield record if isinstance(record, Bad) else _field_of(record, text_field), number, number, 0


def array_elements(text: IO[str], chunk: int = _HEAD) -> Iterator[Any]:
    """The elements of a JSON array, of which no more than one and a chunk are in memory."""
    decode, between, ends = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), re.compile(r"\s*[,\]]")
    buffer, start = text.read(chunk).lstrip()[1:], 0
    while True:
        start = between.match(buffer, start).end()
        if buffer[start : start + 1] == "]":
            rest = buffer[start + 1 :]
            while not rest.strip() and (rest := text.read(chunk)):
                pass
            if rest:  # as where files were put one behind the other
                yield Bad("behind the end of the array: the rest of the file is not read")
            return
        try:
            value, end = decode(buffer, start)
            whole = ends.match(buffer, end)  # a number may go on in the next chunk
        except (ValueError, RecursionError):
            whole = None
        if whole:
            yield value
            start = end
        else:
            more = text.read(max(chunk, len(buffer) - start))
            if not more or len(buffer) - start > LONGEST_LINE:
                yield Bad("not JSON from here on: the rest of the file is lost")
                return
            buffer, start = buffer[start:] + more, 0


# -------------------------------------------------------------------------------------------------------------- CSV


class CountedLines:
    """Lines as text, invalid UTF-8 as surrogates, and how many lines and bytes were given."""

    def __init__(self, stream: IO[bytes], line: int = 0, byte: int = 0):
        self._lines, self.line, self.byte = bounded_lines(stream), line, byte

    def __iter__(self) -> CountedLines:
        return self

    def __next__(self) -> str:
        line, length = next(self._lines)
        if self.byte == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)  # before a quote of the first cell, it would be text
        self.line, self.byte = self.line + 1, self.byte + length
        return line.decode(errors="surrogateescape")


def _csv_reader(lines: CountedLines, file: Path) -> Iterator[list[str]]:
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(lines, delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)


def csv_columns(file: Path, option: str = "--dataset") -> tuple[list[str], CountedLines]:
    """The names in the first line, and where it ends. Raises `UserError` if it holds none."""
    with open_bytes(file) as stream:
        lines = CountedLines(stream)
        try:
            names = next(_csv_reader(lines, file), [])
        except csv.Error as error:
            raise UserError(f"{option}: {file}: its first line holds no names of columns: {error}") from error
    return names, lines


def read_csv(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    names, header = csv_columns(file)
    column = names.index(text_field)
    with open_bytes(file, byte or header.byte) as stream:
        lines = CountedLines(stream, row or header.line, byte or header.byte)
        records = _csv_reader(lines, file)
        while True:
            first = lines.line + 1
            try:
                record = next(records, None)
            except csv.Error as error:  # goes on with the next line
                value: Any = Bad(f"not well-formed, lines {first} to {lines.line}: {error}")
            else:
                if record is None:
                    return
                if not record:
                    continue
                value = record[column] if len(record) == len(names) else Bad(f"{len(record)} cells, not {len(names)}")
            yield value, first, lines.line, lines.byte


# ----------------------------------------------------------------------------------------------------------- tables


def read_parquet(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    import pyarrow.parquet

    # One thread and a small buffer: nothing is left running when the stream is dropped half read, and a row group of
    # a gigabyte is never held whole.
    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as parquet:
        top, below = text_column(parquet.schema_arrow, text_field, file)
        group, first = 0, 0
        while group < parquet.num_row_groups and first + parquet.metadata.row_group(group).num_rows <= row:
            first += parquet.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, parquet.num_row_groups))
        for batch in parquet.iter_batches(1024, row_groups=groups, columns=[top], use_threads=False):
            for value in column_values(batch.column(0), below, max(row - first, 0)):
                row += 1
                yield value, row, row, 0
            first += batch.num_rows


def read_arrow(file: Path, text_field: str, row: int, byte: int) -> FileRows:
    """Arrow's file format (which Feather is) and its stream format (in which `datasets` saves)."""
    with open(file, "rb") as stream:
        reader = open_arrow(stream)
        top, below = text_column(reader.schema, text_field, file)
        first = 0
        batches = (
            (reader.get_batch(number) for number in range(reader.num_record_batches))
            if hasattr(reader, "get_batch")
            else reader
        )
        for batch in batches:
            for value in column_values(batch.column(top), below, max(row - first, 0)):
                row += 1
                yield value, row, row, 0
            first += batch.num_rows


def open_arrow(stream: IO[bytes]) -> Any:
    import pyarrow

    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    try:
        return pyarrow.ipc.open_file(stream, options=options)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        return pyarrow.ipc.open_stream(stream, options=options)


def column_values(column: Any, below: str, start: int) -> Iterator[Any]:
    """Values of a column, from one on; of what is nested, the field `below`."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = pyarrow.types
    if any(is_text(column.type) for is_text in (kinds.is_string, kinds.is_large_string, kinds.is_string_view)):
        column = column.cast(pyarrow.large_binary())  # text that is not valid UTF-8 must spoil its own row only
    for scalar in column.slice(start):
        try:
            value = scalar.as_py()
        except UnicodeDecodeError:
            yield Bad("invalid UTF-8")
            continue
        value = pick(value, below) if below and value is not None else value
        yield Bad("no text") if value is None else value


# ------------------------------------------------------------------------------------------------------------ files


class NotRows(UserError):
    """JSON that can be read, and is no rows."""


def check_file(file: Path, text_field: str, option: str = "--dataset") -> None:
    """Raises `UserError`, naming the cause, if a file can't be read, or is one of rows and has no text field. What a
    text file holds is not looked at: each is a row by itself, and a bad one is skipped as such."""
    kind = kind_of(file)
    with _naming_the_cause(file, option):
        if kind == ".parquet":
            import pyarrow.parquet

            text_column(pyarrow.parquet.read_schema(file), text_field, file)
        elif kind in TABLES:
            with open(file, "rb") as stream:
                text_column(open_arrow(stream).schema, text_field, file)
        else:
            with open_bytes(file) as stream:
                head = stream.read(_HEAD)
            if kind in LINES:
                _check_lines(file, kind, text_field, head, option)


@contextmanager
def _naming_the_cause(file: Path, option: str) -> Iterator[None]:
    """Whatever a file can't be read for is a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{option}: {file} can't be read as {''.join(file.suffixes[-2:]).lstrip('.')}: "
            f"{type(error).__name__}: {lines[0]}"
        ) from error


def _check_lines(file: Path, kind: str, text_field: str, head: bytes, option: str) -> None:
    if encoding := foreign_encoding(head):
        raise UserError(f"{option}: {file} is {_not_utf8(encoding)}")
    if kind in (".csv", ".tsv"):
        names, _ = csv_columns(file, option)
        if text_field not in names:
            raise UserError(f"--text-field {text_field}: {file} has no such column, only {', '.join(names)}")
        return
    first = head.removeprefix(_BYTE_ORDER_MARK).lstrip().split(b"\n")[0].rstrip()
    if first[:1] == b"{" and first[-1:] in (b"{", b"[", b","):
        raise NotRows(
            f"{option}: {file} holds one JSON object over several lines; give an array of objects, or one a line"
        )


def has_text_field(file: Path, text_field: str, option: str = "--dataset") -> bool:
    """Whether the first row of a JSON file has the text field. Raises `UserError`, naming the cause, if the file can't
    be read."""
    try:
        check_file(file, text_field, option)
    except NotRows:
        return False
    with _naming_the_cause(file, option):
        value = next(read_json(file, text_field, 0, 0), [Bad("nothing")])[0]
    return not isinstance(value, Bad)
