"""Documents to batches of token rows, with an exact position.

The token stream is every training document in a shuffled order, each followed by the end-of-text token. A batch is
the next batch_size * seq_len + 1 tokens, cut into rows of seq_len inputs and their targets; the next batch begins
with the last token of this one, so each token is predicted exactly once. Attention runs across the ends of documents,
unless `--document-mask` keeps it within them.

The shuffle permutes one window of documents after another, by a generator seeded with (seed, epoch, window): a
position therefore needs no buffer, only where the window starts in the source, and how far into it we are.

Of several datasets, the next document is of the one that is the furthest behind its share of the tokens. The position
is then one in each, and how many tokens each gave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from torch_ref.spec.interface import IGNORE, UserError
from train.data.corpus import Document, Reader
from train.data.options import DataOptions
from train.data.tokenizer import TextTokenizer

ENCODE_TOGETHER = 256
"""Documents tokenized in one call: enough to keep all cores at work, few enough that a run soon has its first batch."""

PARTS_AHEAD = 2
"""Such calls at work together: at the end of one, where a core may have only one long document left, others have the
next to do."""

BEGIN = {"epoch": 0, "window": 0, "stream": None, "document": 0}
"""The position of a dataset's first document."""


@dataclass(frozen=True)
class Batch:
    inputs: Int32[np.ndarray, "batch seq"]
    targets: Int32[np.ndarray, "batch seq"]
    """The token after each input."""
    cursor: dict
    """The position after this batch: going on from it gives the next one."""
    documents: tuple[str, ...] = field(repr=False, default=())
    """Where the documents stand (file and line) that have targets in this batch, in order."""


class Rows(NamedTuple):
    """Token rows to score. Only the last one can be padded: with targets `IGNORE`."""

    inputs: Int32[np.ndarray, "rows seq"]
    targets: Int32[np.ndarray, "rows seq"]


def rows_of(tokens: Sequence[int], seq_len: int) -> Rows:
    """Rows that predict each token but the first once, each from at most the `seq_len` tokens before it in its row."""
    count = -(-(len(tokens) - 1) // seq_len)
    inputs = np.zeros((count, seq_len), np.int32)
    targets = np.full((count, seq_len), IGNORE, np.int32)
    inputs.flat[: len(tokens) - 1] = tokens[:-1]
    targets.flat[: len(tokens) - 1] = tokens[1:]
    return Rows(inputs, targets)


def document_rows(ids: Sequence[int], seq_len: int, eot_id: int) -> Rows:
    """One document within its own boundaries: from the end-of-text token before it to that after it."""
    return rows_of(np.pad(np.asarray(ids, np.int32), 1, constant_values=eot_id), seq_len)


def pack(
    readers: Sequence[Reader], tokenizer: TextTokenizer, options: DataOptions, cursor: dict | None
) -> Iterator[Batch]:
    """Batches without end, epoch after epoch, from a position on; one reader for each dataset. Raises `UserError` if
    one has no document."""
    cursor = cursor or {**_first_position(len(readers)), "token": 0, "carry": tokenizer.eot_id}
    tokens = np.empty(options.batch_size * options.seq_len + 1, np.int32)
    tokens[0], filled, token = cursor["carry"], 1, cursor["token"]
    places: list[str] = []
    with closing(mixed(readers, tokenizer, options, cursor)) as documents:
        for position, ids, place in documents:
            while token < len(ids):
                taken = min(len(ids) - token, tokens.size - filled)
                tokens[filled : filled + taken] = ids[token : token + taken]
                token, filled = token + taken, filled + taken
                places.append(place)
                if filled == tokens.size:
                    yield Batch(
                        inputs=tokens[:-1].reshape(options.batch_size, options.seq_len).copy(),
                        targets=tokens[1:].reshape(options.batch_size, options.seq_len).copy(),
                        cursor={**position, "token": token, "carry": int(tokens[-1])},
                        documents=tuple(places),
                    )
                    tokens[0], filled, places = tokens[-1], 1, []
            token = 0


def _first_position(datasets: int) -> dict:
    return dict(BEGIN) if datasets == 1 else {"datasets": [dict(BEGIN)] * datasets, "given": [0] * datasets}


def require_fit(cursor: dict, datasets: int) -> None:
    """Raises `UserError` if a position is one in another number of datasets."""
    of = len(cursor.get("datasets", [cursor]))
    if of != datasets:
        raise UserError(
            f"--dataset: the checkpoint's place in the data is one in {of}, not in {datasets}; go on with the former, "
            "or start from its weights with --init-from"
        )


def mixed(
    readers: Sequence[Reader], tokenizer: TextTokenizer, options: DataOptions, cursor: dict
) -> Iterator[tuple[dict, Int32[np.ndarray, " tokens"], str]]:
    """(position, ids with the end-of-text token, place) of each document, from the cursor's on: of one dataset, or of
    several, each time of that which gave the fewest tokens for its weight."""
    if len(readers) == 1:
        yield from tokenized_documents(readers[0], tokenizer, options, cursor)
    weights = [dataset.weight for dataset in options.datasets()]
    positions, given = list(cursor["datasets"]), list(cursor["given"])
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(tokenized_documents(reader, tokenizer, options, position)))
            for reader, position in zip(readers, positions, strict=True)
        ]
        while True:
            number = min(range(len(streams)), key=lambda one: given[one] / weights[one])
            position, ids, place = next(streams[number])
            positions[number] = position
            yield {"datasets": list(positions), "given": list(given)}, ids, place
            given[number] += len(ids)
            positions[number] = {**position, "document": position["document"] + 1}


