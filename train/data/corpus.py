"""Documents of a corpus: rows of a source without the bad ones, held-out ones kept apart, read again after an error."""

from __future__ import annotations

import hashlib
import heapq
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch_ref.spec.interface import UserError
from train.data.chat import PLAIN, TextRules, text_of
from train.data.hub import open_hub
from train.data.python_docs import PYTHON_DOCS, python_docs_source
from train.data.records import Bad
from train.data.sources import FORMER_DOCUMENT_BYTES, FileSource, Row, Source, Stream, in_one_line, looks_like_hub_name

log = logging.getLogger(__name__)

BAD_ROWS_NAMED = 20
"""Bad rows named in the log; any further ones are counted only."""

LONGEST_WAIT = 60.0
"""Bound of the back-off between two attempts to read, in seconds."""

DIGEST_BITS = 64


class DataError(UserError):
    """The data cannot be read on, after all attempts. The loop saves a checkpoint and ends cleanly."""


class Document(NamedTuple):
    text: str
    place: str
    digest: int
    """64-bit hash of the text. It decides whether the document is held out, so copies fall on the same side."""
    is_chat: bool = False


def open_source(
    dataset: str, config: str | None, revision: str | None, text_field: str, folder: Path, keep: bool, **of_files: Any
) -> Source:
    """`python-docs` (kept in `folder`), a file, a folder, a glob, or else a name on the Hub. `of_files`: see
    `FileSource`."""
    if dataset == PYTHON_DOCS:
        return python_docs_source(folder / f"{PYTHON_DOCS}.jsonl", keep)
    if looks_like_hub_name(dataset) and not Path(dataset).exists():
        return open_hub(dataset, config, revision, text_field)
    return FileSource(dataset, text_field, **of_files)


class BadRows:
    """Rows without usable text: each is counted once, however often it is read, and the first ones are named."""

    def __init__(self) -> None:
        self._places: set[str] = set()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: str, reason: str) -> None:
        if place in self._places:
            return
        self._places.add(place)
        if len(self) <= BAD_ROWS_NAMED:
            log.warning("skipped %s: %s", place, reason)
        if len(self) == BAD_ROWS_NAMED:
            log.warning("further bad rows are skipped and counted, but not named")


