"""Rows of a dataset on the Hugging Face Hub, streamed with `datasets`.

Going on from a position is exact. It skips the shards (files) before it, and reads the shard that holds it from its
start: that is how `datasets` does it, and costs some time with large shards. Local copies of the files start at once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch_ref.spec.interface import UserError
from train.data.records import Bad, pick, text_column
from train.data.sources import Row, in_one_line, package_versions

HUB_TIMEOUT = 10.0
"""Seconds until the Hub counts as out of reach when a run starts."""

DEFAULT_CONFIGS = {"HuggingFaceTB/smollm-corpus": "cosmopedia-v2"}


def open_hub(name: str, config: str | None, revision: str | None, text_field: str) -> HubSource:
    """A dataset on the Hub, its `train` split, streamed at one revision (the newest if None).

    Raises `UserError` within seconds if there is no network or no such dataset."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    datasets.disable_progress_bars()
    # `datasets` would try 20 times, for minutes, before our own attempts from the position see an error.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 20
    try:
        found = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
    except RevisionNotFoundError as error:
        raise UserError(f"--dataset-revision {revision}: the Hub has no such revision of {name}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"--dataset {name}: there is no such file or folder, and no such dataset on the Hub") from error
    except Exception as error:
        raise UserError(
            f"--dataset {name}: there is no such file or folder, and the Hugging Face Hub can't be reached "
            f"({in_one_line(error)}); without a network give local files, or train on the Python "
            "documentation with --preset tiny"
        ) from error
    config = config or DEFAULT_CONFIGS.get(name)
    try:
        dataset = datasets.load_dataset(name, config, split="train", streaming=True, revision=found)
    except Exception as error:  # no such config or no split `train`: the message says which there are
        raise UserError(f"--dataset {name} --dataset-config {config}: {in_one_line(error)}") from error
    return HubSource(dataset, name, config, found, text_field)


class HubSource:
    """Rows of a streamed `datasets.IterableDataset`; the position is its own state, and the rows given so far."""

    option = "--dataset"

    def __init__(self, dataset: Any, name: str, config: str | None, revision: str | None, text_field: str):
        features = dataset.features
        if features is not None:
            column, _ = text_column(features.arrow_schema, text_field, name)
            dataset = dataset.select_columns([column])
        self.dataset, self.name, self.text_field = dataset, name, text_field
        self.identity = {
            "dataset": name,
            "config": config,
            "revision": revision,
            "text_field": text_field,
            "shards": dataset.num_shards,
            "versions": package_versions("datasets", "pyarrow"),
        }

    def rows(self, state: dict | None) -> HubStream:
        return HubStream(self, state)


class HubStream:
    def __init__(self, source: HubSource, state: dict | None):
        self._source = source
        self._row = state["row"] if state else 0
        self._spoiled: dict | None = None
        """The position after the last row that was not UTF-8."""
        self._open(state["datasets"] if state else None)

    def _open(self, state: dict | None) -> None:
        # A new object each time (`copy` would make one that shares its state): an IterableDataset never forgets a
        # position it was once given. Its epoch stays 0, or it would reorder the shards and ignore the position.
        self._dataset = self._source.dataset.with_format(None)
        if state:
            self._dataset.load_state_dict(state)
        self._examples = iter(self._dataset)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        field = self._source.text_field
        try:
            value = pick(next(self._examples), field)
            value = Bad(f"the field {field!r} is missing") if value is None else value
        except UnicodeDecodeError as error:  # ends the iteration, with the state already past the row of a table
            if (after := self._dataset.state_dict()) == self._spoiled:  # of a file of text or CSV: never past it
                raise OSError(f"{self._source.name}, after row {self._row}: {in_one_line(error)}") from error
            self._spoiled = after
            self._open(after)
            value = Bad("invalid UTF-8")
        self._row += 1
        return Row(value, f"{self._source.name}:{self._row}")

    def state(self) -> dict:
        return {"row": self._row, "datasets": self._dataset.state_dict()}

    def close(self) -> None:
        self._examples.close()
        del self._examples, self._dataset
        # A half-read parquet scanner is held by reference cycles, and its threads must end before the interpreter does,
        # or they abort it: https://github.com/huggingface/datasets/issues/7566.
        gc.collect()