class Part(NamedTuple):
    """Neighbouring documents of one shuffled window, tokenized in one call."""

    epoch: int
    window: int
    stream: dict | None
    """Where the window starts in the source."""
    first: int
    """Place of the first document in the window."""
    documents: list[Document]


def tokenized_documents(
    reader: Reader, tokenizer: TextTokenizer, options: DataOptions, cursor: dict
) -> Iterator[tuple[dict, Int32[np.ndarray, " tokens"], str]]:
    """(position, ids with the end-of-text token, place) of each document, shuffled, from the cursor's document on."""
    with closing(tokenized(read_parts(reader, options, cursor), tokenizer)) as parts:
        for part, encoded in parts:
            for number, (document, ids) in enumerate(zip(part.documents, encoded, strict=True), part.first):
                position = {"epoch": part.epoch, "window": part.window, "stream": part.stream, "document": number}
                yield position, np.append(ids, np.int32(tokenizer.eot_id)), document.place


def read_parts(reader: Reader, options: DataOptions, cursor: dict) -> Iterator[Part]:
    """The documents from the cursor's on, window after window and epoch after epoch, without end."""
    epoch, window, stream, start = (cursor[name] for name in ("epoch", "window", "stream", "document"))
    try:
        while True:
            documents, next_stream = reader.read(stream, options.shuffle_window)
            if not documents and window == 0:
                raise UserError(
                    f"--dataset {reader.name}: no document to train on ({len(reader.bad_rows)} rows without text "
                    f"in --text-field {reader.source.identity['text_field']}; the rest held out, see "
                    "--validation-fraction)"
                )
            documents = shuffled(documents, options.seed, epoch, window)
            for first in range(start, len(documents), ENCODE_TOGETHER):
                yield Part(epoch, window, stream, first, documents[first : first + ENCODE_TOGETHER])
            start, stream = 0, next_stream
            epoch, window = (epoch, window + 1) if stream is not None else (epoch + 1, 0)
    finally:
        reader.close()


def tokenized(parts: Iterator[Part], tokenizer: TextTokenizer) -> Iterator[tuple[Part, list[np.ndarray]]]:
    """Each part with its documents' ids. While one is used, the next are read and tokenized; an error in reading is
    raised after the parts before it."""
    pending: deque[tuple[Part, Future]] = deque()
    failure: Exception | None = None
    with closing(parts), ThreadPoolExecutor(PARTS_AHEAD) as pool:
        while True:
            while failure is None and len(pending) <= PARTS_AHEAD:
                try:
                    part = next(parts)
                except Exception as error:
                    failure = error
                else:
                    pending.append((part, pool.submit(tokenizer.encode_documents, part.documents)))
            if not pending:
                raise failure
            part, encoded = pending.popleft()
            yield part, encoded.result()


def shuffled(documents: list[Document], seed: int, epoch: int, window: int) -> list[Document]:
    # RandomState, because NumPy promises that its streams never change; those of a Generator may, with any version.
    generator = np.random.RandomState(np.random.PCG64((seed, epoch, window)))
    return [documents[i] for i in generator.permutation(len(documents))]
