"""Documents to batches of token rows, with an exact position and a thread that works ahead.

The token stream is every training document in a shuffled order, each followed by the end-of-text token. A batch is
the next batch_size * seq_len + 1 tokens, cut into rows of seq_len inputs and their targets; the next batch begins
with the last token of this one, so each token is predicted exactly once. Attention runs across the ends of documents.

The shuffle permutes one window of documents after another, by a generator seeded with (seed, epoch, window): a
position therefore needs no buffer, only where the window starts in the source, and how far into it we are.
"""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import time
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from torch_ref.spec.interface import IGNORE, UserError
from torch_ref.spec.storage import read_json, write_whole
from train.data.chat import FORMER, ChatFormat, TextRules
from train.data.corpus import BadRows, Document, Reader, held_out_below, open_source
from train.data.sources import first_line, package_versions
from train.data.tokenizer import TRAINED, TextTokenizer, open_tokenizer

log = logging.getLogger(__name__)

ENCODE_TOGETHER = 256
"""Documents tokenized in one call: enough to keep all cores at work, few enough that a run soon has its first batch."""

PARTS_AHEAD = 2
"""Such calls at work together: at the end of one, where a core may have only one long document left, others have the
next to do."""

KEPT_FILE = "data.json"
"""In the run folder: see `Kept`."""
RULES = 2
"""2: a text file is one document, JSON arrays, lists of texts and chats are read, a README beside data is not. Runs
begun before go on by the rules they began with."""

VALIDATION_FILE = "validation.npz"
"""In the run folder: the held-out rows."""

JOIN_SECONDS = 5.0
"""How long `close` waits for a thread that is held up by the network."""


@dataclass(frozen=True)
class DataOptions:
    """What `open_data` needs to know."""

    dataset: str = "HuggingFaceTB/smollm-corpus"
    """`python-docs`, a file, folder or glob, or a name on the Hub."""
    dataset_config: str | None = None
    dataset_revision: str | None = None
    """Of a Hub dataset; None: the newest when the run starts, kept from then on."""
    text_field: str = "text"
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
    validation_rows: int = 64
    """Bound of the held-out rows; 0 holds nothing out."""
    validation_fraction: float = 0.02
    """Of all documents, never trained on; the first of them, as many as fit, are the validation rows."""
    prefetch: int = 16
    """Batches made ahead."""
    data_retries: int = 5
    """Attempts after a failed one, before the run ends."""
    retry_wait: float = 1.0
    """Seconds before the first of them; doubled each time."""


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


def document_rows(ids: list[int], seq_len: int, eot_id: int) -> Rows:
    """One document within its own boundaries: from the end-of-text token before it to that after it."""
    return rows_of([eot_id, *ids, eot_id], seq_len)


def pack(reader: Reader, tokenizer: TextTokenizer, options: DataOptions, cursor: dict | None) -> Iterator[Batch]:
    """Batches without end, epoch after epoch, from a position on. Raises `UserError` if there is no document."""
    cursor = cursor or {"epoch": 0, "window": 0, "stream": None, "document": 0, "token": 0, "carry": tokenizer.eot_id}
    tokens = np.empty(options.batch_size * options.seq_len + 1, np.int32)
    tokens[0], filled, token = cursor["carry"], 1, cursor["token"]
    places: list[str] = []
    for position, ids, place in tokenized_documents(reader, tokenizer, options, cursor):
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
                    f"--dataset {options.dataset}: no document to train on ({len(reader.bad_rows)} rows without text "
                    f"in --text-field {options.text_field}; the rest held out, see --validation-fraction)"
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


class Prefetcher:
    """Iterates over `batches` in a thread that works up to `depth` items ahead; an error in it is raised here, after
    the items before it. `close`, the end of the program, or losing the last reference ends the thread."""

    def __init__(self, batches: Iterator[Batch], depth: int, stop: threading.Event):
        self.wait_seconds = 0.0
        """Time spent waiting for an item."""
        self._end: BaseException | None = None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(depth, 1))
        thread = threading.Thread(target=_fill, args=(batches, self._queue, stop), name="data", daemon=True)
        thread.start()
        # Not a method: the thread and this would keep each other alive. It also runs at exit, where a thread still
        # inside a C++ reader can crash the interpreter.
        self._finalizer = weakref.finalize(self, _stop, stop, thread)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        if self._end is None and self._finalizer.alive:
            start = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds += time.perf_counter() - start
            if isinstance(item, Batch):
                return item
            self._end = item
        raise self._end or StopIteration

    def close(self) -> None:
        self._finalizer()


def _fill(batches: Iterator[Batch], into: queue.Queue, stop: threading.Event) -> None:
    end: BaseException = StopIteration()
    try:
        for batch in batches:
            if not _put(batch, into, stop):
                break
    except BaseException as error:
        end = error
    batches.close()
    _put(end, into, stop)


