"""Batches: each token predicted once, exact positions, shuffling, held-out rows."""

import dataclasses
import itertools
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from parity_tests.support.data import (
    hashes,
    make_texts,
    take,
    write_json_lines,
    write_tokenizer,
)
from torch_ref.spec.interface import IGNORE, UserError
from train.data.corpus import Reader, compare_identity
from train.data.feed import open_data, take_along
from train.data.options import DataOptions
from train.data.packing import document_rows, pack

TEXTS = make_texts(120)
KINDS = ["parquet", "jsonl", "datasets"]


def position(batch):
    """Its cursor; of the state that `datasets` keeps (how far from where it last resumed), the row only."""
    stream = batch.cursor["stream"] or {}
    return {**batch.cursor, "stream": {name: stream[name] for name in stream if name != "datasets"}}


def epochs_of(data, count):
    """The batches of the first epochs, up to the one that begins the next."""
    batches = data.batches()
    taken = list(itertools.takewhile(lambda batch: batch.cursor["epoch"] < count, batches))
    batches.close()
    return taken


def documents_in(data, batches):
    """Texts of the documents whose end lies in these batches; the first lacks what came before them."""
    ids = np.concatenate([batch.targets.ravel() for batch in batches])
    ends = np.flatnonzero(ids == data.tokenizer.eot_id)
    return [data.tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]


def training_texts(data):
    return [document.text for document in Reader(data.corpora[0].source) if data.is_training(document)]


# ----------------------------------------------------------------------------------------------------------- rows


