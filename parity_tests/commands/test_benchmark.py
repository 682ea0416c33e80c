"""Multiple choice: the layouts in which HellaSwag, ARC and PIQA are published, and one accuracy in torch, in Flax and
in lm-evaluation-harness, which runs the exported folder where it is installed (`pip install "lm-eval[hf]"`)."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.trained import MODEL, trained_folder
from torch_ref.spec.interface import UserError
from train import evaluate as evaluation
from train.data.multiple_choice import Question, read_questions
from train.evaluate import answer, choice_row, likelihoods_of
from train.state.trained import open_trained

WORDS = "one two cat dog ran over the hill and saw a house Ämter of stone by night".split()


def phrase(generator: np.random.Generator, longest: int) -> str:
    return " ".join(generator.choice(WORDS, int(generator.integers(1, longest + 1))))


def write_set(folder: Path, layout: str, count: int = 20) -> Path:
    """Questions of our own in a published layout, some longer than the model's context."""
    draw = np.random.default_rng(len(layout))
    records = []
    for number in range(count):
        long = 60 if number % 7 == 3 else 8
        choices = [phrase(draw, 9) for _ in range(2 if layout == "piqa" else 4)]
        label = int(draw.integers(len(choices)))
        if layout == "hellaswag":
            records.append({
                "activity_label": "Making [header] tea",
                "ctx_a": f"A man [title] {phrase(draw, long)}.",
                "ctx_b": phrase(draw, 2) if number % 2 else "",
                "endings": [f"{choice} [step] twice  over." for choice in choices],
                "label": str(label),
            })  # fmt: skip
        elif layout == "arc":
            labels = ["A", "B", "C", "D"] if number % 2 else ["1", "2", "3", "4"]
            records.append({
                "id": str(number),
                "question": phrase(draw, long) + "?",
                "choices": {"text": choices, "label": labels},
                "answerKey": labels[label],
            })  # fmt: skip
        else:
            records.append({"goal": phrase(draw, long), "sol1": choices[0], "sol2": choices[1], "label": label})
    file = folder / f"{layout}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


LAYOUTS = ("hellaswag", "arc", "piqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("trained"))


def test_questions_are_worded_as_in_the_harness(tmp_path):
    records = {
        "hellaswag": {"activity_label": "Roof", "ctx_a": "A man [title] sits.", "ctx_b": "he", "label": "2",
                      "endings": ["is [x] up.", "goes  off.", "falls.", "sings."]},
        "arc": {"question": {"stem": "What is hot?", "choices": [{"text": "Ice", "label": "A"},
                                                                {"text": "Fire", "label": "B"}]}, "answerKey": "B"},
        "piqa": {"goal": "Open a door", "sol1": "Push", "sol2": "Sing"},
        "plain": {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
    }  # fmt: skip
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n")
    expected = {
        "hellaswag": Question("Roof: A man. sits. He", ("is up.", "goes off.", "falls.", "sings."), 2),
        "arc": Question("Question: What is hot?\nAnswer:", ("Ice", "Fire"), 1),
        "piqa": Question("Question: Open a door\nAnswer:", ("Push", "Sing"), 0),
        "plain": Question("Question: 2 + 2?\nAnswer:", ("3", "4"), 1),
    }
    for layout, record in records.items():
        (tmp_path / f"{layout}.jsonl").write_text("\ufeff" + json.dumps(record) + "\r\n\n", encoding="utf-8")
        assert list(read_questions(tmp_path / f"{layout}.jsonl")) == [expected[layout]], layout


BROKEN = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "[1]": "not a question in the layout of HellaSwag, ARC or PIQA",
    '{"goal": "x", "sol1": "a", "label": 0}': "incomplete \\('sol2' is missing\\)",
    '{"goal": "x", "sol1": "a", "sol2": "b"}': "incomplete",
    '{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}': "the answer is none of its 2 choices",
    '{"goal": "x", "sol1": "a", "sol2": "b", "label": Infinity}': "incomplete",
    '{"question": "x", "choices": ["a", 7], "answer": 0}': "a choice that is no text",
    '{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}': "incomplete",
    r'{"question": "x", "choices": ["a", "\ud83d"], "answer": 0}': "no Unicode text \\(surrogates not allowed\\)",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:80])
def test_a_broken_record_is_named_by_its_line(tmp_path, line):
    good = '{"question": "x", "choices": ["a", "b"], "answer": 0}'
    (tmp_path / "set.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=f"--benchmark .*set.jsonl:2: {BROKEN[line]}"):
        list(read_questions(tmp_path / "set.jsonl"))


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    questions, labels = tmp_path / "set.jsonl", tmp_path / "set-labels.lst"
    questions.write_text('{"goal": "x", "sol1": "a", "sol2": "b"}\n')

    def refused(file):
        with pytest.raises(UserError) as error:
            list(read_questions(file))
        return str(error.value)

    assert refused(Path(".")) == "--benchmark .: Is a directory"
    labels.write_bytes(b"\xff\n")
    assert refused(questions) == f"--benchmark {labels}: not UTF-8 text; it must be a label a line"

    def refuse(*_, **__):  # root may read every file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert refused(questions) == f"--benchmark {labels}: Permission denied"


class Letters:
    """A tokenizer of letters, but for `: ` and `ab`."""

    eot_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.replace(": ", "\u2236").replace("ab", "\u00df")]