def _put(item: Batch | BaseException, into: queue.Queue, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            into.put(item, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=JOIN_SECONDS)


class Kept(NamedTuple):
    """What a run was started with. Going on with the same names, it keeps the revision and the tokenizer they had."""

    dataset: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    rules: int = 1
    """Of files and rows, see `RULES`; a file without them is of a run begun before there were others."""


class Data:
    """A corpus, tokenized: training batches from any position on, and fixed held-out rows. See `open_data`."""

    def __init__(self, options: DataOptions, folder: Path, resume: bool):
        self.options = options
        self._bad_rows = BadRows()
        kept = _read_kept(folder) if resume else Kept(rules=RULES)
        former = kept.rules < RULES
        revision = options.dataset_revision or (kept.revision if kept.dataset == options.dataset else None)
        self.source = open_source(
            options.dataset,
            options.dataset_config,
            revision,
            options.text_field,
            folder,
            keep=resume,
            document_bytes=options.document_bytes,
            former=former,
        )
        self.notes: list[str] = list(getattr(self.source, "notes", ()))
        """What the log is to say of the data."""
        keep_tokenizer = kept.tokenizer == options.tokenizer
        tokenizer = None
        if options.tokenizer != TRAINED:
            tokenizer = open_tokenizer(options.tokenizer, options.vocab_size, (), folder, keep_tokenizer)
        self.rules = FORMER if former else TextRules(tokenizer.chat if tokenizer else ChatFormat())
        first = None if former else next(iter(self._reader(lambda document: True)), None)
        chats = first is not None and first.is_chat
        if not chats:
            self.rules = self.rules._replace(chat=None)
        bound = 0
        if options.validation_rows:
            bound = held_out_below(self._reader(lambda document: True), options.validation_fraction)
            if not bound:
                self.notes.append(
                    "there is but one document, so nothing is held out for validation; --document-bytes cuts text "
                    "files into several"
                )
        self.is_training = lambda document: document.digest >= bound
        self.tokenizer = tokenizer or open_tokenizer(
            TRAINED,
            options.vocab_size,
            (document.text for document in self._reader(self.is_training)),
            folder,
            keep_tokenizer,
        )
        self.identity: dict = {
            **self.source.identity,
            "tokenizer": self.tokenizer.hash,
            "held_out": f"{bound:016x}",
            "shuffle": f"windows of {options.shuffle_window}, seed {options.seed}",
            "versions": {**self.source.identity["versions"], **package_versions("tokenizers")},
        }
        if not former:
            self.identity["rules"] = RULES
        if chats:
            self.identity["chats"] = self.rules.chat.identity
            self.notes.append(f"chats, {self.rules.chat.in_words}")
        self.validation, self.validation_bytes = self._kept_validation(bound, folder, resume)
        if not resume or not all((folder / name).exists() for name in (KEPT_FILE, "tokenizer.json")):
            self.tokenizer.save(folder)
            kept = Kept(options.dataset, self.identity.get("revision"), options.tokenizer, kept.rules)
            write_whole(folder / KEPT_FILE, (json.dumps(kept._asdict(), indent=2) + "\n").encode())

    @property
    def bad_rows(self) -> int:
        """Rows without usable text met so far."""
        return len(self._bad_rows)

    def batches(self, cursor: dict | None = None) -> Prefetcher:
        """Batches without end from a position on (None: the start), made ahead by a thread. Close it when done."""
        reader = self._reader(self.is_training)
        return Prefetcher(pack(reader, self.tokenizer, self.options, cursor), self.options.prefetch, reader.stop)

    def _reader(self, keep: Callable[[Document], bool]) -> Reader:
        return Reader(self.source, keep, self._bad_rows, self.options.data_retries, self.options.retry_wait, self.rules)

    def _kept_validation(self, bound: int, folder: Path, resume: bool) -> tuple[Rows, int]:
        """The held-out rows and their size in bytes, from the run folder or else made and kept there."""
        identity = {key: value for key, value in self.identity.items() if key != "versions"}
        made_from = json.dumps([identity, self.options.seq_len, self.options.validation_rows], sort_keys=True)
        file = folder / VALIDATION_FILE
        if resume and file.exists():
            try:
                with np.load(file) as kept:
                    if kept["made_from"] == made_from:
                        return Rows(kept["inputs"], kept["targets"]), int(kept["size"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{file}: damaged ({first_line(error)}); remove it: the rows are made again") from error
        rows, size = self._validation(bound)
        content = io.BytesIO()
        np.savez(content, inputs=rows.inputs, targets=rows.targets, size=size, made_from=made_from)
        write_whole(file, content.getvalue())
        return rows, size

    def _validation(self, bound: int) -> tuple[Rows, int]:
        """Whole held-out documents, the first ones that fit into `validation_rows`, packed end to end; and their size
        in bytes. A first document that is longer by itself is cut. End-of-text tokens are scored, and are no bytes."""
        room = self.options.validation_rows * self.options.seq_len
        tokens, size, state = [self.tokenizer.eot_id], 0, None
        reader = self._reader(lambda document: document.digest < bound)
        while bound:
            documents, state = reader.read(state, 8)
            for document in documents:
                ids = [*self.tokenizer.encode_documents([document])[0].tolist(), self.tokenizer.eot_id]
                text = document.text
                if len(ids) > room and size == 0:
                    ids, text = self.tokenizer.cut(ids, room)
                elif len(ids) > room:
                    state = None
                    break
                tokens += ids
                room -= len(ids)
                size += len(text.encode())
            if state is None:
                break
        reader.close()
        return rows_of(tokens, self.options.seq_len), size


def open_data(options: DataOptions, folder: Path, resume: bool = False) -> Data:
    """The data of a run, whose `folder` keeps what it must not lose: its tokenizer, its text if that is `python-docs`,
    and the identity of both.

    With `resume` the run goes on with what is kept there (also on another machine); without, it is made anew. Raises
    `UserError` if the data or the tokenizer can't be had."""
    return Data(options, Path(folder), resume)


def _read_kept(folder: Path) -> Kept:
    file = folder / KEPT_FILE
    try:
        return Kept(**read_json(file)) if file.exists() else Kept(rules=RULES)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it: what the data are is then looked up again") from error
