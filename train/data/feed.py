"""The data of a run: its datasets, its tokenizer, training batches from any position on, and rows to validate on."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import read_json, write_whole
from train.data.chat import FORMER, PLAIN, ChatFormat, TextRules
from train.data.corpus import BadRows, Document, Reader, held_out_below, open_source
from train.data.files import KEPT_FILE
from train.data.options import HELD_OUT, DataOptions
from train.data.packing import Rows, pack, require_fit, rows_of
from train.data.prefetch import Prefetcher
from train.data.python_docs import PYTHON_DOCS
from train.data.sources import FileSource, Source, in_one_line, package_versions
from train.data.tokenizer import CONFIG_FILE, TRAINED, TextTokenizer, open_tokenizer

log = logging.getLogger(__name__)

RULES, WHOLE_TEXTS = 3, 2
"""2: a text file is one document, JSON arrays, lists of texts and chats are read, a README beside data is not.
3: logs of runs in the folder are not read. Runs begun before go on by the rules they began with."""

LOOKED_AT = 1000
"""Chats that `--document-mask` looks at before a run begins: the first may be of one turn."""

VALIDATION_FILE = "validation.npz"
"""In the run folder: the held-out rows."""


class Kept(NamedTuple):
    """What a run was started with. Going on with the same names, it keeps the revisions and the tokenizer they had."""

    dataset: str | list[str] | None = None
    revision: str | list[str | None] | None = None
    tokenizer: str | None = None
    rules: int = 1
    """Of files and rows, see `RULES`; a file without them is of a run begun before there were others."""
    validation: dict[str, str] | None = None
    """A hash of each validation dataset's rows."""

    def revision_of(self, number: int, dataset: str) -> str | None:
        names, revisions = _listed(self.dataset), _listed(self.revision)
        return revisions[number] if names[number : number + 1] == [dataset] and revisions else None


class Validation(NamedTuple):
    rows: Rows
    bytes: int
    """Of the documents whose tokens the rows score, in UTF-8. End-of-text tokens are scored, and are none."""


@dataclass
class Corpus:
    """One of a run's datasets, open."""

    name: str
    source: Source
    rules: TextRules = PLAIN
    label: str = ""
    """Before the places of its rows, where there are several."""
    chats: bool = False


