"""Score texts, or the answers to multiple-choice questions, with a trained model:

    python -m train.evaluate runs/tiny-flax --data texts/*.txt
    python -m train.evaluate runs/tiny-flax --validation-dataset news=news.jsonl --validation-dataset code=src
    python -m train.evaluate runs/tiny-flax --benchmark hellaswag_val.jsonl

MODEL is a run folder of either framework, a checkpoint, a `transformers` folder or a file of final weights. Without
`--data` and the others, the validation datasets that a run was given are scored, each by itself and whole. Every
document is scored within its own boundaries: its first token is predicted from the end-of-text token before it, and
the end-of-text token after it counts as its last. Documents longer than the context are cut into rows of it, and each
token is predicted once. Bits per byte divide by the documents' UTF-8 bytes, so they compare across tokenizers.

A question (`train.data.multiple_choice`) is answered by the choice that is the likeliest to follow it; normalised,
by the one with the highest log-likelihood per character. Both as lm-evaluation-harness has them (`acc`, `acc_norm`).
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float64, Int32

from torch_ref.spec.interface import IGNORE, UserError
from train.data.chat import TextRules
from train.data.corpus import Document, Reader
from train.data.multiple_choice import Question, read_questions
from train.data.options import named_files
from train.data.packing import Rows, document_rows
from train.data.sources import FileSource
from train.data.tokenizer import TextTokenizer
from train.settings import Repeated
from train.shell import COMPLETE, parse_flags, shell
from train.state.source import locate
from train.state.trained import ModelOptions, TrainedModel

TOKENS_PER_PASS = 4096
"""Positions of one forward pass, or one row if that is longer."""


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """Score texts, or the answers to multiple-choice questions, with a trained model."""

    data: tuple[str, ...] = ()
    """Files (docs/data.md has the kinds), folders or globs of texts to score."""
    validation_dataset: Repeated = ()
    """Files to score by themselves, as NAME=FILES; may be repeated. Default: the run's, if nothing else is named."""
    benchmark: tuple[Path, ...] = ()
    """Multiple-choice questions to answer: .jsonl files in the layout of HellaSwag, ARC or PIQA."""
    text_field: str | None = None
    """Column or key that holds the text. Default: text, and for a run's own validation datasets that of the run."""
    document_bytes: int = 0
    """Cut text files into documents of at most so many bytes; 0: a file is a document."""
    seq_len: int | None = None
    """Length of the longest row, of texts and of questions with a choice; None: the model's context."""


@dataclass(frozen=True)
class Score:
    """What a model makes of some texts."""

    documents: int
    tokens: int
    """Scored: all of the documents, and one end of text each."""
    bytes: int
    """Of the documents, in UTF-8."""
    loss_sum: float
    """Nats."""

    @property
    def loss(self) -> float:
        """Mean next-token loss in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (
            f"Loss: {self.loss:.6f} | Perplexity: {self.perplexity:.4f} | Bits per byte: {self.bits_per_byte:.6f} "
            f"({self.documents} documents, {self.tokens} tokens, {self.bytes} bytes)"
        )


def evaluate(model: TrainedModel, texts: Iterable[str | Document], seq_len: int, named_by: str = "--data") -> Score:
    """Score texts, each within its own boundaries, in rows of at most `seq_len` tokens. `named_by` is the option that
    named them, with its value.

    Raises `UserError` where there is no text.
    """
    documents = tokens = size = 0

    def rows() -> Iterator[Row]:
        nonlocal documents, tokens, size
        for text in texts:
            document = Document(text, "", 0) if isinstance(text, str) else text
            (ids,) = model.tokenizer.encode_documents([document])
            documents, size = documents + 1, size + len(document.text.encode())
            for inputs, targets in zip(*document_rows(ids, seq_len, model.tokenizer.eot_id), strict=True):
                length = int((targets != IGNORE).sum())
                tokens += length
                yield inputs[:length], targets[:length]

    loss_sum = math.fsum(loss for _, batch in batches(rows(), seq_len) for loss in model.losses(*batch))
    if not documents:
        raise UserError(f"{named_by}: no text in there")
    return Score(documents, tokens, size, loss_sum)


@dataclass(frozen=True)
class Accuracy:
    """How many questions a model answers right."""

    questions: int
    plain: float
    """By likelihood: `acc` in lm-evaluation-harness."""
    normalised: float
    """By log-likelihood per character of the choice: its `acc_norm`."""

    def __str__(self) -> str:
        def part(value: float) -> str:
            error = math.sqrt(value * (1 - value) / max(self.questions - 1, 1))
            return f"{value:.4f} +- {error:.4f}"

        return (
            f"Accuracy: {part(self.plain)} | Normalised by length: {part(self.normalised)} ({self.questions} questions)"
        )


def answer(model: TrainedModel, questions: Sequence[Question], seq_len: int) -> Accuracy:
    """The accuracy of a model on multiple-choice questions, at least one, in rows of at most `seq_len` tokens."""
    right = np.zeros(2)
    for question, likelihoods in zip(questions, likelihoods_of(model, questions, seq_len), strict=True):
        per_character = likelihoods / [len(choice) for choice in question.choices]
        right += np.array([likelihoods.argmax(), per_character.argmax()]) == question.answer
    return Accuracy(len(questions), *(right / len(questions)).tolist())


def likelihoods_of(
    model: TrainedModel, questions: Sequence[Question], seq_len: int
) -> list[Float64[np.ndarray, " choices"]]:
    """The log-likelihoods of each question's choices, in nats."""
    rows = [choice_row(model.tokenizer, each.context, choice, seq_len) for each in questions for choice in each.choices]
    likelihoods = np.zeros(len(rows))
    for numbers, batch in batches(rows, seq_len):
        likelihoods[numbers] = -model.losses(*batch)[: len(numbers)]
    return np.split(likelihoods, np.cumsum([len(question.choices) for question in questions])[:-1])


