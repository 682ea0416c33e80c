"""Several datasets in one run, and validation datasets: shares, exact positions, what is told and kept."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from parity_tests.support.data import make_texts, write_json_lines, write_parquet, write_tokenizer
from torch_ref.spec.interface import IGNORE, UserError
from train.data.corpus import compare_identity
from train.data.feed import Kept, open_data
from train.data.options import HELD_OUT, DataOptions

TEXTS = {"a": make_texts(90, seed=1), "b": make_texts(25, seed=2), "c": make_texts(40, seed=3)}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three datasets of different sizes and kinds, with the same names of files in them."""
    folder = tmp_path_factory.mktemp("corpora")
    write_parquet(folder / "a", TEXTS["a"])
    write_json_lines(folder / "b", TEXTS["b"])
    (folder / "c").mkdir()
    lines = (json.dumps({"doc": {"body": text}}) + "\n" for text in TEXTS["c"])
    (folder / "c" / "part-0.jsonl").write_text("".join(lines))
    write_tokenizer(folder / "tokenizer", sum(TEXTS.values(), []))
    return folder


@pytest.fixture
def options(corpora):
    return DataOptions(
        dataset=[str(corpora / name) for name in "abc"],
        dataset_weights=[5, 2, 1],
        text_field=["text", "text", "doc.body"],
        tokenizer=str(corpora / "tokenizer"),
        vocab_size=320,
        seq_len=32,
        batch_size=2,
        shuffle_window=16,
        validation_rows=8,
        validation_fraction=0.1,
    )


def take(data, count, cursor=None):
    batches = data.batches(cursor)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(batches, others):
    return all(
        (one.inputs == other.inputs).all() and one.cursor == other.cursor and one.documents == other.documents
        for one, other in zip(batches, others, strict=True)
    )


def texts_in(data, rows):
    ids = rows[rows != IGNORE]
    return [data.tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]]


def test_tokens_are_shared_by_weight(options, tmp_path):
    data = open_data(options, tmp_path)
    batches = take(data, 200)
    given = batches[-1].cursor["given"]
    longest = 200
    for tokens, weight in zip(given, (5, 2, 1), strict=True):
        assert abs(tokens - sum(given) * weight / 8) < longest
    of = Counter(place.split(": ")[0][-1] for batch in batches for place in dict.fromkeys(batch.documents))
    assert of["a"] > of["b"] > of["c"] > 10
    assert [one["epoch"] for one in batches[-1].cursor["datasets"]][1] >= 2
    assert data.notes[-1].startswith("of all tokens 62.5% ") and "12.5% " in data.notes[-1]


def test_every_document_of_each_dataset_comes_once_an_epoch(options, tmp_path):
    data = open_data(options, tmp_path)
    batches = take(data, 200)
    texts = texts_in(data, np.concatenate([batch.targets.ravel() for batch in batches]))
    held_out = set(texts_in(data, data.validation.targets.ravel()))
    assert len(held_out) >= 3 and not held_out & set(texts)
    for name in "bc":
        training = [text for text in TEXTS[name] if data.is_training(document_of(text))]
        seen = [text for text in texts if text in set(TEXTS[name])]
        assert sorted(seen[: len(training)]) == sorted(training)


def document_of(text):
    from train.data.chat import PLAIN
    from train.data.corpus import as_document
    from train.data.sources import Row

    return as_document(Row(text, ""), PLAIN)


def test_stopped_anywhere_the_mixture_goes_on_the_same(options, tmp_path):
    data = open_data(options, tmp_path)
    straight = take(data, 120)
    for stop in (0, 1, 17, 50, 51, 99):
        again = open_data(options, tmp_path, resume=True)
        assert compare_identity(data.identity, again.identity) == []
        assert same(take(again, 15, json.loads(json.dumps(straight[stop].cursor))), straight[stop + 1 : stop + 16])


def test_other_weights_order_or_number_are_refused(options, tmp_path):
    data = open_data(options, tmp_path / "a")
    cursor = take(data, 1)[0].cursor

    def difference(**changes):
        other = open_data(dataclasses.replace(options, **changes), tmp_path / "b")
        return other, [message for severity, message in compare_identity(data.identity, other.identity)]

    assert "weights was 5 2 1, is 5 2 2" in difference(dataset_weights=[5, 2, 2])[1]
    assert any("dataset 1: " in message for message in difference(dataset=options.dataset[::-1], text_field="text")[1])
    alone, messages = difference(dataset=options.dataset[0], dataset_weights=(), text_field="text")
    assert messages
    with pytest.raises(UserError, match="place in the data is one in 3, not in 1"):
        alone.batches(cursor)
    with pytest.raises(UserError, match="is one in 1, not in 3"):
        data.batches(take(alone, 1)[0].cursor)


def test_a_run_of_one_dataset_is_what_it_always_was(options, tmp_path):
    one = dataclasses.replace(options, dataset=options.dataset[0], dataset_weights=(), text_field="text")
    data = open_data(one, tmp_path / "one")
    assert set(take(data, 1)[0].cursor) == {"epoch", "window", "stream", "document", "token", "carry"}
    kept = json.loads((tmp_path / "one" / "data.json").read_text())
    assert kept == {"dataset": one.dataset, "revision": None, "tokenizer": one.tokenizer, "rules": 3}
    listed = open_data(dataclasses.replace(one, dataset=[one.dataset], dataset_weights=[3.0]), tmp_path / "listed")
    assert listed.identity == data.identity and same(take(listed, 3), take(data, 3))


