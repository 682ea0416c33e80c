"""Text to token ids: a tokenizer of the Hugging Face Hub, one in a local folder, or a byte-level BPE trained on the
corpus. All are read by the `tokenizers` library, and a run keeps its own copy, so that it can go on anywhere."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import Tokenizer

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import read_json, user_path, write_whole
from train.data.chat import ChatFormat
from train.data.corpus import Document
from train.data.hub import HUB_TIMEOUT
from train.data.sources import in_one_line, looks_like_hub_name

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_LATER_KNOWN_ENDS = ("<｜end▁of▁sentence｜>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "[SEP]")
"""DeepSeek's own, and others, tried after the former."""

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"

PIECE = 1 << 20
"""Characters of a text from which on it is encoded in pieces: a whole book at once takes many times its size."""

LARGEST = 256 << 20
"""Bytes of a `tokenizer.json`; those of a vocabulary of 256,000 are a tenth of it."""

TRAINED = "bpe"
TRAINING_BYTES = 32 << 20
"""Text that a BPE is trained on: the start of the corpus, up to this many bytes."""


def text_pieces(text: str) -> list[str]:
    """A text in pieces of at most `PIECE` characters, cut before the last line in each that does not begin with white
    space: there byte-level tokenizers end a token anyway. Where there is no such line, after the last white space."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end, near = start + PIECE, PIECE // 8
        lines = [cut.end() for cut in re.finditer(r"\n(?=\S)", text[end - near : end + 1])]
        space = text.rfind(" ", start + 1, end)
        if lines:
            end += lines[-1] - near
        elif space > 0:
            end = space
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


class TextTokenizer:
    """Encodes text to ids and back. Special tokens are never read out of text: a document that spells
    `<|endoftext|>` gets the ids of those characters, so that id ends documents and nothing else."""

    def __init__(self, definition: str, name: str, config: dict | None = None):
        """`definition` is the content of a `tokenizer.json`, `config` that of the `tokenizer_config.json` beside it, if
        there is one; `name` says in messages where they are from.

        A document ends with the `eos_token` of `config`, or else with the first known one of the vocabulary."""
        self.definition, self.name, self.config = definition, name, config or {}
        self._tokenizer = self._read()
        self._tokenizer.encode_special_tokens = True
        wanted = _token_text(self.config.get("eos_token"))
        known = [token for token in _KNOWN_ENDS + _LATER_KNOWN_ENDS if self._tokenizer.token_to_id(token) is not None]
        end = wanted if wanted and self._tokenizer.token_to_id(wanted) is not None else next(iter(known), None)
        if end is None:
            tried = " ".join([*([wanted] if wanted else []), *_KNOWN_ENDS, *_LATER_KNOWN_ENDS])
            raise UserError(
                f"--tokenizer {name}: it has no end-of-text token, none of {tried}; name one of its vocabulary as "
                f"eos_token in its {CONFIG_FILE}"
            )
        self.end_of_text: str = end
        self.eot_id: int = self._tokenizer.token_to_id(end)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.hash: str = hashlib.blake2b(definition.encode(), digest_size=8).hexdigest()
        if end != next((token for token in known if token in _KNOWN_ENDS), None):
            self.hash += f", ends with {end}"  # runs begun before others were known must tell the difference
        begin = _token_text(self.config.get("bos_token"))
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.chat = ChatFormat(
            _template_text(self.config.get("chat_template")),
            {"eos_token": end} | ({"bos_token": begin} if begin else {}),
            frozenset(token.content for token in added if token.special),
            name,
        )

    def _read(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_str(self.definition)
        except Exception as error:
            raise UserError(f"--tokenizer {self.name}: not a tokenizer.json: {in_one_line(error)}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _with_special_tokens(self) -> Tokenizer:
        """Reads special tokens out of text, as those of a chat template are meant."""
        return self._read()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """On all cores, without the interpreter's lock, and without the character offsets nobody asks for."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, documents: Sequence[Document]) -> list[Int32[np.ndarray, " tokens"]]:
        """Ids of each, without an end of text. Long ones are encoded in pieces that end with a line."""
        pieces = [text_pieces(document.text) for document in documents]
        templated = [document.is_chat and self.chat.template is not None for document in documents]
        encoded = {
            kind: self._encode_pieces(
                [piece for parts, is_kind in zip(pieces, templated, strict=True) for piece in parts if is_kind == kind],
                self._with_special_tokens if kind else self._tokenizer,
            )
            for kind in set(templated)
        }
        return [
            np.concatenate([next(encoded[kind]) for _ in parts], dtype=np.int32)
            for parts, kind in zip(pieces, templated, strict=True)
        ]

    @staticmethod
    def _encode_pieces(pieces: list[str], tokenizer: Tokenizer) -> Iterator[Int32[np.ndarray, " tokens"]]:
        """So many together that all cores have work, and their ids do not fill the memory as lists."""
        start = 0
        while start < len(pieces):
            end, size = start, 0
            while end < len(pieces) and (size := size + len(pieces[end])) <= 16 * PIECE or end == start:
                end += 1
            for encoding in tokenizer.encode_batch_fast(pieces[start:end], add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)
            start = end

    def cut(self, ids: list[int], count: int) -> tuple[list[int], str]:
        """At most `count` ids that end with a whole character, and their text."""
        ids = ids[:count]
        while ids and self.decode(ids).endswith("\ufffd"):
            ids = ids[:-1]
        return ids, self.decode(ids)

    def decode(self, ids: list[int]) -> str:
        """The text; special tokens leave none. Ids beyond the vocabulary (a model may have room for more) neither."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        """The text of ids that follow others: with the space it begins with, which some tokenizers leave out at the
        start of a text."""
        text, start = self.decode([*before, *ids]), self.decode(before)
        return text[len(start) :] if text.startswith(start) else self.decode(ids)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` with which `transformers` can read it."""
        end = self.end_of_text
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": end}
        if self.chat.template is not None:
            del config["bos_token"]
            config |= {**self.chat.tokens, "chat_template": self.chat.template}
        write_whole(Path(folder) / "tokenizer.json", self.definition.encode())
        write_whole(Path(folder) / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    def require_fit(self, vocab_size: int, mend: str = "choose another") -> None:
        """Raises `UserError` if the model has no row for some token; `mend` is what to do about it."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"--tokenizer {self.name}: its {self.vocab_size} tokens do not fit the model's vocab_size of "
                f"{vocab_size}; {mend}"
            )


def load_tokenizer(name: str, end_of_text: str | None = None) -> TextTokenizer:
    """The tokenizer of a local folder, of a `tokenizer.json`, or of a model or dataset name on the Hub. `end_of_text`
    takes the place of its own `eos_token`."""
    path = user_path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if path.exists() or not looks_like_hub_name(name):
            raise UserError(f"--tokenizer {name}: there is no {file}")
        file = _fetch(name)
    if file.stat().st_size > LARGEST:
        raise UserError(f"--tokenizer {name}: {file} is larger than {LARGEST >> 20} MiB, which no tokenizer.json is")
    config = _config_beside(file, name)
    if end_of_text:
        config["eos_token"] = end_of_text
    try:
        return TextTokenizer(file.read_text(encoding="utf-8"), name, config)
    except UnicodeDecodeError as error:
        raise UserError(f"--tokenizer {name}: {file} is not a tokenizer.json: it is not UTF-8") from error


def _config_beside(file: Path, name: str) -> dict:
    """`tokenizer_config.json` beside a `tokenizer.json`, with the chat template that may have a file of its own."""
    config, template = file.with_name(CONFIG_FILE), file.with_name(TEMPLATE_FILE)
    try:
        values = read_json(config) if config.is_file() else {}
        return values | ({"chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {})
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--tokenizer {name}: {error}") from error


def _token_text(token: str | dict | None) -> str | None:
    """A special token as configurations write it: text, or an object with its `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template_text(template: str | list | None) -> str | None:
    """A chat template as configurations write it: text, or a list of named ones."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _fetch(name: str) -> Path:
    """`tokenizer.json` of a repository on the Hub, or its copy in the local cache, with what belongs beside it."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)  # without a network this fails at once; a download tries on
        for beside in (CONFIG_FILE, TEMPLATE_FILE):
            with suppress(EntryNotFoundError):
                hf_hub_download(name, beside)
        return Path(hf_hub_download(name, "tokenizer.json"))
    except RepositoryNotFoundError as error:
        raise UserError(f"--tokenizer {name}: there is no such folder, and no such name on the Hub") from error
    except EntryNotFoundError as error:
        raise UserError(f"--tokenizer {name}: it has no tokenizer.json") from error
    except Exception as error:
        raise UserError(
            f"--tokenizer {name}: the Hugging Face Hub can't be reached ({in_one_line(error)}); without a network give "
            f"a folder with a tokenizer.json, or {TRAINED}, or train with --preset tiny"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens from the first `TRAINING_BYTES` of the texts; id 0 ends a text.

    The same texts give the same tokenizer."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"--tokenizer {TRAINED}: vocab_size {vocab_size} leaves no room beside {len(alphabet)} bytes")
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first_bytes(texts, TRAINING_BYTES), trainer)
    return TextTokenizer(tokenizer.to_str(), TRAINED)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text.encode())
        if limit <= 0:
            return


def open_tokenizer(name: str, vocab_size: int, texts: Iterable[str], folder: Path, keep: bool) -> TextTokenizer:
    """The tokenizer of a run, saved in its folder. `texts` are what a `bpe` is trained on.

    With `keep` the copy in the folder is taken if there is one; but a local folder that is still there is read again,
    so that a change in it is noticed. Raises `UserError` if it is larger than the model's vocabulary."""
    kept = Path(folder) / "tokenizer.json"
    keep = keep and kept.exists()
    if keep and (name == TRAINED or not user_path(name).exists()):
        try:
            tokenizer = load_tokenizer(str(kept))
        except UserError as error:
            raise UserError(f"{kept}: damaged ({error}); remove it: it is made again") from error
        tokenizer.name = name
    elif name == TRAINED:
        tokenizer = train_tokenizer(texts, vocab_size)
    else:
        end = _token_text(_config_beside(kept, name).get("eos_token")) if keep else None
        tokenizer = load_tokenizer(name, end)
    larger = f"give --vocab-size {tokenizer.vocab_size}, choose another, or {TRAINED} to train one of the right size"
    tokenizer.require_fit(vocab_size, larger)
    return tokenizer
