"""Evaluation and the command lines: one score in torch, Flax and `transformers`; the text alone on standard output."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.cases import CONFIG, case_values
from torch_ref.spec.huggingface import export_folder
from torch_ref.spec.interface import IGNORE, UserError
from train import evaluate as evaluation
from train import generate as generation
from train.data.packing import document_rows
from train.data.tokenizer import train_tokenizer
from train.evaluate import batches, evaluate
from train.generate import TextStream
from train.state.source import Source
from train.state.trained import choose_framework, open_trained

DOCUMENTS = [
    "The cache holds one latent per token and layer, and the rotated key.",
    "é",
    "Perplexity is the exponential of the mean loss. " * 20,
    "Two lines\nand a 世界 of bytes.",
]
MODEL = replace(CONFIG, vocab_size=400, n_routed_experts=4, max_position=128)


def untied_values(config):
    """Values under which no two experts have equal scores: `transformers` does not say which it then takes."""
    for row, value in case_values(config):
        if ".router." in row.name:
            value = value + 0.1 * np.random.default_rng(len(row.name)).standard_normal(row.shape)
        yield row, value


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A `transformers` folder with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(DOCUMENTS, MODEL.vocab_size)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    settings = {"tokenizer": folder / "tokenizer", "end_of_text": tokenizer.eot_id}
    export_folder(folder / "model", MODEL, untied_values(MODEL), **settings)
    return folder / "model"


@pytest.fixture(params=["torch", "flax"])
def framework(request):
    pytest.importorskip({"torch": "torch", "flax": "jax"}[request.param])
    return request.param


@pytest.fixture(scope="module")
def expected_loss(folder) -> tuple[float, int]:
    """Sum of losses and number of scored tokens by `transformers`, one document (or its part) at a time, unpadded."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    total, count = 0.0, 0
    for text in DOCUMENTS:
        ids = [end, *tokenizer(text, add_special_tokens=False).input_ids, end]
        for start in range(0, len(ids) - 1, MODEL.max_position):
            part = torch.tensor(ids[start : start + MODEL.max_position + 1])
            with torch.no_grad():
                logits = model(part[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.double(), part[1:], reduction="sum"))
            count += len(part) - 1
    return total, count


def test_score_is_that_of_transformers(framework, folder, expected_loss):
    model = open_trained(folder, framework, device="cpu")
    score = evaluate(model, DOCUMENTS, MODEL.max_position)
    total, count = expected_loss
    assert (score.documents, score.tokens) == (4, count)
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / score.bytes, rel=1e-5)


def test_every_token_is_scored_once_within_its_document():
    documents = [document_rows(list(range(1, length)), 96, 0) for length in (2, 5, 63, 64, 65, 97, 300)]
    got = list(batches(documents, 96))
    assert {batch.inputs.shape for batch in got} == {(64, 64), (42, 96)}

    def scored(rows):
        pairs = [np.stack(row)[:, row[1] != IGNORE].T.tolist() for each in rows for row in zip(*each, strict=True)]
        return sorted(filter(None, pairs))

    assert scored(got) == scored(documents)


def test_full_batches_come_before_the_end():
    documents = (document_rows([7] * 30, 64, 0) for _ in range(150))
    shapes = [(batch.inputs.shape, int((batch.targets != IGNORE).sum())) for batch in batches(documents, 64)]
    assert shapes == [((64, 64), 64 * 31), ((64, 64), 64 * 31), ((64, 64), 22 * 31)]


def test_evaluate_command(framework, folder, tmp_path, capsys):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    arguments = [str(folder), "--framework", framework, "--device", "cpu", "--data"]
    assert evaluation.main([*arguments, str(tmp_path / "[01].txt"), str(tmp_path / "3.txt")]) == 0
    out = capsys.readouterr().out
    score = evaluate(open_trained(folder, framework, device="cpu"), [DOCUMENTS[i] for i in (0, 1, 3)], 128)
    assert out == f"{score}\n"
    assert out.startswith("Loss: ") and "3 documents" in out and f"{score.bytes} bytes" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
        (["--seq-len", "129"], "--seq-len 129: must be from 1 to the model's context of 128"),
        (["--step", "3"], "--step 3"),
        (["--tokenizer", "no/such/folder"], "--tokenizer no/such/folder"),
    ],
)
def test_evaluate_refuses_in_one_line(arguments, message, folder, tmp_path, capsys):
    pytest.importorskip("torch")
    (tmp_path / "a.txt").write_text("text")
    data = [] if "--data" in arguments else ["--data", str(tmp_path / "a.txt")]
    assert evaluation.main([str(folder), *arguments, *data]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_empty_text_is_refused(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n')
    assert evaluation.main([str(folder), "--data", str(tmp_path / "a.jsonl")]) == 2
    assert "error: --data: no text" in capsys.readouterr().err


def test_generate_command_prints_the_text_alone(framework, folder, capsys, monkeypatch):
    arguments = [str(folder), "--framework", framework, "--device", "cpu", "--max-new-tokens", "12", "--seed", "4"]
    assert generation.main([*arguments, "--prompt", "The cache"]) == 0
    text = capsys.readouterr().out
    model = open_trained(folder, framework, device="cpu")
    options = generation.GenerateOptions(folder, max_new_tokens=12, seed=4)
    (ids,) = model.generate([model.tokenizer.encode("The cache")], options.sampling(model.tokenizer.eot_id), 4)
    assert text == model.tokenizer.decode(ids) + "\n" and len(text) > 2

    monkeypatch.setattr("sys.stdin", io.StringIO("The cache\n"))
    assert generation.main(arguments) == 0
    assert capsys.readouterr().out == text

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert generation.main([*arguments, "--prompt", "The cache"]) == 0
    assert capsys.readouterr().out == text


def test_generate_refuses_in_one_line(folder, capsys):
    pytest.importorskip("torch")
    assert generation.main([str(folder), "--prompt", "The cache", "--max-new-tokens", "128"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: --max-new-tokens 128")
    assert generation.main(["no/such/folder", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "error: no/such/folder: no such file or folder\n"
    assert generation.main([str(folder), "--temperatur", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "--temperatur" in captured.err and captured.err.count("\n") == 1


def test_both_commands_give_the_same_text(folder, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    texts = []
    for name in ("torch", "flax"):
        generation.main([str(folder), "--framework", name, "--device", "cpu", "--prompt", "", "--max-new-tokens", "40"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_a_model_is_run_by_the_framework_that_wrote_it(monkeypatch):
    installed = {"torch": True, "flax": True}
    monkeypatch.setattr("train.state.trained.find_spec", lambda package: installed[package])
    kinds = {"torch": "torch", "flax": "flax", "weights": "flax", "neutral": "torch", "transformers": "torch"}
    for kind, framework in kinds.items():
        assert choose_framework(Source(kind, Path("x"), None), "auto") == framework
        assert choose_framework(Source(kind, Path("x"), None), "flax") == "flax"
    installed["torch"] = False
    assert choose_framework(Source("transformers", Path("x"), None), "auto") == "flax"
    with pytest.raises(UserError, match="--framework torch: is not installed"):
        choose_framework(Source("flax", Path("x"), None), "torch")


def test_stream_holds_back_incomplete_characters():
    bytes_of = [b"a", b"\xe4", b"\xb8", b"\x96", b" b", b"\xff"]
    written = []
    stream = TextStream(lambda ids: b"".join(bytes_of[i] for i in ids).decode(errors="replace"), written.append)
    for token in range(len(bytes_of)):
        stream.add(token)
    assert written == ["a", "世", " b"]
    stream.close()
    assert written == ["a", "世", " b", "\ufffd"]