class Data:
    """Datasets, tokenized: training batches from any position on, and fixed rows to validate on. See `open_data`.

    `validations` has them by name; the first one decides which state is the best. `validation` and `validation_bytes`
    are those held out."""

    def __init__(self, options: DataOptions, folder: Path, resume: bool):
        self.options = options
        self._bad_rows = BadRows()
        kept = _read_kept(folder) if resume else Kept(rules=RULES)
        self.notes: list[str] = []
        """What the log is to say of the data."""
        own = self._open_validation()
        self.corpora = self._open_datasets(kept, folder, resume, own)
        keep_tokenizer = kept.tokenizer == options.tokenizer
        tokenizer = None
        if options.tokenizer != TRAINED:
            tokenizer = open_tokenizer(options.tokenizer, options.vocab_size, (), folder, keep_tokenizer)
        for corpus in [*self.corpora, *own]:
            self._choose_rules(corpus, tokenizer, kept.rules < WHOLE_TEXTS, resume)

        bound = 0
        if options.validation_rows and options.validation_fraction:
            bound = held_out_below(self._all_documents(lambda document: True), options.validation_fraction)
            if not bound:
                self.notes.append(
                    "there is but one document, so nothing is held out for validation; --document-bytes cuts text "
                    "files into several"
                )
        self.is_training: Callable[[Document], bool] = lambda document: document.digest >= bound
        texts = (document.text for document in self._all_documents(self.is_training))
        self.tokenizer: TextTokenizer = tokenizer or open_tokenizer(
            TRAINED, options.vocab_size, texts, folder, keep_tokenizer
        )
        self.identity = self._identity(bound, kept.rules)
        self.validations: dict[str, Validation] = {}
        self.validation, self.validation_bytes = self._kept_held_out(bound, folder, resume)
        if len(self.validation.inputs):
            self.validations[HELD_OUT] = Validation(self.validation, self.validation_bytes)
        self._own_validation(own)
        self._keep(kept, folder, resume)

    @property
    def bad_rows(self) -> int:
        """Rows without usable text met so far."""
        return len(self._bad_rows)

    @property
    def judged_by(self) -> str | None:
        """The name and a hash of the rows that decide which state is the best; None if there are none."""
        return next((f"{name} {_hash_of(validation.rows)}" for name, validation in self.validations.items()), None)

    @property
    def scored(self) -> dict[str, str]:
        """A hash of the rows of each validation, by name."""
        return {name: _hash_of(validation.rows) for name, validation in self.validations.items()}

    def batches(self, cursor: dict | None = None) -> Prefetcher:
        """Batches without end from a position on (None: the start), made ahead by a thread. Close it when done."""
        if cursor:
            require_fit(cursor, len(self.corpora))
        stop = threading.Event()
        readers = [self._reader(corpus, self.is_training) for corpus in self.corpora]
        for reader in readers:
            reader.stop = stop
        return Prefetcher(pack(readers, self.tokenizer, self.options, cursor), self.options.prefetch, stop)

    # ------------------------------------------------------------------------------------------------------ opening

    def _open_datasets(self, kept: Kept, folder: Path, resume: bool, own: list[Corpus]) -> list[Corpus]:
        without = [file for corpus in own for file in getattr(corpus.source, "files", ())]
        corpora = []
        datasets = self.options.datasets()
        for number, dataset in enumerate(datasets):
            source = open_source(
                dataset.name,
                dataset.config,
                dataset.revision or kept.revision_of(number, dataset.name),
                dataset.text_field,
                folder,
                keep=resume,
                document_bytes=self.options.document_bytes,
                without=without,
                former=kept.rules < WHOLE_TEXTS,
                runs=kept.rules < RULES,
            )
            label = f"{dataset.name}: " if len(datasets) > 1 else ""
            corpora.append(Corpus(dataset.name, source, label=label))
            self.notes += [label + note for note in getattr(source, "notes", ())]
        if len(datasets) > 1:
            total = sum(dataset.weight for dataset in datasets)
            shares = ", ".join(f"{dataset.weight / total:.1%} {dataset.name}" for dataset in datasets)
            self.notes.append(f"of all tokens {shares}")
        return corpora

    def _open_validation(self) -> list[Corpus]:
        """The validation datasets. Their files are left out of the others."""
        field = self.options.datasets()[0].text_field
        settings = {"document_bytes": self.options.document_bytes, "option": "--validation-dataset"}
        return [
            Corpus(name, FileSource(files, field, **settings), label=f"{name}: ")
            for name, files in self.options.validation_files().items()
        ]

    def _choose_rules(self, corpus: Corpus, tokenizer: TextTokenizer | None, former: bool, resume: bool) -> None:
        """The first document decides whether a dataset is one of chats."""
        if former:
            corpus.rules = FORMER
            return
        chat = tokenizer.chat if tokenizer else ChatFormat()
        corpus.rules = TextRules(chat)
        with closing(self._reader(corpus, lambda document: True).documents(1)) as documents:
            first = next(documents, None)
            corpus.chats = first is not None and first.is_chat
            if not corpus.chats:
                corpus.rules = TextRules(None)
                return
            self.notes.append(f"{corpus.label}chats, {chat.in_words}")
            if self.options.document_mask and chat.template is not None:
                self._require_whole(itertools.islice(itertools.chain([first], documents), LOOKED_AT), tokenizer, resume)

    def _require_whole(self, documents: Iterable[Document], tokenizer: TextTokenizer, resume: bool) -> None:
        """Raises `UserError` if the end of a turn would be taken for that of a document; of a run that began so, it is
        said."""
        end = tokenizer.end_of_text
        if any(document.is_chat and end in document.text.rstrip().removesuffix(end) for document in documents):
            message = (
                f"--document-mask: the chat template of {tokenizer.name} ends each turn with {end}, so no answer sees "
                "its question; leave it out, or name a tokenizer with another eos_token"
            )
            if not resume:
                raise UserError(message)
            self.notes.append(message)

    def _reader(self, corpus: Corpus, keep: Callable[[Document], bool]) -> Reader:
        options = self.options
        return Reader(
            corpus.source,
            keep,
            self._bad_rows,
            options.data_retries,
            options.retry_wait,
            corpus.rules,
            corpus.name,
            corpus.label,
        )

    def _all_documents(self, keep: Callable[[Document], bool]) -> Iterable[Document]:
        return itertools.chain.from_iterable(self._reader(corpus, keep) for corpus in self.corpora)

    def _identity(self, bound: int, rules: int) -> dict:
        """What the training batches depend on."""
        identity: dict[str, Any] = {}
        versions = package_versions("tokenizers")
        for number, corpus in enumerate(self.corpora, 1):
            prefix = f"dataset {number}: " if len(self.corpora) > 1 else ""
            values = {**corpus.source.identity, **({"chats": corpus.rules.chat.identity} if corpus.chats else {})}
            versions |= values.pop("versions")
            identity |= {prefix + key: value for key, value in values.items()}
        if len(self.corpora) > 1:
            identity["weights"] = " ".join(f"{dataset.weight:g}" for dataset in self.options.datasets())
        return {
            **identity,
            "tokenizer": self.tokenizer.hash,
            "held_out": f"{bound:016x}",
            "shuffle": f"windows of {self.options.shuffle_window}, seed {self.options.seed}",
            "versions": versions,
            **({"rules": rules} if rules >= WHOLE_TEXTS else {}),
        }

    def keep_scored(self) -> None:
        """Keep what is scored from here on: validation datasets may change. Not before the run is known to go on, for
        with other settings, such as another tokenizer, they are other rows."""
        new = self._kept._replace(validation={**(self._kept.validation or {}), **self._own_scored} or None)
        if new != self._kept:
            self._write_kept(new)

    @property
    def _own_scored(self) -> dict[str, str]:
        """`scored` of the validation datasets."""
        return {name: rows for name, rows in self.scored.items() if name != HELD_OUT}

    def _keep(self, kept: Kept, folder: Path, resume: bool) -> None:
        """What the run is to go on with. On resume: what is missing."""
        missing = not all((folder / name).exists() for name in (KEPT_FILE, "tokenizer.json", CONFIG_FILE))
        if not resume or missing:
            self.tokenizer.save(folder)
        new = kept
        if not resume or missing:
            names = [corpus.name for corpus in self.corpora]
            revisions = [corpus.source.identity.get("revision") for corpus in self.corpora]
            scored = kept.validation if resume else self._own_scored or None
            new = Kept(_one(names), _one(revisions), self.options.tokenizer, kept.rules, scored)
        for name, rows in (kept.validation or {}).items():
            if self.scored.get(name, rows) != rows:
                self.notes.append(f"validation dataset {name} is not what it was: its curve goes on with other text")
        self._folder, self._kept = folder, new
        if not resume or new != kept:
            self._write_kept(new)

    def _write_kept(self, new: Kept) -> None:
        values = {name: value for name, value in new._asdict().items() if name != "validation" or value}
        write_whole(self._folder / KEPT_FILE, (json.dumps(values, indent=2) + "\n").encode())
        self._kept = new

    # --------------------------------------------------------------------------------------------------- validation

    def _kept_held_out(self, bound: int, folder: Path, resume: bool) -> Validation:
        """The held-out rows, from the run folder or else made and kept there."""
        identity = {key: value for key, value in self.identity.items() if key != "versions"}
        made_from = json.dumps([identity, self.options.seq_len, self.options.validation_rows], sort_keys=True)
        file = folder / VALIDATION_FILE
        if resume and file.exists():
            try:
                with np.load(file) as kept:
                    if kept["made_from"] == made_from:
                        return Validation(Rows(kept["inputs"], kept["targets"]), int(kept["size"]))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(
                    f"{file}: damaged ({in_one_line(error)}); remove it: the rows are made again"
                ) from error
        readers = [self._reader(corpus, lambda document: document.digest < bound) for corpus in self.corpora]
        rows, size = self._rows(
            readers if bound else [], [dataset.weight for dataset in self.options.datasets()], set()
        )
        content = io.BytesIO()
        np.savez(content, inputs=rows.inputs, targets=rows.targets, size=size, made_from=made_from)
        write_whole(file, content.getvalue())
        return Validation(rows, size)

    def _own_validation(self, own: list[Corpus]) -> None:
        """The rows of the validation datasets, and a warning where training documents are among theirs."""
        scored: set[int] = set()
        for corpus in own if self.options.validation_rows else ():
            validation = self._rows([self._reader(corpus, lambda document: True)], [1.0], scored)
            if not len(validation.rows.inputs):
                raise UserError(f"--validation-dataset {corpus.name}: no text in it")
            self.validations[corpus.name] = validation
        if scored:
            is_training, told = self.is_training, False

            def is_training_and_tell(document: Document) -> bool:
                nonlocal told
                if document.digest in scored and not told and is_training(document):
                    told = True
                    log.warning("%s is trained on, and in a validation dataset too; no more are named", document.place)
                return is_training(document)

            self.is_training = is_training_and_tell

    def _rows(self, readers: Sequence[Reader], weights: Sequence[float], scored: set[int]) -> Validation:
        """Whole documents, the first ones that fit into `validation_rows`, packed end to end; of several datasets each
        next one of that which is the furthest behind its share. A first document that is longer by itself is cut. Their
        digests go into `scored`."""
        room = self.options.validation_rows * self.options.seq_len
        tokens, size = [self.tokenizer.eot_id], 0
        streams = [reader.documents(8) for reader in readers]
        given = dict.fromkeys(range(len(streams)), 0)
        while given:
            number = min(given, key=lambda one: given[one] / weights[one])
            document = next(streams[number], None)
            if document is None:
                del given[number]
                continue
            ids = [*self.tokenizer.encode_documents([document])[0].tolist(), self.tokenizer.eot_id]
            text = document.text
            if len(ids) > room and size == 0:
                ids, text = self.tokenizer.cut(ids, room)
            elif len(ids) > room:
                break
            given[number] += len(ids)
            scored.add(document.digest)
            tokens += ids
            room -= len(ids)
            size += len(text.encode())
        for stream in streams:
            stream.close()
        return Validation(rows_of(tokens, self.options.seq_len), size)


