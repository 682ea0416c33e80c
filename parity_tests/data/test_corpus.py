"""Rows and documents: exact positions in every kind of file, bad rows, errors, held-out documents."""

import itertools
import json
import logging
import subprocess
import sys
import threading
import time

import pyarrow
import pytest

from parity_tests.support.data import (
    FailingSource,
    make_texts,
    streamed,
    texts_of,
    write_json_lines,
    write_parquet,
    write_text_files,
)
from torch_ref.spec.interface import UserError
from train.data.corpus import BAD_ROWS_NAMED, DataError, Reader, compare_identity, held_out_below, open_source
from train.data.sources import FORMER_DOCUMENT_BYTES, FileSource, Row

TEXTS = make_texts(47)


def mixed_folder(folder):
    write_parquet(folder / "a", TEXTS[:20], shards=2)
    write_json_lines(folder / "b", TEXTS[20:30])
    write_text_files(folder / "c", [*TEXTS[30:40], "\n\n".join(make_texts(400))])
    return folder


SOURCES = {
    "parquet": lambda folder: FileSource(str(write_parquet(folder, TEXTS))),
    "jsonl": lambda folder: FileSource(str(write_json_lines(folder, TEXTS))),
    "mixed": lambda folder: FileSource(str(mixed_folder(folder))),
    "datasets": lambda folder: streamed(write_parquet(folder, TEXTS)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_going_on_from_any_position_gives_the_rest(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    stream = source.rows(None)
    states, rows = [stream.state()], []
    for row in stream:
        rows.append(row)
        states.append(json.loads(json.dumps(stream.state())))
    assert len({row.place for row in rows}) == len(rows) >= 40
    assert kind == "mixed" or texts_of(rows) == TEXTS
    for count, state in enumerate(states):
        assert list(source.rows(state)) == rows[count:]


@pytest.mark.parametrize("kind", SOURCES)
def test_stopped_twice_nothing_is_lost_or_repeated(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    whole = list(source.rows(None))
    for counts in [(1, 1), (3, 6), (4, 4), (10, 17), (20, 21)]:
        rows, state = [], None
        for count in (*counts, None):
            stream = source.rows(state)
            rows += itertools.islice(stream, count)
            state = stream.state()
            stream.close()
        assert rows == whole


def test_parquet_goes_on_without_reading_earlier_row_groups(tmp_path):
    """Row groups before the position are made unreadable: a stream that touched them would break."""
    source = FileSource(str(write_parquet(tmp_path, TEXTS, shards=1, rows_per_group=10)))
    stream = source.rows(None)
    list(itertools.islice(stream, 25))
    stream.close()
    with open(source.files[0], "r+b") as file:
        start = pyarrow.parquet.read_metadata(source.files[0]).row_group(2).column(0).file_offset
        start = start or pyarrow.parquet.read_metadata(source.files[0]).row_group(2).column(0).dictionary_page_offset
        file.write(b"PAR1" + b"\xff" * (start - 4))
    assert texts_of(source.rows(stream.state())) == TEXTS[25:]
    with pytest.raises(OSError):
        list(source.rows(None))


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_text_in_other_encodings(kind, tmp_path):
    source = FileSource(str(write_parquet(tmp_path, TEXTS, kind=kind)))
    assert texts_of(source.rows(None)) == TEXTS


# ----------------------------------------------------------------------------------------------------- text files


def test_a_text_file_is_one_document(tmp_path):
    book = "\n\n".join(make_texts(400))
    write_text_files(tmp_path, [book, "short"])
    source = FileSource(str(tmp_path))
    assert texts_of(source.rows(None)) == [book, "short"] and len(book) > FORMER_DOCUMENT_BYTES
    assert source.identity["text_files"] == "whole"


@pytest.mark.parametrize("former", [False, True])
def test_a_text_file_is_cut_without_loss(tmp_path, former):
    size = FORMER_DOCUMENT_BYTES
    paragraphs = ["漢字" * 300 + str(number) for number in range(40)]
    long_line = "é" * (3 * size)
    text = "\n\n".join(paragraphs) + "\n\n" + long_line + "\nend"
    write_text_files(tmp_path, [text, "short", "x" * size])
    source = FileSource(str(tmp_path), former=True) if former else FileSource(str(tmp_path), document_bytes=size)
    rows = list(source.rows(None))
    first = [row for row in rows if row.place.startswith("0000")]
    assert "".join(texts_of(first)) == text
    assert all(len(row.value) <= size for row in rows)
    assert [row.value.endswith(b"\n\n") for row in first[:5]] == [True] * 5
    assert texts_of(rows)[-2:] == ["short", "x" * size]
    lines = text.split("\n")
    for row in first:
        assert lines[int(row.place.split(":")[1]) - 1].startswith(row.value.decode().split("\n")[0][:10])
    assert source.identity.get("text_files") == (None if former else "cut at 8192 bytes")


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert texts_of(FileSource(str(tmp_path)).rows(None)) == ["hello", "line"]


# ---------------------------------------------------------------------------------------------------- finding files


def test_files_of_a_folder_and_a_glob(tmp_path):
    write_json_lines(tmp_path / "x", TEXTS, shards=2)
    write_text_files(tmp_path / "y", ["one"])
    for ignored in ("y/notes.pdf", "x/.hidden.jsonl", ".cache/other.jsonl"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("{}")
    names = list(FileSource(str(tmp_path)).identity["files"])
    assert names == ["x/part-0.jsonl", "x/part-1.jsonl", "y/0000.txt"]
    assert list(FileSource(str(tmp_path / "**" / "*.txt")).identity["files"]) == ["0000.txt"]


def test_unusable_files_are_refused_by_name(tmp_path):
    write_parquet(tmp_path / "p", TEXTS)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "notes.pdf").write_text("%PDF")
    for dataset, field, words in [
        ("p", "content", ["--text-field content", "part-0.parquet", "text"]),
        ("p", "id", ["--text-field id", "int64"]),
        ("broken.parquet", "text", ["broken.parquet", "parquet"]),
        ("table.csv", "text", ["--text-field text", "table.csv", "only a, b"]),
        ("notes.pdf", "text", ["notes.pdf", ".jsonl", ".gz"]),
        ("missing.jsonl", "text", ["missing.jsonl"]),
        ("*.md", "text", ["*.md"]),
    ]:
        with pytest.raises(UserError) as error:
            open_source(str(tmp_path / dataset), None, None, field, tmp_path, keep=False)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- bad rows

BAD_LINES = [
    (b'{"other": "x"}', "missing"),
    (b'{"text": 5}', "int"),
    (b'{"text": null}', "NoneType"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t"}', "empty"),
    (b'{"text": "\xff\xfe"}', "UTF-8"),
    (b'{"text": "\\ud800"}', "UTF-8"),
    (b'{"text": "x"', "JSON"),
    (b'["text"]', "JSON object"),
]


def test_bad_lines_are_named_once_counted_and_skipped(tmp_path, caplog):
    lines = [b'{"text": "first"}', *(line for line, _ in BAD_LINES), b"", b'{"text": "last"}']
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    reader = Reader(FileSource(str(tmp_path)))
    for _ in range(2):
        assert [document.text for document in reader] == ["first", "last"]
    assert len(reader.bad_rows) == len(BAD_LINES)
    assert len(caplog.messages) == len(BAD_LINES)
    for message, line, (_, reason) in zip(caplog.messages, range(2, 20), BAD_LINES, strict=False):
        assert f"data.jsonl:{line}:" in message and reason in message


@pytest.mark.parametrize("open_rows", [lambda folder: FileSource(str(folder)), streamed])
def test_bad_parquet_rows_spoil_no_other(open_rows, tmp_path, caplog):
    texts = [*TEXTS[:5], b"\xff\xfe bad", None, "", *TEXTS[8:]]
    reader = Reader(open_rows(write_parquet(tmp_path, texts, shards=2, rows_per_group=10)))
    assert [document.text for document in reader] == TEXTS[:5] + TEXTS[8:]
    assert [any(f":{row}:" in message for message in caplog.messages) for row in range(5, 10)] == [False] + [
        True
    ] * 3 + [False]
    assert len(reader.bad_rows) == 3


def test_bad_text_is_named_with_its_line(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"good\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\nbad \xff\nfour")
    reader = Reader(FileSource(str(tmp_path)))
    assert [document.text for document in reader] == ["good\n"]
    assert "b.txt:1" in caplog.text and "line 3" in caplog.text


def test_many_bad_rows_do_not_flood_the_log(tmp_path, caplog):
    (tmp_path / "data.jsonl").write_text('{"text": 1}\n' * 100 + '{"text": "good"}\n')
    reader = Reader(FileSource(str(tmp_path)))
    assert len(list(reader)) == 1
    assert len(reader.bad_rows) == 100 and len(caplog.messages) == BAD_ROWS_NAMED + 1


# ---------------------------------------------------------------------------------------------------------- errors


def waits_of(reader, monkeypatch):
    waits = []
    monkeypatch.setattr(reader.stop, "wait", lambda seconds: waits.append(seconds))
    return waits


@pytest.mark.parametrize("kind", SOURCES)
def test_after_errors_every_document_is_read_once(kind, tmp_path, monkeypatch, caplog):
    source = SOURCES[kind](tmp_path)
    expected = list(Reader(source))
    failing = FailingSource(source, rows=10, failures=3)
    reader = Reader(failing, retries=3)
    waits = waits_of(reader, monkeypatch)
    documents, state = reader.read(None, 7)
    while state is not None:
        more, state = reader.read(state, 7)
        documents += more
    assert documents == expected
    assert failing.failures == 0 and failing.opened == 4
    assert len(waits) == 3 and caplog.text.count("connection lost") == 3


def test_attempts_are_bounded_and_wait_longer_each_time(tmp_path, monkeypatch):
    failing = FailingSource(SOURCES["jsonl"](tmp_path), rows=5, failures=100)
    reader = Reader(failing, retries=9, wait=0.5)
    waits = waits_of(reader, monkeypatch)
    with pytest.raises(DataError, match="after 10 attempts.*connection lost"):
        reader.read(None, 10)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60] and failing.opened == 10


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    class Refusing:
        opened = 0

        def rows(self, state):
            self.opened += 1
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Reader(source := Refusing()).read(None, 1)
    assert source.opened == 1


def test_a_reader_goes_back_where_it_is_told(tmp_path):
    reader = Reader(SOURCES["parquet"](tmp_path))
    first, state = reader.read(None, 5)
    second, _ = reader.read(state, 5)
    assert [reader.read(state, 5)[0], reader.read(None, 5)[0]] == [second, first]


def test_the_end_of_the_run_stops_a_long_search():
    class Endless:
        option = "--dataset"

        def rows(self, state):
            return (Row("not wanted", f"line:{number}") for number in itertools.count())

    reader = Reader(Endless(), keep=lambda document: False)
    threading.Timer(0.2, reader.stop.set).start()
    with pytest.raises(DataError, match="^--dataset: .*the run ends"):
        reader.read(None, 1)


def test_the_end_of_the_run_cuts_a_wait_short(tmp_path):
    reader = Reader(FailingSource(SOURCES["jsonl"](tmp_path), rows=5, failures=100), wait=50)
    reader.stop.set()
    start = time.monotonic()
    with pytest.raises(DataError):
        reader.read(None, 10)
    assert time.monotonic() - start < 5


# -------------------------------------------------------------------------------------------------------- held out


def test_the_held_out_fraction_and_its_least(tmp_path):
    texts = make_texts(2000)
    reader = Reader(FileSource(str(write_json_lines(tmp_path / "many", texts))))
    bound = held_out_below(reader, 0.1)
    assert 150 < sum(document.digest < bound for document in reader) < 250
    few = Reader(FileSource(str(write_json_lines(tmp_path / "few", texts[:30]))))
    assert sum(document.digest < held_out_below(few, 1e-9) for document in few) == 1
    one = Reader(FileSource(str(write_json_lines(tmp_path / "one", ["same", "same"], shards=1))))
    assert held_out_below(one, 1e-9) == 0


# -------------------------------------------------------------------------------------------------------- identity


def test_identity_names_what_differs(tmp_path):
    old = FileSource(str(write_json_lines(tmp_path / "a", TEXTS))).identity
    write_json_lines(tmp_path / "b", TEXTS)
    assert compare_identity(old, FileSource(str(tmp_path / "b")).identity) == []  # the same files elsewhere
    newer = {**old, "versions": {"pyarrow": "99"}}
    assert compare_identity({**old, "versions": {"pyarrow": "98"}}, newer) == [
        ("warn", "pyarrow was 98, is 99: the order of the data may differ")
    ]
    with open(tmp_path / "b" / "part-1.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    (tmp_path / "b" / "part-2.jsonl").unlink()
    differences = compare_identity(old, FileSource(str(tmp_path / "b")).identity)
    assert [severity for severity, _ in differences] == ["refuse", "refuse"]
    assert "part-1.jsonl" in differences[0][1] and "part-2.jsonl" in differences[1][1]
    off, some, others = ({**old, "held_out": bound} for bound in ("0" * 16, "051eb851eb851ec0", "0a3d70a3d70a3d80"))
    for before, now, said in [
        (some, off, "documents were kept for validation, now none are (--validation-fraction or --validation-rows"),
        (off, some, "no documents were kept for validation, now some are (--validation-fraction, --validation-rows"),
        (some, others, "other documents than before are kept for validation (--validation-fraction"),
    ]:
        ((severity, message),) = compare_identity(before, now)
        assert severity == "refuse" and message.startswith(f"held_out: {said}")
    (other,) = compare_identity(old, {**old, "text_field": "content"})
    assert other == ("refuse", "text_field was text, is content")
    # Runs begun before text files were whole documents say nothing of how they were cut.
    assert compare_identity(old, {**old, "text_files": "cut at 8192 bytes"}) == []
    assert compare_identity(old, {**old, "text_files": "whole"}) == [
        ("refuse", "text_files was cut at 8192 bytes, is whole")
    ]


@pytest.mark.parametrize("place", [0, -1, None])
def test_a_large_file_is_known_by_its_size_its_start_and_its_end(place, tmp_path):
    """Its middle is not read: that takes long, of hundreds of gigabytes."""
    content = bytearray(b"text\n" * 50_000)
    (tmp_path / "a.txt").write_bytes(content)
    before = FileSource(str(tmp_path)).identity
    if place is None:
        content[70_000:70_000] = b"more\n"
    else:
        content[place] ^= 1
    (tmp_path / "a.txt").write_bytes(content)
    ((severity, message),) = compare_identity(before, FileSource(str(tmp_path)).identity)
    assert severity == "refuse" and message.startswith("files: a.txt was 250000 bytes, ")


def test_reading_imports_no_framework(tmp_path):
    write_parquet(tmp_path, TEXTS)
    code = (
        "import sys, train.data.packing, train.data.hub\n"
        "from train.data.sources import FileSource\n"
        f"rows = list(FileSource({str(tmp_path)!r}).rows(None))\n"
        "print(len(rows), sorted({'torch', 'jax', 'flax', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(TEXTS)} []\n"


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level(logging.WARNING)
