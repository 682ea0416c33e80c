"""Every kind of file: the same texts out of each, exact positions, and what happens to bad ones."""

import bz2
import csv
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import random

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from parity_tests.support.data import make_texts
from torch_ref.spec.interface import UserError
from train.data.corpus import Reader
from train.data.formats import array_elements, foreign_encoding
from train.data.sources import FileSource

STRANGE = ['quotes " and, commas', "a\u2028b\u2029c\x85d", "two\nlines\n\nblank", "tab\there", " x ", "漢字 🙂"]
TEXTS = [*STRANGE, *make_texts(30)]


def json_lines(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def json_array(texts, indent=None):
    return json.dumps([{"id": 1.5, "text": text, "more": [1, {}]} for text in texts], indent=indent).encode()


def separated(texts, delimiter):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([("id", "text"), *((1, text) for text in texts)])
    return file.getvalue().encode()


def arrow_file(texts, stream=False):
    table, file = pyarrow.table({"id": range(len(texts)), "text": texts}), io.BytesIO()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def feather(texts):
    file = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.table({"text": texts}), file, chunksize=5)
    return file.getvalue()


def zstd(content):
    """Two frames, as tools that compress in parallel write."""
    half = len(content) // 2
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def two_members(content):
    return gzip.compress(content[:100]) + gzip.compress(content[100:])