def open_data(options: DataOptions, folder: Path, resume: bool = False) -> Data:
    """The data of a run, whose `folder` keeps what it must not lose: its tokenizer, its text if that is `python-docs`,
    and the identity of both.

    With `resume` the run goes on with what is kept there (also on another machine); without, it is made anew. Raises
    `UserError` if the data or the tokenizer can't be had."""
    return Data(options, Path(folder), resume)


def take_along(run: Path, folder: Path) -> bool:
    """Copy what a run keeps of its data to the folder of one that goes on from it and has not begun; whether there was
    something. Its revision on the Hub, its tokenizer and its Python's documentation may not be had again."""
    if not (run / KEPT_FILE).is_file():
        return False
    for name in (KEPT_FILE, VALIDATION_FILE, f"{PYTHON_DOCS}.jsonl", CONFIG_FILE, "tokenizer.json"):
        if (run / name).is_file():
            write_whole(folder / name, (run / name).read_bytes())
    return True


def _read_kept(folder: Path) -> Kept:
    file = folder / KEPT_FILE
    try:
        return Kept(**read_json(file)) if file.exists() else Kept(rules=RULES)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it: what the data are is then looked up again") from error


def _listed(value: str | list | None) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _one(values: list) -> Any:
    """One value as itself: as runs of one dataset have always kept it."""
    return values[0] if len(values) == 1 else values


def _hash_of(rows: Rows) -> str:
    return hashlib.blake2b(rows.inputs.tobytes() + rows.targets.tobytes(), digest_size=8).hexdigest()
