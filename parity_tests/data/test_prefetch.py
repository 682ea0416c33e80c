"""The thread that works ahead: errors in their place, bounded work, and an end when nobody waits for it."""

import dataclasses
import gc
import itertools
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from parity_tests.support.data import (
    FailingSource,
    hashes,
    make_texts,
    take,
)
from train.data.corpus import DataError
from train.data.packing import Batch
from train.data.prefetch import Prefetcher

# ----------------------------------------------------------------------------------------------------------- errors


def test_after_a_lasting_error_the_run_can_go_on_later(make_data):
    data = make_data(data_retries=2, validation_rows=0)
    straight = take(data, 60)
    healthy = data.corpora[0].source
    data.corpora[0].source = FailingSource(healthy, rows=40, failures=3, lasting=True)
    batches = data.batches()
    got = []
    with pytest.raises(DataError, match="after 3 attempts"):
        for batch in batches:
            got.append(batch)
    assert len(got) > 5
    with pytest.raises(DataError):
        next(batches)
    data.corpora[0].source = healthy
    got += take(data, 60 - len(got), got[-1].cursor)
    assert hashes(got) == hashes(straight)


def test_short_failures_change_nothing(make_data, caplog):
    data = make_data(data_retries=2)
    straight = take(data, 60)
    data.corpora[0].source = FailingSource(data.corpora[0].source, rows=25, failures=5)
    assert hashes(take(data, 60)) == hashes(straight)
    assert data.corpora[0].source.failures == 0 and caplog.text.count("connection lost") == 5


# ------------------------------------------------------------------------------------------------- working ahead


def batch_of(number):
    return Batch(np.full((1, 1), number, np.int32), np.zeros((1, 1), np.int32), {"number": number})


def test_an_error_comes_after_the_batches_before_it():
    def failing():
        yield from map(batch_of, range(3))
        raise RuntimeError("broken")

    batches = Prefetcher(failing(), 10, threading.Event())
    assert [next(batches).cursor["number"] for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            next(batches)


def test_the_thread_works_ahead_but_not_without_bound():
    made = []
    endless = (made.append(number) or batch_of(number) for number in itertools.count())
    batches = Prefetcher(endless, 3, threading.Event())
    time.sleep(0.3)
    assert 3 <= len(made) <= 5
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 1
    with pytest.raises(StopIteration):
        next(batches)


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data"]


def test_no_thread_outlives_its_batches(make_data):
    data = make_data()
    before = len(data_threads())
    batches = data.batches()
    next(batches)
    assert len(data_threads()) == before + 1
    del batches
    gc.collect()
    assert len(data_threads()) == before


def test_closing_cuts_the_wait_before_another_attempt_short(make_data):
    data = make_data(retry_wait=60.0, validation_rows=0)
    data.corpora[0].source = FailingSource(data.corpora[0].source, rows=0, failures=1)
    batches = data.batches()
    time.sleep(0.2)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 2 and not data_threads()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("parquet", ""),
        ("datasets", ""),
        ("datasets", "raise SystemExit(3)"),
        ("parquet", "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"),
    ],
)
def test_a_process_ends_at_once_after_a_half_read_stream(kind, ending, make_data):
    """The stream is not closed: the interpreter is left to do it."""
    data = make_data(kind, texts=make_texts(2000))
    code = f"""
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
from pathlib import Path
from parity_tests.support.data import streamed
from train.data.feed import open_data
from train.data.options import DataOptions
corpus = Path({data.options.dataset!r})
data = open_data(DataOptions(**{dataclasses.asdict(data.options)!r}), corpus.parent / "run", resume=True)
if {kind!r} == "datasets":
    data.corpora[0].source = streamed(corpus)
batches = data.batches()
next(batches), next(batches)
print(time.time())
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    ended = time.time() - float(done.stdout)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3}.get(ending, -2)
    assert ending.startswith("os.kill") or done.stderr == ""
    assert ended < 15


@pytest.mark.slow
def test_packing_keeps_up_with_the_bare_tokenizer(make_data):
    """Reading, tokenizing and packing in the thread, from the first batch to the end of the third epoch, against the
    tokenizer's own call for all texts at once; medians of 5."""
    texts = make_texts(3000, longest=1200)
    data = make_data(texts=texts, validation_rows=0, seq_len=512, batch_size=8, shuffle_window=2048)
    bare, packed = [], []
    for _ in range(5):
        start = time.perf_counter()
        tokens = sum(map(len, data.tokenizer.encode_batch(texts)))
        bare.append(tokens / (time.perf_counter() - start))
        with closing(data.batches()) as batches:
            next(batches)
            start, count = time.perf_counter(), 0
            for batch in batches:
                if batch.cursor["epoch"] == 3:
                    break
                count += batch.inputs.size
            packed.append(count / (time.perf_counter() - start))
    assert sorted(packed)[2] >= 0.9 * sorted(bare)[2]