def as_document(row: Row, rules: TextRules) -> Document | Bad:
    read = text_of(row.value, rules)
    if isinstance(read, Bad):
        return read
    value, is_chat = read
    try:
        content = value.encode() if isinstance(value, str) else value
        text = value if isinstance(value, str) else value.decode()
    except UnicodeError as error:
        line = error.object[: error.start].count(b"\n") if isinstance(value, bytes) else 0
        return Bad(f"invalid UTF-8 in line {line + 1} of it" if line else "invalid UTF-8")
    if not text.strip():
        return Bad("empty")
    digest = hashlib.blake2b(content, digest_size=DIGEST_BITS // 8).digest()
    return Document(text, row.place, int.from_bytes(digest), is_chat)


class Reader:
    """Documents of a source that `keep` accepts, read from a position and read again after an error. Its `name` is for
    messages, a `label` goes before the places of its rows.

    `retries` attempts follow a failed one, after waits that start at `wait` seconds and double.
    """

    def __init__(
        self,
        source: Source,
        keep: Callable[[Document], bool] = lambda document: True,
        bad_rows: BadRows | None = None,
        retries: int = 5,
        wait: float = 1.0,
        rules: TextRules = PLAIN,
        name: str = "",
        label: str = "",
    ):
        self.source, self.keep, self.retries, self.wait, self.rules = source, keep, retries, wait, rules
        self.name, self._label = name, label
        self.bad_rows = BadRows() if bad_rows is None else bad_rows
        self.stop = threading.Event()
        """Set from another thread, it makes the reader give up, also while it waits."""
        self._stream: Stream | None = None
        self._position: dict | None = None

    def read(self, state: dict | None, count: int) -> tuple[list[Document], dict | None]:
        """The next `count` documents from a position on, and the position after them; None: the epoch ended.

        Raises `DataError` when the attempts are used up."""
        for attempt in range(self.retries + 1):
            try:
                return self._read(state, count)
            except UserError:
                raise
            except Exception as error:
                self.close()
                if attempt == self.retries:
                    tries = f"after {attempt + 1} attempts" if attempt else "(no retries)"
                    raise DataError(f"{self.source.option}: reading failed {tries}: {in_one_line(error)}") from error
                wait = min(self.wait * 2**attempt, LONGEST_WAIT)
                log.warning(
                    "reading failed (%s); attempt %d of %d in %.3g s, from the same position",
                    in_one_line(error),
                    attempt + 2,
                    self.retries + 1,
                    wait,
                )
                if self.stop.wait(wait):
                    raise self._given_up() from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _given_up(self) -> DataError:
        return DataError(f"{self.source.option}: reading was given up, because the run ends")

    def _read(self, state: dict | None, count: int) -> tuple[list[Document], dict | None]:
        if self._stream is None or self._position != state:
            self.close()
            self._stream = self.source.rows(state)
        documents: list[Document] = []
        for row in self._stream:
            if self.stop.is_set():
                raise self._given_up()
            row = Row(row.value, self._label + row.place)
            document = as_document(row, self.rules)
            if isinstance(document, Bad):
                self.bad_rows.add(row.place, document.reason)
            elif self.keep(document):
                documents.append(document)
                if len(documents) == count:
                    self._position = self._stream.state()
                    return documents, self._position
        self.close()
        return documents, None

    def __iter__(self) -> Iterator[Document]:
        """One epoch, document by document."""
        return self.documents()

    def documents(self, together: int = 64) -> Iterator[Document]:
        """One epoch; so many documents are read together."""
        state: dict | None = None
        try:
            while True:
                documents, state = self.read(state, together)
                yield from documents
                if state is None:
                    return
        finally:
            self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._position = None


def held_out_below(documents: Iterable[Document], fraction: float) -> int:
    """The bound on a document's digest under which it is held out, so that about `fraction` of all documents are.

    Where that would hold out none (a small corpus), the bound takes the one document with the smallest digest; 0 if
    there is but one document."""
    bound = int(fraction * 2**DIGEST_BITS)
    smallest: set[int] = set()
    for document in documents:
        if document.digest < bound:
            return bound
        smallest = set(heapq.nsmallest(2, smallest | {document.digest}))
    return min(smallest) + 1 if len(smallest) == 2 else 0


def _held_out_in_words(before: str | None, now: str | None) -> str:
    """What differs between two bounds on the digests of held-out documents (see `held_out_below`)."""
    none = f"{0:016x}"
    if now == none:
        return (
            "documents were kept for validation, now none are (--validation-fraction or --validation-rows is 0; "
            "--eval-interval 0 alone turns validation off)"
        )
    if before == none:
        return "no documents were kept for validation, now some are (--validation-fraction, --validation-rows)"
    return "other documents than before are kept for validation (--validation-fraction)"


def compare_identity(old: dict, new: dict) -> list[tuple[str, str]]:
    """How the data of a checkpoint and the data at hand differ: (severity, message) pairs, none if they are the same.

    `refuse`: the rows, their order or their tokens would differ, so the stored position means nothing here.
    `warn`: only library versions differ, or the rules by which rows have text."""
    found = []
    if ("rules" in old) != ("rules" in new):
        found.append(("warn", "rows that hold a list of texts or a chat were skipped before, and are now read"))
    for key in sorted((old.keys() | new.keys()) - {"versions", "rules"}):
        before, now = old.get(key), new.get(key)
        if key == "text_files" and before is None:
            before = f"cut at {FORMER_DOCUMENT_BYTES} bytes"
        if before == now:
            continue
        if key == "held_out":
            found.append(("refuse", f"held_out: {_held_out_in_words(before, now)}"))
        elif isinstance(before, dict) and isinstance(now, dict):
            names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            for name in names[:3]:
                found.append(
                    ("refuse", f"{key}: {name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}")
                )
            if len(names) > 3:
                found.append(("refuse", f"{key}: {len(names) - 3} more differ"))
        else:
            found.append(("refuse", f"{key} was {before}, is {now}"))
    before, now = old.get("versions", {}), new.get("versions", {})
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            found.append(("warn", f"{name} was {before[name]}, is {now[name]}: the order of the data may differ"))
    return found