KINDS = {
    "a.jsonl": json_lines,
    "a.json": json_array,
    "pretty.json": lambda texts: json_array(texts, indent=2),
    "lines.json": json_lines,
    "a.ndjson.gz": lambda texts: two_members(json_lines(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(json_lines(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(json_lines(texts)),
    "a.jsonl.zst": lambda texts: zstd(json_lines(texts)),
    "a.JSON.gz": lambda texts: gzip.compress(json_array(texts)),
    "a.csv": lambda texts: separated(texts, ","),
    "a.tsv.zst": lambda texts: zstd(separated(texts, "\t")),
    "a.arrow": arrow_file,
    "stream.arrow": lambda texts: arrow_file(texts, stream=True),
    "a.feather": feather,
}


def source_of(folder, name, content, field="text", **settings):
    (folder / name).write_bytes(content)
    return FileSource(str(folder / name), field, **settings)


def texts_of(source, **settings):
    return [document.text for document in Reader(source, **settings)]


@pytest.mark.parametrize("name", KINDS)
def test_the_texts_of_every_kind_from_every_position(name, tmp_path):
    source = source_of(tmp_path, name, KINDS[name](TEXTS))
    stream = source.rows(None)
    states, rows = [stream.state()], []
    for row in stream:
        rows.append(row)
        states.append(json.loads(json.dumps(stream.state())))
    assert texts_of(source) == TEXTS
    assert len({row.place for row in rows}) == len(rows)
    for count, state in enumerate(states):
        assert list(source.rows(state)) == rows[count:]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md.zst", "a.txt.bz2", "a.txt.xz"])
@pytest.mark.parametrize("size", [0, 60])
def test_text_files_whole_and_cut_from_every_position(name, size, tmp_path):
    text = "\n\n".join(TEXTS)
    compress = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
    content = compress.get(name[name.rindex(".") :], bytes)(text.encode())
    source = source_of(tmp_path, name, content, document_bytes=size)
    stream, states = source.rows(None), []
    rows = [row for row in stream if states.append(stream.state()) is None]
    assert b"".join(row.value for row in rows).decode() == text
    assert len(rows) == 1 if not size else len(rows) > 20 and max(len(row.value) for row in rows) <= size
    for count, state in enumerate(states, 1):
        assert list(source.rows(state)) == rows[count:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_too_long_is_a_bad_row_from_every_position(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("train.data.formats.LONGEST_LINE", 20)
    content = json_lines(["one", "x" * 100, "three"])
    source = source_of(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    assert texts_of(source) == ["one", "three"]
    assert caplog.messages == [f"skipped {name}:2: a line of 113 bytes, more than 0 MiB"]
    stream, states = source.rows(None), []
    rows = [row for row in stream if states.append(stream.state()) is None]
    for count, state in enumerate(states, 1):
        assert list(source.rows(state)) == rows[count:]


def test_a_text_that_unpacks_to_too_much_is_a_bad_row(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("train.data.formats.LONGEST_TEXT", 20)
    for name, text in (("a.txt.gz", "x" * 21), ("b.txt.gz", "y" * 20)):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    source = FileSource(str(tmp_path))
    assert texts_of(source) == ["y" * 20]
    stream = source.rows(None)
    next(stream)
    (following,) = source.rows(stream.state())
    assert following.value == b"y" * 20  # and the bad row is not told of again by a run that goes on
    (message,) = caplog.messages
    assert message.startswith("skipped a.txt.gz:1: unpacks to more than 0 MiB, too long for one document")


def test_going_on_late_in_a_large_compressed_file(tmp_path):
    texts = [str(number) * 700_000 for number in range(5)]
    source = source_of(tmp_path, "a.jsonl.gz", gzip.compress(json_lines(texts), 1))
    stream = source.rows(None)
    assert [next(stream).value for _ in range(4)] == texts[:4]
    assert [row.value for row in source.rows(stream.state())] == texts[4:]


def test_an_array_in_chunks_of_any_size():
    values = [{"text": text} for text in TEXTS] + [12, 3.5e2, "x", None, [1, [2]]]
    for chunk in (1, 2, 7, 64, 10**6):
        for indent in (None, 1):
            assert list(array_elements(io.StringIO(json.dumps(values, indent=indent)), chunk)) == values
    assert list(array_elements(io.StringIO(" [ ]" + " \n" * 9), 3)) == []


# -------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("name", "content", "texts", "said"),
    [
        ("a.json", b'[{"text": "one"}, {"other": 2}, 7, {"text": "\xff"}, {"text": "five"}]', ["one", "five"], [
            "a.json:2: the field 'text' is missing", "a.json:3: not a JSON object", "a.json:4: invalid UTF-8"]),
        ("a.json", b'[{"text": "one"}, {"text": "two"', ["one"], ["a.json:2: not JSON from here on: the rest of the"]),
        ("a.json", b'[{"text": "one"}]\n\n[{"text": "two"}]', ["one"], ["a.json:2: behind the end of the array"]),
        ("a.json", b'[{"text": "one"}, {text: 2}, {"text": "three"}]', ["one"], ["a.json:2: not JSON from here on"]),
        ("a.csv", b'id,text\n1,one\n2\n3,"thr"ee\n4,\xff\n\n5,"f\nive"\n6,six\n', ["one", "f\nive", "six"], [
            "a.csv:3: 1 cells, not 2", "a.csv:4: not well-formed, lines 4 to 4", "a.csv:5: invalid UTF-8"]),
        ("a.csv", b'\xef\xbb\xbftext,id\none,1\n"never\nclosed,2\n', ["one"], [
            "a.csv:3: not well-formed, lines 3 to 4"]),
        ("a.csv", b'\xef\xbb\xbf"text","id"\n"one",1\n"two\n",2\n3\n', ["one", "two\n"], ["a.csv:5: 1 cells, not 2"]),
        ("a.txt", "schön".encode("utf-16"), [], ["a.txt:1: UTF-16, not UTF-8: convert it (iconv"]),
        ("a.txt", "schoen".encode("utf-16-le"), [], ["a.txt:1: UTF-16, not UTF-8"]),
        ("a.txt", "schön".encode("latin-1"), [], ["a.txt:1: invalid UTF-8"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_spoil_no_other(name, content, texts, said, tmp_path, caplog):
    source = source_of(tmp_path, name, content)
    assert texts_of(source) == texts
    assert len(caplog.messages) == len(said)
    for message, words in zip(caplog.messages, said, strict=True):
        assert words in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl is UTF-16, not UTF-8: convert it"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-be"), "UTF-16"),
        ("a.csv", "text\nx\n".encode("utf-32"), "UTF-32"),
        ("a.jsonl.gz", gzip.compress('{"text": "x"}\n'.encode("utf-16"), mtime=0), "UTF-16"),  # the same in all workers
        ("a.json", b'{\n  "text": "x"\n}\n', "one JSON object over several lines; give an array of objects"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "a.jsonl.gz can't be read as jsonl.gz: BadGzipFile"),
        ("a.txt.zst", b"text", "can't be read as txt.zst"),
        ("a.arrow", b"text", "can't be read as arrow"),
        ("a.csv", b"id,body\n1,x\n", "--text-field text: "),
        ("a.csv", b"id;text\n1;x\n", "only id;text"),
        ("a.csv", b'"id,text\n1,x\n', "--validation-dataset: "),
    ],
)
def test_files_that_cannot_be_rows_are_refused_with_the_cause(name, content, said, tmp_path):
    with pytest.raises(UserError) as error:
        source_of(tmp_path, name, content, option="--validation-dataset")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.jsonl"])
def test_a_file_that_may_not_be_read_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"text")

    def refuse(file, *arguments):  # root may read every file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    said = f"--data: .*{name} can't be read as {name.removeprefix('a.')}: PermissionError"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr("builtins.open", refuse)
        FileSource(str(tmp_path / name), option="--data")


def test_nor_by_a_run_that_goes_on_by_former_rules(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"text")

    def refuse(file, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="a.txt: Permission denied"):
        patch.setattr("builtins.open", refuse)
        FileSource(str(tmp_path / "a.txt"), former=True)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_compressed_file_that_ends_early_is_an_error_that_names_it(compress, tmp_path):
    noise = json_lines([str(random.Random(number).random()) * 20 for number in range(5000)])
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}.get(compress, "zst")
    content = compress(noise)
    source = source_of(tmp_path, f"a.jsonl.{suffix}", content[: len(content) * 9 // 10], option="--data")
    with pytest.raises(UserError, match=f"^--data: reading failed .*a.jsonl.{suffix}: "):
        texts_of(source, retries=0)


def test_other_encodings_are_told_from_utf8():
    for text in ("plain text", "schöne Grüße", "漢字かな", "\x00 with a zero", "a\0b" * 20, ""):
        assert foreign_encoding(text.encode()) is None
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        assert foreign_encoding("plain text".encode(encoding)) == "UTF-16"
    assert foreign_encoding("漢字".encode("utf-16")) == "UTF-16"
    assert foreign_encoding("漢字".encode("utf-32")) == "UTF-32"


# -------------------------------------------------------------------------------------------- nested fields and lists


RECORDS = [
    {"doc": {"text": "one", "parts": ["a", "b"]}, "pages": [{"body": "p"}, {"body": "q"}]},
    {"doc": {"text": "two", "parts": []}, "pages": []},
    {"doc": {"text": None, "parts": ["c"]}, "pages": [{"body": None}]},
    {"doc": None, "pages": None},
]
FIELDS = {
    "doc.text": ["one", "two"],
    "doc.parts": ["a\n\nb", "c"],
    "pages.body": ["p\n\nq"],
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "hub"])
@pytest.mark.parametrize("field", FIELDS)
def test_nested_fields_and_lists_of_texts(kind, field, tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS)
    file = tmp_path / f"a.{'parquet' if kind == 'hub' else kind}"
    if kind in ("parquet", "hub"):
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    elif kind == "arrow":
        pyarrow.feather.write_feather(table, str(file), chunksize=2)
    else:
        lines = [json.dumps(record) for record in RECORDS]
        file.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    if kind == "hub":
        from parity_tests.support.data import streamed

        source = streamed(tmp_path, field)
    else:
        source = FileSource(str(file), field)
    assert texts_of(source) == FIELDS[field]


def test_a_key_with_a_dot_is_itself(tmp_path):
    source = source_of(tmp_path, "a.jsonl", b'{"doc.text": "whole", "doc": {"text": "nested"}}\n', "doc.text")
    assert texts_of(source) == ["whole"]
    pyarrow.parquet.write_table(pyarrow.table({"doc.text": ["whole"], "text": ["other"]}), tmp_path / "a.parquet")
    assert texts_of(FileSource(str(tmp_path / "a.parquet"), "doc.text")) == ["whole"]


@pytest.mark.parametrize("field", ["doc", "doc.number", "doc.missing", "numbers", "number.text"])
def test_columns_without_text_are_refused(field, tmp_path):
    table = pyarrow.table({"doc": [{"text": "x", "number": 1}], "numbers": [[1, 2]], "number": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"--text-field {field}: "):
        FileSource(str(tmp_path / "a.parquet"), field)


def test_bad_utf8_in_a_nested_field_spoils_its_row_only(tmp_path):
    texts = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"doc": pyarrow.StructArray.from_arrays([texts], ["text"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts_of(FileSource(str(tmp_path / "a.parquet"), "doc.text")) == ["one", "three"]


def test_rows_of_a_former_run_stay_what_they_were(tmp_path):
    """Arrays line by line, lists skipped: positions of runs begun then count so."""
    (tmp_path / "a.json").write_text('[{"text": "x"},\n{"text": "y"}\n]\n{"text": "z"}')
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.csv").write_text("text\nx\n")
    (tmp_path / "README.md").write_text("about")
    source = FileSource(str(tmp_path), former=True)
    assert list(source.identity) == ["dataset", "text_field", "files", "versions"]
    assert list(source.identity["files"]) == ["README.md", "a.json", "b.txt"]
    assert texts_of(source) == ["about", "y", "z", "text"]
    assert texts_of(FileSource(str(tmp_path))) == ["x", "y", "text", "x"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.arrow", "a.csv", "a.json"])
def test_stopping_in_the_middle_of_a_file_leaves_it_closed(name, tmp_path):
    source = source_of(tmp_path, name, KINDS[name](TEXTS))
    before = len(os.listdir("/proc/self/fd"))
    stream = source.rows(None)
    rows = list(itertools.islice(stream, 3))
    assert len(rows) == 3 and len(os.listdir("/proc/self/fd")) > before
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before
