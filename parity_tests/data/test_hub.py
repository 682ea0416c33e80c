"""Text that no file of the user holds: the documentation of the Python at hand, and datasets streamed from the Hub."""

import ast
import itertools
import json
import logging
import os
import subprocess
import sys
import time

import pytest

from parity_tests.support.data import (
    LocalHub,
    local_hub,
    make_texts,
    streamed,
    texts_of,
    write_parquet,
)
from torch_ref.spec.interface import UserError
from train.data.corpus import Reader
from train.data.feed import open_data
from train.data.hub import HubSource
from train.data.options import DataOptions
from train.data.python_docs import python_docs_source
from train.data.records import Bad
from train.data.sources import FileSource

# ----------------------------------------------------------------------------------------------------- python-docs

TEXTS = make_texts(47)


@pytest.fixture(scope="module")
def python_docs(tmp_path_factory):
    return python_docs_source(tmp_path_factory.mktemp("docs") / "python-docs.jsonl")


def test_python_docs_are_megabytes_of_text(python_docs):
    reader = Reader(python_docs)
    documents = list(reader)
    assert 1.5e6 < sum(len(document.text) for document in documents) < 4e6
    assert len(documents) > 300 and len(reader.bad_rows) == 0
    everything = "\n".join(document.text for document in documents)
    assert "json.decoder.JSONDecoder" in everything and "Simple JSON <https://json.org> decoder" in everything
    assert python_docs.identity["dataset"] == "python-docs"


def test_python_docs_do_not_depend_on_the_process(python_docs, tmp_path):
    file = tmp_path / "python-docs.jsonl"
    code = f"from pathlib import Path; from train.data.python_docs import *; python_docs_source(Path({str(file)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert file.read_bytes() == python_docs.files[0].read_bytes()


def test_a_run_keeps_its_python_docs(tmp_path):
    file = tmp_path / "python-docs.jsonl"
    file.write_text('{"text": "of another Python"}\n')
    assert texts_of(python_docs_source(file, keep=True).rows(None)) == ["of another Python"]


# --------------------------------------------------------------------------------------------------------- the Hub


def run_with_hub(endpoint, home, code):
    """In a process of its own, because the Hub's libraries read their settings when imported: (output, seconds)."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONWARNINGS": "error"}
    environment.pop("HF_HUB_OFFLINE", None)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - start


OPEN = """
import sys
from pathlib import Path
from torch_ref.spec.interface import UserError
from train.data.corpus import Reader, open_source
try:
    source = open_source(*{arguments}, "text", Path("."), keep=False)
except UserError as error:
    sys.exit(print(error))
"""


def test_without_a_network_one_line_says_so_at_once(tmp_path):
    code = OPEN.format(arguments=("HuggingFaceTB/smollm-corpus", None, None))
    output, seconds = run_with_hub("http://127.0.0.1:9", tmp_path, code)
    assert output.count("\n") == 1 and "can't be reached" in output and "--preset tiny" in output
    assert "--dataset HuggingFaceTB/smollm-corpus: there is no such file or folder, and" in output and seconds < 30


def test_a_name_that_is_nowhere(tmp_path):
    with local_hub({}) as hub:
        output, _ = run_with_hub(hub.endpoint, tmp_path, OPEN.format(arguments=("owner/wrong", None, None)))
    assert output.count("\n") == 1 and "owner/wrong" in output and "no such dataset on the Hub" in output


README = """---
configs:
- config_name: small
  data_files: [{split: train, path: "data/part-*"}]
- config_name: other
  data_files: [{split: train, path: "data/part-0*"}]
