"""What the data of a run are to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch_ref.spec.interface import UserError
from train.settings import Repeated, trajectory

HELD_OUT = "held-out"
"""Name of the validation on documents of the datasets themselves."""
VALIDATION_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


class Dataset(NamedTuple):
    """One of the datasets of a run."""

    name: str
    config: str | None
    revision: str | None
    text_field: str
    weight: float
    """Its share of the tokens is this over the sum of all."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Text, tokens and rows."""

    # Of several datasets, `dataset_config`, `dataset_revision` and `text_field` are one for all or one for each; an
    # empty one is none. One text stands for a tuple of it.
    #
    # Which text, in which order and as which tokens, is compared by content on resume (`Data.identity`), not by name:
    # a run may go on where its files lie elsewhere.
    dataset: Repeated = ("HuggingFaceTB/smollm-corpus",)
    """Text to train on: python-docs, files, a folder, a glob (see docs/data.md), or a Hub name. Repeat it to mix."""
    dataset_weights: tuple[float, ...] = ()
    """How many tokens of each of several datasets, relative to the others. Default: as many of each."""
    dataset_config: Repeated = ()
    """Configuration of a Hub dataset. Default: cosmopedia-v2 for smollm-corpus, none for others."""
    dataset_revision: Repeated = ()
    """Revision of a Hub dataset. Default: the newest when the run starts, kept from then on."""
    text_field: Repeated = ("text",)
    """Column, key or nested field (doc.text) that holds text, a list of texts, or a chat (messages)."""
    document_bytes: int = 0
    """Cut .txt and .md files into documents of at most so many bytes, at blank lines; 0: a file is a document."""
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"
    """A Hub name, a local folder, or bpe: byte-level, as large as the model's vocabulary, trained on the corpus."""
    seq_len: int = trajectory(2048)
    """Number of tokens in a row."""
    document_mask: bool = trajectory(False)
    """Whether a token sees its own document alone, in training and validation, or whatever is before it in its row."""
    shuffle_window: int = 2048
    """Documents that are shuffled among each other; 1 keeps their order."""
    validation_dataset: Repeated = ()
    """Files to score besides the held-out rows, with a curve of their own, as NAME=FILES. Repeat it for several."""
    validation_rows: int = 64
    """Rows at most that are scored of the held-out documents and of each validation dataset; 0 turns validation off."""
    validation_fraction: float = 0.02
    """Share of all documents that is held out and never trained on; 0: none."""
    data_retries: int = 5
    """Further attempts when text cannot be read, with growing waits, before the run saves and ends."""

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
        return named_files(self.validation_dataset)


@dataclass(frozen=True, kw_only=True)
class DataOptions(CorpusOptions):
    """What `open_data` needs to know: the settings of text, tokens and rows, and what else of the run shapes them."""

    vocab_size: int = 49152
    """The model's: the size of a trained tokenizer, and the bound of any other."""
    batch_size: int = 8
    """Rows of a batch."""
    seed: int = 0
    prefetch: int = 16
    """Batches made ahead."""
    retry_wait: float = 1.0
    """Seconds before the first of `data_retries`; doubled each time."""


def named_files(values: Sequence[str]) -> dict[str, str]:
    """`NAME=FILES` apart. Raises `UserError` for what is not that, or a name that is given twice or taken."""
    files: dict[str, str] = {}
    for value in values:
        match = VALIDATION_NAME.fullmatch(value)
        if not match or match[1] in (*files, HELD_OUT):
            raise UserError(
                f"--validation-dataset {value}: must be NAME=FILES, a name of letters, digits, . _ - for each once, "
                f"other than {HELD_OUT}"
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