def test_a_revision_is_kept_for_its_own_dataset_alone():
    one, two = Kept("a", "r"), Kept(["a", "b"], ["r", None])
    assert [one.revision_of(0, "a"), one.revision_of(0, "b"), one.revision_of(1, "a")] == ["r", None, None]
    assert [two.revision_of(0, "a"), two.revision_of(1, "b"), two.revision_of(1, "a")] == ["r", None, None]
    assert Kept().revision_of(0, "a") is None


def test_a_bad_row_of_each_dataset_is_counted(options, tmp_path, caplog):
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").write_text('{"text": 5}\n{"text": "good"}\n{"text": "better"}\n')
    names = [str(tmp_path / name) for name in "xy"]
    data = open_data(dataclasses.replace(options, dataset=names, dataset_weights=(), text_field="text"), tmp_path / "r")
    assert data.bad_rows == 2 and [f"{name}: part.jsonl:1" in caplog.text for name in names] == [True, True]


# ------------------------------------------------------------------------------------------------- validation datasets


@pytest.fixture
def with_validation(options, tmp_path):
    folder = tmp_path / "corpus"
    write_json_lines(folder, TEXTS["a"], shards=2)
    (folder / "news.jsonl").write_text("".join(json.dumps({"text": f"news {text}"}) + "\n" for text in TEXTS["b"]))
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS["c"]))
    return dataclasses.replace(
        options,
        dataset=str(folder),
        dataset_weights=(),
        text_field="text",
        validation_dataset=[f"news={folder / 'news.jsonl'}", f"book={tmp_path / 'book.txt'}"],
    )


def test_validation_datasets_are_scored_apart_and_left_out(with_validation, tmp_path):
    data = open_data(with_validation, tmp_path / "run")
    assert list(data.validations) == [HELD_OUT, "news", "book"]
    assert list(data.identity["files"]) == ["part-0.jsonl", "part-1.jsonl"]
    assert "news.jsonl (for validation)" in data.notes[1]
    rows, size = data.validations["news"]
    texts = texts_in(data, rows.targets)
    assert texts == [f"news {text}" for text in TEXTS["b"]][: len(texts)] and len(rows.inputs) <= 8
    assert size == sum(len(text.encode()) for text in texts)
    book, book_size = data.validations["book"]
    assert book.inputs.shape == (8, 32) and 0 < book_size < 1000  # one document, cut
    seen = texts_in(data, np.concatenate([batch.targets.ravel() for batch in take(data, 60)]))
    assert not [text for text in seen if text.startswith("news")]


def test_without_held_out_rows_the_first_dataset_is_the_judge(with_validation, tmp_path):
    data = open_data(dataclasses.replace(with_validation, validation_fraction=0.0), tmp_path / "run")
    assert list(data.validations) == ["news", "book"] and data.identity["held_out"] == "0" * 16
    assert not [note for note in data.notes if "held out" in note]
    assert data.is_training(document_of("anything"))
    off = open_data(dataclasses.replace(with_validation, validation_rows=0), tmp_path / "off")
    assert off.validations == {}


def test_validation_datasets_may_change_and_it_is_told(with_validation, tmp_path):
    def goes_on(options):
        data = open_data(options, tmp_path / "run", resume=True)
        data.keep_scored()
        return data

    first = open_data(with_validation, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "data.json").read_text())["validation"]
    assert list(kept) == ["news", "book"]
    (tmp_path / "book.txt").write_text("another book")
    more = dataclasses.replace(
        with_validation, validation_dataset=[*with_validation.validation_dataset, f"b={tmp_path / 'book.txt'}"]
    )
    open_data(more, tmp_path / "run", resume=True)  # of a start that is then refused nothing is kept
    second = goes_on(more)
    assert compare_identity(first.identity, second.identity) == []
    assert [note for note in second.notes if "is not what it was" in note] == [
        "validation dataset book is not what it was: its curve goes on with other text"
    ]
    third = goes_on(more)
    assert not [note for note in third.notes if "is not what it was" in note]
    assert same(take(first, 5), take(third, 5))
    # What was kept of one stays while the run goes on without it.
    goes_on(dataclasses.replace(more, validation_dataset=more.validation_dataset[:1]))
    (tmp_path / "book.txt").write_text("a third book")
    fourth = goes_on(more)
    assert sum("is not what it was" in note for note in fourth.notes) == 2


def test_training_on_a_validation_document_is_told_once(with_validation, tmp_path, caplog):
    copies = [f"news {text}" for text in TEXTS["b"][:5]] + make_texts(50, seed=9)
    write_json_lines(tmp_path / "corpus", copies, shards=1)
    data = open_data(with_validation, tmp_path / "run")
    caplog.clear()
    take(data, 50)
    assert caplog.text.count("is trained on, and in a validation dataset too") == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("{}/missing.txt", "--validation-dataset {}/missing.txt: there is no file there"),
        ("{}/utf16.jsonl", "--validation-dataset: {}/utf16.jsonl is UTF-16"),
        ("{}/empty.jsonl", "--validation-dataset n: no text in it"),
        ("{}/corpus", "/corpus: all of it is in a --validation-dataset"),
    ],
)
def test_unusable_validation_datasets_are_refused(files, said, with_validation, tmp_path):
    (tmp_path / "utf16.jsonl").write_bytes('{"text": "x"}'.encode("utf-16"))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError) as error:
        changed = dataclasses.replace(with_validation, validation_dataset=[f"n={files.format(tmp_path)}"])
        open_data(changed, tmp_path / "run")
    assert said.format(tmp_path) in str(error.value)