---
"""


@pytest.fixture
def hub(tmp_path):
    folder = write_parquet(tmp_path / "data", TEXTS)
    files = {f"data/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    with local_hub({"README.md": README.encode(), **files}) as hub:
        yield hub


def test_a_hub_dataset_is_streamed_at_one_revision(hub, tmp_path):
    code = OPEN.format(arguments=("owner/data", "small", None)) + (
        "print(source.identity['revision'], source.identity['shards'])\n"
        "stream = source.rows(None)\n"
        "texts = [next(stream).value for _ in range(20)]\n"
        "state = stream.state()\n"
        "stream.close()\n"
        "print(texts + [row.value for row in source.rows(state)])"
    )
    output, _ = run_with_hub(hub.endpoint, tmp_path / "home", code)
    assert output.splitlines() == [f"{LocalHub.REVISION} 3", str(TEXTS)]


def test_a_hub_config_that_is_missing_is_named(hub, tmp_path):
    output, _ = run_with_hub(hub.endpoint, tmp_path / "home", OPEN.format(arguments=("owner/data", "large", None)))
    assert output.count("\n") == 1 and "--dataset-config large" in output


def test_a_hub_that_fails_in_the_middle(hub, tmp_path):
    """Reads after the third are refused: what came before is given, then the attempts are used up."""
    hub.refused_after = 3
    code = OPEN.format(arguments=("owner/data", "small", None)) + (
        "reader = Reader(source, retries=2, wait=0.01)\n"
        "documents, state = reader.read(None, 10)\n"
        "print(len(documents))\n"
        "try:\n"
        "    print(reader.read(state, 100))\n"
        "except UserError as error:\n"
        "    print(type(error).__name__, error)"
    )
    output, _ = run_with_hub(hub.endpoint, tmp_path / "home", code)
    first, last = output.splitlines()
    assert first == "10" and last.startswith("DataError --dataset: reading failed after 3 attempts") and "403" in last


@pytest.mark.parametrize("fault", ["429", "500", "drops", "stalls", "truncates"])
def test_a_hub_with_short_failures_loses_and_doubles_no_row(fault, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")
    hub.faults = {2: fault, 5: fault}
    code = OPEN.format(arguments=("owner/data", "small", None)) + (
        "import datasets\n"
        "datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0\n"
        "reader, texts, state = Reader(source, retries=5, wait=0.01), [], None\n"
        "while True:\n"
        "    documents, state = reader.read(state, 7)\n"
        "    texts += [document.text for document in documents]\n"
        "    if state is None:\n"
        "        break\n"
        "print(texts)"
    )
    output, _ = run_with_hub(hub.endpoint, tmp_path / "home", code)
    assert output.strip() == str(TEXTS) and hub.reads > 5


def test_a_dataset_that_changes_meanwhile_is_read_at_its_revision(hub, tmp_path):
    """The Hub has a newer commit when the run goes on; its rows are those of the one it began with."""
    code = OPEN.format(arguments=("owner/data", "small", LocalHub.REVISION)) + (
        "stream = source.rows({state})\n"
        "texts = [row.value for _, row in zip(range({count}), stream)]\n"
        "print([texts, stream.state(), source.identity['revision']])"
    )
    (first, state, _) = ast.literal_eval(
        run_with_hub(hub.endpoint, tmp_path / "home", code.format(state=None, count=20))[0]
    )
    hub.newest = "6" * 40
    (rest, _, revision) = ast.literal_eval(
        run_with_hub(hub.endpoint, tmp_path / "home", code.format(state=state, count=99))[0]
    )
    assert first + rest == TEXTS and revision == LocalHub.REVISION


def test_a_run_goes_on_at_the_revision_that_it_began_with(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    asked = []

    def open_hub(name, config, revision, text_field):
        asked.append(revision)
        source = FileSource(str(tmp_path / "a.jsonl"), text_field)
        source.identity |= {"dataset": name, "revision": revision or LocalHub.REVISION}
        return source

    monkeypatch.setattr("train.data.corpus.open_hub", open_hub)
    options = DataOptions(dataset="owner/data", tokenizer="bpe", vocab_size=300, seq_len=32, batch_size=2)
    for resume in (False, True):
        open_data(options, tmp_path / "run", resume)
    assert asked == [None, LocalHub.REVISION]


def test_a_hub_column_that_is_not_text(tmp_path):
    write_parquet(tmp_path, TEXTS)
    for field in ("id", "content"):
        with pytest.raises(UserError, match=f"--text-field {field}"):
            streamed(tmp_path, field)


def test_rows_of_a_hub_dataset_without_a_schema(tmp_path):
    import datasets

    def records():
        yield {"text": "one"}
        yield {"other": 2}
        yield {"text": "three"}

    source = HubSource(datasets.IterableDataset.from_generator(records), "owner/data", None, None, "text")
    assert [row.value for row in source.rows(None)] == ["one", Bad("the field 'text' is missing"), "three"]


@pytest.mark.parametrize("kind", ["text", "csv"])
def test_a_file_that_datasets_cannot_read_past_is_an_error(kind, tmp_path):
    """It is not met again and again, without end."""
    import datasets

    for name, end in (("a", b""), ("b", b"bad \xff\n")):
        (tmp_path / name).write_bytes(b"text\none\ntwo\n" + end)
    files = [str(tmp_path / name) for name in "ab"]
    dataset = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    read = []
    with pytest.raises(OSError, match="owner/data, after row [34]: UnicodeDecodeError"):
        for row in itertools.islice(HubSource(dataset, "owner/data", None, None, "text").rows(None), 10):
            read.append(row.value)
    assert read[-3:] == ["one", "two", Bad("invalid UTF-8")]


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level(logging.WARNING)