def test_rows_go_on_and_each_token_is_predicted_once(make_data):
    batches = take(make_data(), 20)
    inputs = np.concatenate([batch.inputs.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert batches[0].inputs.shape == batches[0].targets.shape == (2, 32)
    assert batches[0].inputs.dtype == batches[0].targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[1:], targets[:-1])


def test_documents_are_whole_and_end_in_a_scored_end_of_text(make_data):
    data = make_data()
    batches = take(data, 20)
    assert set(documents_in(data, batches)) <= set(TEXTS)
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert (targets == data.tokenizer.eot_id).sum() > 20 and (targets != IGNORE).all()
    assert batches[0].inputs[0, 0] == data.tokenizer.eot_id


def test_the_tokens_do_not_depend_on_the_batch_size(make_data):
    streams = []
    for size in (1, 2, 3, 6):
        batches = take(make_data(batch_size=size), 60 // size)
        streams.append(np.concatenate([batch.inputs.ravel() for batch in batches]))
    for stream in streams[1:]:
        np.testing.assert_array_equal(stream, streams[0])


# ------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_twice_the_batches_are_those_of_a_straight_run(kind, make_data):
    """Over two epoch ends, stopping inside row groups, windows and documents."""
    data = make_data(kind)
    straight = take(data, 150)
    assert straight[-1].cursor["epoch"] >= 2
    for first, second in [(1, 1), (10, 10), (37, 51), (64, 17)]:
        cursor, batches = None, []
        for count in (first, second, 150 - first - second):
            batches += take(data, count, json.loads(json.dumps(cursor)))
            cursor = batches[-1].cursor
        assert hashes(batches) == hashes(straight)
        assert [position(batch) for batch in batches] == [position(batch) for batch in straight]


@pytest.mark.parametrize("seq_len", [7, 32])
def test_every_position_gives_the_next_batch(seq_len, make_data):
    data = make_data(seq_len=seq_len, texts=TEXTS[:40])
    straight = take(data, 160)
    assert straight[-2].cursor["epoch"] >= 1
    reader = Reader(data.corpora[0].source, data.is_training)
    for batch, expected in itertools.pairwise(straight):
        following = next(pack([reader], data.tokenizer, data.options, batch.cursor))
        assert hashes([following]) == hashes([expected]) and following.cursor == expected.cursor


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_visits_every_document_once(kind, make_data):
    data = make_data(kind)
    expected = Counter(training_texts(data))
    batches = epochs_of(data, 3)
    stop = next(number for number, batch in enumerate(batches) if batch.cursor["epoch"] == 1) + 5
    resumed = batches[:stop] + take(data, len(batches) - stop, batches[stop - 1].cursor)
    for run in (batches, resumed):
        texts = documents_in(data, run)
        for epoch in range(2):
            assert Counter(texts[epoch * expected.total() : (epoch + 1) * expected.total()]) == expected
        places = Counter(itertools.chain.from_iterable(dict.fromkeys(batch.documents) for batch in run))
        assert len(places) == expected.total()


def test_batches_say_which_documents_they_hold(make_data):
    data = make_data()
    places = {document.text: document.place for document in Reader(data.corpora[0].source)}
    batch = take(data, 1)[0]
    assert [places[text] for text in documents_in(data, [batch])] == list(batch.documents)[: len(batch.documents) - 1]


# -------------------------------------------------------------------------------------------------------- shuffling


def test_windows_are_shuffled_by_seed_epoch_and_number(make_data):
    data = make_data(validation_rows=0)
    texts = documents_in(data, epochs_of(data, 2))
    windows = [slice(start, start + 16) for start in (0, 16, 32)]
    orders = set()
    for epoch in (texts[:120], texts[120:]):
        for window in windows:
            assert sorted(epoch[window]) == sorted(TEXTS[window])
            orders.add(tuple(TEXTS[window].index(text) for text in epoch[window]))
    assert len(orders) == 6 and tuple(range(16)) not in orders
    other = make_data(validation_rows=0, seed=1)
    assert documents_in(other, take(other, 20)) != documents_in(data, take(data, 20))


def test_a_window_of_one_keeps_the_order(make_data):
    data = make_data(validation_rows=0, shuffle_window=1)
    assert documents_in(data, epochs_of(data, 1)) == TEXTS[: len(documents_in(data, epochs_of(data, 1)))]
    assert len(documents_in(data, epochs_of(data, 2))) >= 2 * len(TEXTS) - 3


# -------------------------------------------------------------------------------------------------------- validation


def scored_texts(data):
    ids = data.validation.targets[data.validation.targets != IGNORE]
    ends = np.flatnonzero(ids == data.tokenizer.eot_id)
    return [data.tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_documents_are_never_trained_on(kind, make_data):
    data = make_data(kind)
    held_out = scored_texts(data)
    assert 3 <= len(held_out) and set(held_out) <= set(TEXTS)
    batches = epochs_of(data, 2)
    stop = len(batches) // 3
    batches += take(data, len(batches), batches[stop].cursor)
    assert not set(held_out) & set(documents_in(data, batches))


def test_copies_of_a_held_out_document_are_held_out(make_data):
    data = make_data(texts=TEXTS + TEXTS, validation_rows=1000)
    assert set(Counter(scored_texts(data)).values()) == {2}
    assert not set(scored_texts(data)) & set(training_texts(data))


def test_validation_rows_are_bounded_whole_documents(make_data):
    for bound in (3, 8, 1000):
        data = make_data(validation_rows=bound, validation_fraction=0.3)
        inputs, targets = data.validation
        assert inputs.shape == targets.shape == (len(inputs), 32) and len(inputs) <= bound
        assert data.validation_bytes == sum(len(text.encode()) for text in scored_texts(data))
        scored = targets != IGNORE
        assert scored[:-1].all() and np.diff(scored[-1].astype(int)).max(initial=0) <= 0
        np.testing.assert_array_equal(inputs.ravel()[1:][scored.ravel()[1:]], targets.ravel()[:-1][scored.ravel()[1:]])
    assert len(scored_texts(data)) == len(TEXTS) - len(training_texts(data))
    assert int(data.identity["held_out"], 16) == int(0.3 * 2**64)


def test_a_long_first_document_is_cut_at_a_character(make_data):
    texts = ["漢字🙂 " * 500 + str(number) for number in range(4)]
    data = make_data(texts=texts, validation_rows=2, validation_fraction=0.5)
    ids = data.validation.targets[data.validation.targets != IGNORE].tolist()
    assert len(data.validation.targets) == 2 and 60 <= len(ids) <= 64
    text = data.tokenizer.decode(ids)
    assert texts[0].startswith(text) and data.validation_bytes == len(text.encode())


def test_no_validation(make_data):
    data = make_data(validation_rows=0)
    assert data.validation.inputs.shape == (0, 32) and data.validation_bytes == 0
    assert sorted(training_texts(data)) == sorted(TEXTS)


def test_a_document_alone(make_data):
    tokenizer = make_data().tokenizer
    ids = tokenizer.encode(TEXTS[0])[:9]
    inputs, targets = document_rows(ids, 4, tokenizer.eot_id)
    assert inputs.shape == (3, 4)
    assert inputs.ravel()[:10].tolist() == [0, *ids] and targets.ravel()[:10].tolist() == [*ids, 0]
    assert targets.ravel()[10:].tolist() == [IGNORE, IGNORE]


def test_a_long_document_is_not_a_list_of_numbers():
    """A text of 300 MB has some 75 million tokens: as Python's numbers they take gigabytes."""
    ids = np.zeros(500_000, np.int32)
    tracemalloc.start()
    document_rows(ids, 64, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 24 * ids.size


# -------------------------------------------------------------------------------------------------- opening, resuming


def test_a_run_goes_on_with_what_its_folder_keeps(make_data, tmp_path):
    """Elsewhere: the tokenizer's folder is gone, the corpus lies in another place."""
    texts, run = make_texts(60), tmp_path / "run"
    write_tokenizer(tmp_path / "tokenizer", texts)
    write_json_lines(tmp_path / "here", texts)
    options = dataclasses.replace(
        make_data().options, dataset=str(tmp_path / "here"), tokenizer=str(tmp_path / "tokenizer")
    )
    first = open_data(options, run)
    straight = take(first, 12)
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    (tmp_path / "here").rename(tmp_path / "there")
    second = open_data(dataclasses.replace(options, dataset=str(tmp_path / "there")), run, resume=True)
    assert compare_identity(first.identity, second.identity) == []
    np.testing.assert_array_equal(second.validation.inputs, first.validation.inputs)
    assert second.validation_bytes == first.validation_bytes
    assert hashes(take(second, 5, straight[6].cursor)) == hashes(straight[7:])


def test_a_run_that_goes_on_from_another_takes_its_data_along(tmp_path):
    """What cannot be had again: the documentation of its Python, the tokenizer trained on it, the rules of its time."""
    options = DataOptions(dataset="python-docs", tokenizer="bpe", vocab_size=300, seq_len=32, batch_size=2)
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (run / "python-docs.jsonl").write_text(lines)
    kept = {"dataset": "python-docs", "revision": None, "tokenizer": "bpe"}  # as runs once wrote it: without rules
    (run / "data.json").write_text(json.dumps(kept))
    first = open_data(options, run, resume=True)
    straight = take(first, 6)
    assert "rules" not in first.identity
    other.mkdir()
    (other / "data.json").write_text("{}")  # of a start that was refused
    assert take_along(run, other) and not take_along(tmp_path, tmp_path / "third")
    files = {"data.json", "python-docs.jsonl", "tokenizer.json", "tokenizer_config.json", "validation.npz"}
    assert {file.name for file in run.iterdir()} == {file.name for file in other.iterdir()} == files
    assert all((other / name).read_bytes() == (run / name).read_bytes() for name in files)
    second = open_data(options, other, resume=True)
    assert compare_identity(first.identity, second.identity) == []
    assert hashes(take(second, 2, straight[3].cursor)) == hashes(straight[4:])


def test_other_data_is_told_from_the_identity(make_data):
    data = make_data()
    for change, named in [
        ({"seed": 1}, "shuffle"),
        ({"shuffle_window": 8}, "shuffle"),
        ({"validation_rows": 0}, "held_out"),
    ]:
        (difference,) = compare_identity(data.identity, make_data(**change).identity)
        assert difference[0] == "refuse" and difference[1].startswith(named)
    assert compare_identity(data.identity, make_data(batch_size=1, prefetch=1).identity) == []
    differences = compare_identity(data.identity, make_data(tokenizer="bpe").identity)
    assert [message.split()[0] for _, message in differences] == ["tokenizer"]


def test_what_judges_a_state_is_told_by_its_rows(make_data):
    data = make_data()
    assert data.judged_by.startswith("held-out ") and data.judged_by == make_data(batch_size=1).judged_by
    assert make_data(validation_rows=1).judged_by not in (data.judged_by, None)
    assert make_data(validation_rows=0).judged_by is None


def test_validation_rows_are_made_anew_where_what_they_are_made_of_changes(make_data, tmp_path):
    """A run may go on with it, if it was told to (`--allow-changed-settings`)."""
    options, run = make_data().options, tmp_path / "run"
    others = str(write_json_lines(tmp_path / "others", make_texts(60, seed=5)))
    for number, change in enumerate(({"validation_rows": 2}, {"seq_len": 16}, {"dataset": others})):
        changed = dataclasses.replace(options, **change)
        before, after, anew = (
            open_data(*arguments).validation.inputs
            for arguments in ((options, run), (changed, run, True), (changed, tmp_path / str(number)))
        )
        np.testing.assert_array_equal(after, anew)
        assert not np.array_equal(after, before)


def test_what_a_run_keeps_of_its_data_may_be_gone_or_of_another_tokenizer(make_data, tmp_path):
    options = make_data().options
    first = open_data(options, tmp_path)
    (tmp_path / "data.json").unlink()
    assert open_data(options, tmp_path, resume=True).identity == first.identity, "by the rules of now, as it began"
    other = open_data(dataclasses.replace(options, tokenizer="bpe"), tmp_path, resume=True)
    assert [said.split()[0] for _, said in compare_identity(first.identity, other.identity)] == ["tokenizer"]


def test_a_corpus_without_documents_is_refused(make_data, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"content": "x"}\n' * 3)
    options = dataclasses.replace(make_data().options, dataset=str(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match="no document to train on \\(3 rows without text in --text-field text"):
        take(open_data(options, tmp_path), 1)


def test_the_default_corpus_with_a_trained_tokenizer(tmp_path):
    options = DataOptions(dataset="python-docs", tokenizer="bpe", vocab_size=512, seq_len=128, batch_size=4)
    data = open_data(options, tmp_path)
    assert data.tokenizer.vocab_size == 512 and data.bad_rows == 0 and len(data.validation.inputs) > 20
    batch = take(data, 3)[-1]
    again = open_data(options, tmp_path, resume=True)
    assert again.identity == data.identity
    assert hashes(take(again, 1, batch.cursor)) == hashes(take(data, 4)[3:])
