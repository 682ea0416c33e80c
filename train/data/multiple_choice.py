"""Multiple-choice questions out of `.jsonl` files in the layouts in which HellaSwag, ARC and PIQA are published, worded
as in EleutherAI's lm-evaluation-harness (its tasks `hellaswag`, `arc_easy`, `arc_challenge`, `piqa`; version 0.4.13).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_ref.spec.interface import UserError

LAYOUTS = """\
    HellaSwag    activity_label, ctx_a, ctx_b, endings, label
    ARC          question {stem, choices [{text, label}]} or question, choices {text, label}; answerKey
    PIQA         goal, sol1, sol2, label; without it the line of the same number in <name>-labels.lst beside the file
    plain        question, choices [text], answer (number from 0)"""


@dataclass(frozen=True)
class Question:
    context: str
    """What is asked, as the model reads it."""
    choices: tuple[str, ...]
    """One of them, after a space, continues it."""
    answer: int
    """Number of the right one, from 0."""


def read_questions(file: Path) -> Iterator[Question]:
    """The questions of a file, in its order.

    Raises `UserError` naming file and line of a record that is none of `LAYOUTS`, or has no answer among its choices.
    """
    with _read_errors(file, "it must be .jsonl, a question a line"), open(file, encoding="utf-8-sig") as lines:
        labels = _labels_beside(file)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _question(f"{file}:{number}", line, labels[number - 1] if number <= len(labels) else None)


def _labels_beside(file: Path) -> list[str]:
    beside = file.with_name(f"{file.stem}-labels.lst")
    with _read_errors(beside, "it must be a label a line"):
        return beside.read_text(encoding="utf-8").split() if beside.is_file() else []


@contextmanager
def _read_errors(file: Path, rule: str) -> Iterator[None]:
    """Turns what opening and decoding a file raise into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--benchmark {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--benchmark {file}: not UTF-8 text; {rule}") from None


def _question(place: str, line: str, label: str | None) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--benchmark {place}: not JSON ({error})") from None
    reader = next((reader for key, reader in _READERS.items() if isinstance(record, dict) and key in record), None)
    if reader is None:
        raise UserError(f"--benchmark {place}: not a question in the layout of HellaSwag, ARC or PIQA")
    try:
        question = reader({"label": label, **record})
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"--benchmark {place}: incomplete ({missing})") from None
    if not all(isinstance(choice, str) and choice for choice in question.choices):
        raise UserError(f"--benchmark {place}: a choice that is no text")
    if not 0 <= question.answer < len(question.choices):
        raise UserError(f"--benchmark {place}: the answer is none of its {len(question.choices)} choices")
    try:
        "".join([question.context, *question.choices]).encode()
    except UnicodeEncodeError as error:  # half of a pair that JSON escapes, as a text cut in two has
        raise UserError(f"--benchmark {place}: no Unicode text ({error.reason})") from None
    return question


def _hellaswag(record: dict[str, Any]) -> Question:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Question(_unmarked(context), tuple(map(_unmarked, record["endings"])), int(record["label"]))


def _unmarked(text: str) -> str:
    """Without the marks that WikiHow left in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(record: dict[str, Any]) -> Question:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        choices = [
            {"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)
        ]
    if "answerKey" not in record:
        return _asked(question, choices, record["answer"])
    labels = [choice["label"] for choice in choices]
    return _asked(question, [choice["text"] for choice in choices], labels.index(record["answerKey"]))


def _piqa(record: dict[str, Any]) -> Question:
    return _asked(record["goal"], [record["sol1"], record["sol2"]], record["label"])


def _asked(question: str, choices: list[str], answer: int | str) -> Question:
    return Question(f"Question: {question}\nAnswer:", tuple(choices), int(answer))


_READERS: dict[str, Callable[[dict[str, Any]], Question]] = {"endings": _hellaswag, "goal": _piqa, "question": _arc}
"""By a key that only records of that layout have."""