@pytest.mark.parametrize(
    ("context", "choice", "inputs", "scored"),
    [
        ("xy", "ab", "xy ", " \u00df"),
        ("", "ab", "\0 ", " \u00df"),
        ("x  ", "y", "x   ", "   y"),  # spaces at the end are scored with the choice
        ("x:", "y", "x:", "y"),  # the boundary falls into a token: as many tokens of the context as it has alone
        ("0123456789", "abc", "6789 \u00df", " \u00dfc"),  # what does not fit is left out in front
    ],
)
def test_what_of_a_choice_is_scored(context, choice, inputs, scored):
    got, targets = choice_row(Letters(), context, choice, 6)
    assert "".join(map(chr, got)) == inputs
    assert "".join(map(chr, targets[targets >= 0])) == scored and (targets[: len(targets) - len(scored)] < 0).all()


def test_accuracies_are_those_of_the_likeliest_choices(monkeypatch):
    """Per character: a byte or a space more to each would turn the first two around."""
    questions = [Question("", ("Ä", "bbbb"), 1), Question("", ("Ä", "bbbb"), 1), Question("", ("a", "b"), 0)]
    found = [np.array([-1.0, -3.5]), np.array([-1.0, -3.5]), np.array([-1.0, -4.0])]
    monkeypatch.setattr(evaluation, "likelihoods_of", lambda model, questions, seq_len: found)
    accuracy = answer(None, questions, 128)
    assert (accuracy.plain, accuracy.normalised) == (pytest.approx(1 / 3), 1)
    assert str(accuracy) == "Accuracy: 0.3333 +- 0.3333 | Normalised by length: 1.0000 +- 0.0000 (3 questions)"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_frameworks_find_the_same_likelihoods(folder, tmp_path, layout):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    questions = list(read_questions(write_set(tmp_path, layout)))
    torch, flax = (
        np.concatenate(likelihoods_of(open_trained(folder, name, device="cpu"), questions, MODEL.max_position))
        for name in ("torch", "flax")
    )
    assert len(torch) == sum(len(question.choices) for question in questions) and (torch < -1).all()
    np.testing.assert_allclose(flax, torch, rtol=1e-5)


def test_likelihoods_are_those_of_every_choice_alone(folder, tmp_path):
    """Whatever stands beside it in a batch, and in the order of the questions."""
    pytest.importorskip("torch")
    model = open_trained(folder, "torch", device="cpu")
    questions = list(read_questions(write_set(tmp_path, "arc")))
    together = likelihoods_of(model, questions, MODEL.max_position)
    for question, likelihoods in zip(questions[:6], together, strict=False):
        for choice, likelihood in zip(question.choices, likelihoods, strict=True):
            inputs, targets = choice_row(model.tokenizer, question.context, choice, MODEL.max_position)
            assert likelihood == pytest.approx(-model.losses(inputs[None], targets[None])[0], rel=1e-5)


def test_benchmark_command(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    file = write_set(tmp_path, "piqa")
    arguments = [str(folder), "--framework", "torch", "--benchmark", str(file)]
    assert evaluation.main(arguments) == 0
    out = capsys.readouterr().out
    model, questions = open_trained(folder, "torch", device="cpu"), list(read_questions(file))
    accuracy = answer(model, questions, MODEL.max_position)
    assert out == f"piqa.jsonl: {accuracy}\n" and "(20 questions)" in out and not math.isnan(accuracy.plain)
    assert evaluation.main([*arguments, "--seq-len", "8"]) == 0
    shorter = capsys.readouterr().out
    assert shorter == f"piqa.jsonl: {answer(model, questions, 8)}\n" != out
    assert evaluation.main([str(folder)]) == 2
    assert capsys.readouterr().err == "error: --data, --validation-dataset or --benchmark: name the files to score\n"
    assert evaluation.main([str(folder), "--benchmark", str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err
    (empty := tmp_path / "empty.jsonl").write_text("\n")
    assert evaluation.main([*arguments, str(empty)]) == 2
    assert capsys.readouterr().err == f"error: --benchmark {empty}: no question in there\n"


@pytest.mark.parametrize(("layout", "task"), [("hellaswag", "hellaswag"), ("arc", "arc_easy"), ("piqa", "piqa")])
def test_the_harness_finds_the_same(folder, tmp_path, layout, task):
    """Its own task, on our file: every choice's log-likelihood, and both accuracies."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]'")
    from lm_eval.tasks import TaskManager

    file = write_set(tmp_path, layout)
    theirs = Path(lm_eval.__file__).parent / "tasks" / {"arc_easy": "arc"}.get(task, task) / f"{task}.yaml"
    (tmp_path / "ours.yaml").write_text(
        f"include: {theirs}\ntask: ours\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
        f"test_split: null\ndataset_kwargs:\n  data_files:\n    validation: {file}\n"
    )
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["ours"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        device="cpu",
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )
    model, questions = open_trained(folder, "torch", device="cpu"), list(read_questions(file))
    samples = sorted(result["samples"]["ours"], key=lambda sample: sample["doc_id"])
    for likelihoods, sample in zip(likelihoods_of(model, questions, MODEL.max_position), samples, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(likelihoods, theirs, rtol=1e-4)
    accuracy, scores = answer(model, questions, MODEL.max_position), result["results"]["ours"]
    assert accuracy.plain == pytest.approx(scores["acc,none"])
    assert accuracy.normalised == pytest.approx(scores["acc_norm,none"])