def choice_row(tokenizer: TextTokenizer, context: str, choice: str, longest: int) -> Row:
    """Inputs and targets that score a choice after its context, as lm-evaluation-harness cuts them: both are encoded
    as one text, in which the choice begins after as many tokens as the context alone has, and spaces at the context's
    end belong to the choice. What does not fit `longest` is left out in front."""
    text = context.rstrip()
    choice = f"{context[len(text) :]} {choice}"
    before = tokenizer.encode(text)
    after = tokenizer.encode(text + choice)[len(before) :]
    before = before or [tokenizer.eot_id]
    tokens = np.array(before + after, np.int32)
    targets = np.array([IGNORE] * len(before) + after, np.int32)
    return tokens[:-1][-longest:], targets[1:][-longest:]


Row = tuple[Int32[np.ndarray, " seq"], Int32[np.ndarray, " seq"]]
"""Inputs and targets."""


def batches(rows: Iterable[Row], longest: int) -> Iterator[tuple[list[int], Rows]]:
    """Rows of like length together, filled up to that length, in few shapes, with their numbers in the order they
    came; the last batches are filled up with rows that have no number and are not scored."""
    waiting: dict[int, list] = defaultdict(list)

    def batch(length: int) -> tuple[list[int], Rows]:
        numbers, rows = zip(*waiting.pop(length), strict=True)
        shape = (rows_per_pass(length), length)
        inputs, targets = np.zeros(shape, np.int32), np.full(shape, IGNORE, np.int32)
        for place, row in enumerate(rows):
            inputs[place, : len(row[0])], targets[place, : len(row[1])] = row
        return list(numbers), Rows(inputs, targets)

    for number, row in enumerate(rows):
        length = padded_length(len(row[0]), longest)
        waiting[length].append((number, row))
        if len(waiting[length]) == rows_per_pass(length):
            yield batch(length)
    for length in list(waiting):
        yield batch(length)


def padded_length(length: int, longest: int) -> int:
    """64, 128, 256 and so on, at most `longest`."""
    return min(max(64, 1 << (length - 1).bit_length()), longest)


def rows_per_pass(length: int) -> int:
    return max(1, TOKENS_PER_PASS // length)


def read_documents(sources: Sequence[FileSource], tokenizer: TextTokenizer) -> Iterator[Document]:
    """All documents, chats as the tokenizer writes them. What is left out and how many rows are bad is told."""
    for source in sources:
        for note in source.notes:
            print(note, file=sys.stderr)
        yield from Reader(source, rules=TextRules(tokenizer.chat))


def run_validation(model: Path, text_field: str | None) -> tuple[str, dict[str, str]]:
    """The text field and the validation datasets of the run that a model is of. Raises `UserError` if it has none."""
    run = locate(model).run
    try:
        settings = tomllib.loads((run / "settings.toml").read_text(encoding="utf-8")) if run else {}
    except (OSError, ValueError):
        settings = {}
    named = named_files(settings.get("validation_dataset", ()))
    if not named:
        raise UserError("--data, --validation-dataset or --benchmark: name the files to score")
    fields = settings.get("text_field", "text")
    return text_field or (fields if isinstance(fields, str) else fields[0]), named


@shell
def main(argv: Sequence[str]) -> int:
    options = parse_flags(EvaluateOptions, "python -m train.evaluate", argv, config=(tyro.conf.FlagCreatePairsOff,))
    cut = options.document_bytes
    if cut != 0 and cut < 256:
        raise UserError(f"--document-bytes {cut}: must be 0 or from 256")
    field, named = options.text_field or "text", named_files(options.validation_dataset)
    if not (options.data or options.benchmark or named):
        field, named = run_validation(options.model, options.text_field)
    sources = [FileSource(pattern, field, document_bytes=cut, option="--data") for pattern in options.data]
    apart = {
        name: FileSource(files, field, document_bytes=cut, option="--validation-dataset")
        for name, files in named.items()
    }
    benchmarks = [(file, list(read_questions(file))) for file in options.benchmark]
    for file, questions in benchmarks:
        if not questions:
            raise UserError(f"--benchmark {file}: no question in there")
    model = options.open()
    seq_len = model.config.max_position if options.seq_len is None else options.seq_len
    if not 1 <= seq_len <= model.config.max_position:
        raise UserError(f"--seq-len {seq_len}: must be from 1 to the model's context of {model.config.max_position}")
    print(f"{options.model}, {model.framework} on {model.device}", file=sys.stderr)
    if sources:
        named_by = f"--data {' '.join(options.data)}"
        print(evaluate(model, read_documents(sources, model.tokenizer), seq_len, named_by))
    for name, source in apart.items():
        named_by = f"{source.option} {name}={named[name]}"
        print(f"{name}: {evaluate(model, read_documents([source], model.tokenizer), seq_len, named_by)}")
    for file, questions in benchmarks:
        print(f"{file.name}: {answer(model, questions, seq_len)}")
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
