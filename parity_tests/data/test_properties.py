"""Whatever the documents, the sizes and the interruptions: no token is lost, doubled or moved."""

import bz2
import csv
import gzip
import io
import itertools
import json
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.chat import PLAIN
from train.data.corpus import Reader
from train.data.options import DataOptions
from train.data.packing import pack, rows_of
from train.data.sources import FileSource, Row
from train.data.tokenizer import text_pieces

END = 0
FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)
"""The same examples each time. 1,500 of each passed when they were written."""


@dataclass
class ListSource:
    """Rows in memory."""

    texts: list[str]

    def __post_init__(self):
        self.identity, self.option = {"text_field": "text"}, "--dataset"

    def rows(self, state):
        return ListStream(self.texts, state["row"] if state else 0)


class ListStream:
    def __init__(self, texts, row):
        self._texts, self._row = texts, row

    def __iter__(self):
        return self

    def __next__(self):
        if self._row == len(self._texts):
            raise StopIteration
        self._row += 1
        return Row(self._texts[self._row - 1], f"row:{self._row}")

    def state(self):
        return {"row": self._row}

    def close(self):
        pass


class Bytes:
    """A token for each byte, and one for the end."""

    eot_id = END

    @staticmethod
    def encode_documents(documents):
        return [np.frombuffer(document.text.encode(), np.uint8).astype(np.int32) + 1 for document in documents]


DOCUMENTS = st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=12)
DATASETS = st.lists(st.tuples(DOCUMENTS, st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3)
SIZES = {"seq_len": st.integers(1, 9), "batch_size": st.integers(1, 3), "window": st.integers(1, 14)}


def feed(datasets, seq_len, batch_size, window, cursor=None):
    options = DataOptions(
        dataset=["x"] * len(datasets),
        dataset_weights=[weight for _, weight in datasets],
        seq_len=seq_len,
        batch_size=batch_size,
        shuffle_window=window,
    )
    readers = [Reader(ListSource(texts), rules=PLAIN, label=f"{n}/") for n, (texts, _) in enumerate(datasets)]
    return pack(readers, Bytes(), options, cursor)


def take(count, *arguments):
    with closing(feed(*arguments)) as batches:
        return list(itertools.islice(batches, count))


@FAST
@given(datasets=DATASETS, stops=st.lists(st.integers(1, 12), max_size=4), **SIZES)
def test_any_interruptions_change_nothing(datasets, stops, seq_len, batch_size, window):
    straight = take(sum(stops) + 3, datasets, seq_len, batch_size, window)
    joined, cursor = [], None
    for count in [*stops, 3]:
        joined += take(count, datasets, seq_len, batch_size, window, cursor)
        cursor = json.loads(json.dumps(joined[-1].cursor))
    for one, other in zip(straight, joined, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.targets, other.targets)
        assert one.cursor == other.cursor and one.documents == other.documents


@FAST
@given(texts=DOCUMENTS, **SIZES)
def test_an_epoch_is_every_token_once(texts, seq_len, batch_size, window):
    tokens = sum(len(text.encode()) + 1 for text in texts)
    count = -(-2 * tokens // (seq_len * batch_size))
    batches = take(count, [(texts, 1.0)], seq_len, batch_size, window)
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    inputs = np.concatenate([batch.inputs.ravel() for batch in batches])
    assert inputs[0] == END
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    for epoch in (targets[:tokens], targets[tokens : 2 * tokens]):
        ends = np.flatnonzero(epoch == END)
        parts = [bytes((part[:-1] - 1).astype(np.uint8)).decode() for part in np.split(epoch, ends + 1)[:-1]]
        assert Counter(parts) == Counter(texts)


@FAST
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    **SIZES,
)
def test_no_dataset_gets_ahead_of_its_share_by_more_than_a_document(lengths, weights, seq_len, batch_size, window):
    letters = "xyz"
    datasets = [
        ([letters[number] * length for length in of_one], weights[number]) for number, of_one in enumerate(lengths)
    ]
    batches = take(60, datasets, seq_len, batch_size, window)
    tokens = np.concatenate([batch.targets.ravel() for batch in batches])
    ends = np.flatnonzero(tokens == END)
    whole = np.split(tokens, ends + 1)[:-1]
    given_tokens = [sum(len(part) for part in whole if part[0] == ord(letter) + 1) for letter in letters]
    for number, (texts, weight) in enumerate(datasets):
        longest = max(map(len, texts)) + 1
        share = sum(given_tokens) * weight / sum(weights[: len(datasets)])
        assert given_tokens[number] <= share + longest


@FAST
@given(tokens=st.lists(st.integers(0, 99), min_size=2, max_size=60), seq_len=st.integers(1, 9))
def test_rows_predict_each_token_but_the_first_once(tokens, seq_len):
    inputs, targets = (part.ravel() for part in rows_of(tokens, seq_len))
    scored = targets >= 0
    assert targets[scored].tolist() == tokens[1:] and inputs[: len(tokens) - 1].tolist() == tokens[:-1]
    assert scored.sum() == len(tokens) - 1 and scored[: len(tokens) - 1].all()


@FAST
@given(text=st.text(st.sampled_from("ab \n\n漢"), max_size=200))
def test_pieces_of_a_text_are_the_text(text):
    from train.data import tokenizer

    before, tokenizer.PIECE = tokenizer.PIECE, 16
    try:
        pieces = text_pieces(text)
    finally:
        tokenizer.PIECE = before
    assert "".join(pieces) == text and all(0 < len(piece) <= 16 for piece in pieces[:-1])


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def csv_rows(texts):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", "text"), *((7, text) for text in texts)])
    return file.getvalue().encode()


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), file, row_group_size=3)
    return file.getvalue()


KINDS = {
    "jsonl": json_lines,
    "jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    "json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    "csv": csv_rows,
    "csv.bz2": lambda texts: bz2.compress(csv_rows(texts)),
    "parquet": parquet,
}


@FAST
@given(
    files=st.lists(
        st.tuples(st.sampled_from(sorted(KINDS)), st.lists(st.text(st.characters(codec="utf-8")), max_size=8)),
        min_size=1,
        max_size=3,
    ),
    stops=st.lists(st.integers(1, 5), max_size=5),
)
def test_rows_of_any_files_whatever_they_hold_and_wherever_one_stops(files, stops):
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, texts) in enumerate(files):
            Path(folder, f"{number}.{kind}").write_bytes(KINDS[kind](texts))
        source = FileSource(f"{folder}/*")
        rows, state = [], None
        for count in [*stops, None]:
            stream = source.rows(state)
            rows += itertools.islice(stream, count)
            state = json.loads(json.dumps(stream.state()))
            stream.close()
    values = [row.value.decode() if isinstance(row.value, bytes) else row.value for row in rows]
    assert values == [text for _, texts in files for text in texts]
