"""Text to token ids: a tokenizer of the Hugging Face Hub, one in a local folder, or a byte-level BPE trained on the
corpus. All are read by the `tokenizers` library, and a run keeps its own copy, so that it can go on anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import write_whole
from train.data.hub import HUB_TIMEOUT
from train.data.sources import first_line, looks_like_hub_name

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

TRAINED = "bpe"
TRAINING_BYTES = 32 << 20
"""Text that a BPE is trained on: the start of the corpus, up to this many bytes."""


class TextTokenizer:
    """Encodes text to ids and back. Special tokens are never read out of text: a document that spells
    `<|endoftext|>` gets the ids of those characters, so that id ends documents and nothing else."""

    def __init__(self, definition: str, name: str):
        """`definition` is the content of a `tokenizer.json`; `name` says in messages where it is from."""
        self.definition, self.name = definition, name
        try:
            self._tokenizer = Tokenizer.from_str(definition)
        except Exception as error:
            raise UserError(f"--tokenizer {name}: not a tokenizer.json: {first_line(error)}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = [self._tokenizer.token_to_id(token) for token in _KNOWN_ENDS]
        if all(number is None for number in ids):
            raise UserError(f"--tokenizer {name}: it has no end-of-text token, none of {' '.join(_KNOWN_ENDS)}")
        self.eot_id: int = next(number for number in ids if number is not None)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.hash: str = hashlib.blake2b(definition.encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """On all cores, without the interpreter's lock, and without the character offsets nobody asks for."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def cut(self, ids: list[int], count: int) -> tuple[list[int], str]:
        """At most `count` ids that end with a whole character, and their text."""
        ids = ids[:count]
        while ids and self.decode(ids).endswith("\ufffd"):
            ids = ids[:-1]
        return ids, self.decode(ids)

    def decode(self, ids: list[int]) -> str:
        """The text; special tokens leave none. Ids beyond the vocabulary (a model may have room for more) neither."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` with which `transformers` can read it."""
        end = self._tokenizer.id_to_token(self.eot_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": end}
        write_whole(Path(folder) / "tokenizer.json", self.definition.encode())
        write_whole(Path(folder) / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())

    def require_fit(self, vocab_size: int) -> None:
        """Raises `UserError` if the model has no row for some token."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"--tokenizer {self.name}: its {self.vocab_size} tokens do not fit the model's vocab_size of "
                f"{vocab_size}; choose another, or {TRAINED} to train one of the right size"
            )


def load_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a local folder, of a `tokenizer.json`, or of a model or dataset name on the Hub."""
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            return TextTokenizer(file.read_text(encoding="utf-8"), name)
        except UnicodeDecodeError as error:
            raise UserError(f"--tokenizer {name}: {file} is not a tokenizer.json: it is not UTF-8") from error
    if path.exists() or not looks_like_hub_name(name):
        raise UserError(f"--tokenizer {name}: there is no {file}")
    return TextTokenizer(_fetch(name).read_text(encoding="utf-8"), name)


def _fetch(name: str) -> Path:
    """`tokenizer.json` of a repository on the Hub, or its copy in the local cache."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)  # without a network this fails at once; a download tries on
        return Path(hf_hub_download(name, "tokenizer.json"))
    except RepositoryNotFoundError as error:
        raise UserError(f"--tokenizer {name}: there is no such folder, and no such name on the Hub") from error
    except EntryNotFoundError as error:
        raise UserError(f"--tokenizer {name}: it has no tokenizer.json") from error
    except Exception as error:
        raise UserError(
            f"--tokenizer {name}: the Hugging Face Hub can't be reached ({first_line(error)}); without a network give "
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
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def open_tokenizer(name: str, vocab_size: int, texts: Iterable[str], folder: Path, keep: bool) -> TextTokenizer:
    """The tokenizer of a run, saved in its folder. `texts` are what a `bpe` is trained on.

    With `keep` the copy in the folder is taken if there is one; but a local folder that is still there is read again,
    so that a change in it is noticed. Raises `UserError` if it is larger than the model's vocabulary."""
    kept = Path(folder) / "tokenizer.json"
    if keep and kept.exists() and not Path(name).exists():
        try:
            tokenizer = TextTokenizer(kept.read_text(encoding="utf-8"), name)
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{kept}: damaged ({first_line(error)}); remove it: it is made again") from error
    elif name == TRAINED:
        tokenizer = train_tokenizer(texts, vocab_size)
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.require_fit(vocab_size)
    return tokenizer
