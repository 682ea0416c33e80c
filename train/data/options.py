"""What the data of a run are to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_ref.spec.interface import UserError

VALIDATION_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


class Dataset(NamedTuple):
    """One of the datasets of a run."""

    name: str
    config: str | None
    revision: str | None
    text_field: str
    weight: float
    """Its share of the tokens is this over the sum of all."""


@dataclass(frozen=True)
class DataOptions:
    """What `open_data` needs to know. Of several datasets, `dataset_config`, `dataset_revision` and `text_field` are
    one for all or one for each; an empty one is none."""

    dataset: str | Sequence[str] = "HuggingFaceTB/smollm-corpus"
    """`python-docs`, a file, folder or glob, or a name on the Hub; or several of these."""
    dataset_weights: Sequence[float] = ()
    """How many tokens of each, relative to the others; empty: as many of each."""
    dataset_config: str | Sequence[str] | None = None
    dataset_revision: str | Sequence[str] | None = None
    """Of a Hub dataset; None: the newest when the run starts, kept from then on."""
    text_field: str | Sequence[str] = "text"
    document_bytes: int = 0
    """Text files are cut into documents of at most so many bytes; 0: each is one."""
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"
    """A folder, a name on the Hub, or `bpe`: trained on the corpus."""
    vocab_size: int = 49152
    """The model's: the size of a trained tokenizer, and the bound of any other."""
    seq_len: int = 2048
    batch_size: int = 8
    """Rows of a batch."""
    seed: int = 0
    shuffle_window: int = 2048
    """Documents shuffled together; 1 keeps the order of the source."""
    validation_datasets: Sequence[str] = ()
    """`NAME=FILES`: scored apart from the held-out rows, and not left out of them."""
    validation_rows: int = 64
    """Bound of the rows of each validation; 0 holds nothing out."""
    validation_fraction: float = 0.02
    """Of all documents, never trained on; the first of them, as many as fit, are the validation rows. 0: none."""
    prefetch: int = 16
    """Batches made ahead."""
    data_retries: int = 5
    """Attempts after a failed one, before the run ends."""
    retry_wait: float = 1.0
    """Seconds before the first of them; doubled each time."""

    def datasets(self) -> list[Dataset]:
        """Raises `UserError` naming the option whose values do not fit the number of datasets."""
        names = _listed(self.dataset)
        if not names:
            raise UserError("--dataset: name at least one")
        weights = self.dataset_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise UserError(f"--dataset-weights: {len(weights)} for {len(names)} --dataset; give one for each")
        if min(weights) <= 0 or not sum(weights) < float("inf"):
            raise UserError(f"--dataset-weights {' '.join(map(str, weights))}: each must be a number above 0")
        options = {
            "--dataset-config": self.dataset_config,
            "--dataset-revision": self.dataset_revision,
            "--text-field": self.text_field,
        }
        each = [_one_for_each(flag, _listed(values), len(names)) for flag, values in options.items()]
        return [Dataset(*values) for values in zip(names, *each, weights, strict=True)]

    def validation_files(self) -> dict[str, str]:
        """Files by name. Raises `UserError` where one is not `NAME=FILES`."""
        return named_files(self.validation_datasets)


def named_files(values: Sequence[str]) -> dict[str, str]:
    """`NAME=FILES` apart. Raises `UserError` for what is not that, or a name given twice."""
    files: dict[str, str] = {}
    for value in values:
        match = VALIDATION_NAME.fullmatch(value)
        if not match or match[1] in files:
            raise UserError(
                f"--validation-dataset {value}: must be NAME=FILES, a name of letters, digits, . _ - for each once"
            )
        files[match[1]] = match[2]
    return files


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or ())


def _one_for_each(flag: str, values: list[str], count: int) -> list[str | None]:
    if len(values) not in (0, 1, count):
        raise UserError(f"{flag}: {len(values)} for {count} --dataset; give one for all or one for each")
    values = values or [""]
    return [value or None for value in (values if len(values) == count else values * count)]
