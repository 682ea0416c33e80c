"""Small corpora behind a tokenizer, as a run opens them."""

import pytest

from parity_tests.support.data import make_texts, streamed, write_json_lines, write_parquet, write_tokenizer
from train.data.feed import open_data
from train.data.options import DataOptions

TEXTS = make_texts(120)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEXTS)


@pytest.fixture(scope="module")
def make_data(tokenizer_folder, tmp_path_factory):
    """Data of the texts above in small files; windows of 16 documents, batches of 2 rows of 32 tokens."""

    def make(kind="parquet", texts=TEXTS, **changes):
        folder = tmp_path_factory.mktemp("data")
        (write_json_lines if kind == "jsonl" else write_parquet)(folder / "corpus", texts)
        settings = {
            "dataset": str(folder / "corpus"),
            "tokenizer": str(tokenizer_folder),
            "vocab_size": 320,
            "seq_len": 32,
            "batch_size": 2,
            "shuffle_window": 16,
            "validation_rows": 8,
            "validation_fraction": 0.1,
            "retry_wait": 0.001,
            "prefetch": 4,
        }
        data = open_data(DataOptions(**{**settings, **changes}), folder / "run")
        if kind == "datasets":
            data.corpora[0].source = streamed(folder / "corpus")
        return data

    return make
