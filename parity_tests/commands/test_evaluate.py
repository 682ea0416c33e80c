"""Evaluation and the command lines: one score in torch, Flax and `transformers`; the text alone on standard output."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parity_tests.support.data import byte_fallback_tokenizer
from parity_tests.support.trained import DOCUMENTS, MODEL, trained_folder
from torch_ref.spec.interface import IGNORE, Sampling, UserError
from train import evaluate as evaluation
from train import generate as generation
from train.data.packing import document_rows
from train.data.tokenizer import TextTokenizer
from train.evaluate import batches, evaluate
from train.generate import TextStream
from train.state.source import Source
from train.state.trained import choose_framework, open_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("trained"))


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
    rows = [(row[row_targets != IGNORE], row_targets[row_targets != IGNORE])
            for document in documents for row, row_targets in zip(*document, strict=True)]  # fmt: skip
    got = list(batches(rows, 96))
    assert {batch.inputs.shape for _, batch in got} == {(64, 64), (42, 96)}
    assert sorted(number for numbers, _ in got for number in numbers) == list(range(len(rows)))
    for numbers, batch in got:
        for place, number in enumerate(numbers):
            length = len(rows[number][0])
            np.testing.assert_array_equal(batch.inputs[place, :length], rows[number][0])
            np.testing.assert_array_equal(batch.targets[place, :length], rows[number][1])
        scored = sum(len(rows[number][0]) for number in numbers)
        assert (batch.targets != IGNORE).sum() == scored


def test_full_batches_come_before_the_end():
    rows = ((np.full(31, 7, np.int32), np.full(31, 7, np.int32)) for _ in range(150))
    shapes = [(batch.inputs.shape, int((batch.targets != IGNORE).sum())) for _, batch in batches(rows, 64)]
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


def test_rows_and_documents_are_as_long_as_asked(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    text = "".join(f"line {number} says this\n" for number in range(20))
    (tmp_path / "a.txt").write_text(text)
    arguments = [str(folder), "--framework", "torch", "--device", "cpu", "--data", str(tmp_path / "a.txt")]
    model = open_trained(folder, "torch", device="cpu")
    assert evaluation.main([*arguments, "--seq-len", "32"]) == 0
    score = evaluate(model, [text], 32)
    assert capsys.readouterr().out == f"{score}\n" and str(score) != str(evaluate(model, [text], 128))
    assert evaluation.main([*arguments, "--document-bytes", "256"]) == 0
    assert f"(2 documents, {score.tokens + 1} tokens, {len(text)} bytes)" in capsys.readouterr().out


def test_validation_datasets_are_scored_apart(folder, tmp_path, capsys):
    """Named ones, or else those of the run; each whole."""
    pytest.importorskip("torch")
    (tmp_path / "one.txt").write_text(DOCUMENTS[0])
    rows = [{"body": DOCUMENTS[2]}, {"body": DOCUMENTS[3]}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(folder), "--framework", "torch", "--device", "cpu"]
    files = [f"one={tmp_path / 'one.txt'}", f"two={tmp_path / 'two.jsonl'}"]
    named = ["--validation-dataset", files[0], f"--validation-dataset={files[1]}"]
    assert evaluation.main([*arguments, *named, "--text-field", "body"]) == 0
    out = capsys.readouterr().out
    model = open_trained(folder, "torch", device="cpu")
    scores = [evaluate(model, texts, 128) for texts in (DOCUMENTS[:1], DOCUMENTS[2:])]
    assert out == f"one: {scores[0]}\ntwo: {scores[1]}\n"

    run = shutil.copytree(folder, tmp_path / "run")
    (run / "settings.toml").write_text(f'validation_dataset = {json.dumps(files)}\ntext_field = ["body"]\n')
    assert evaluation.main([str(run), *arguments[1:]]) == 0
    assert capsys.readouterr().out == out
    assert evaluation.main(arguments) == 2
    assert "--data, --validation-dataset or --benchmark: name the files" in capsys.readouterr().err


def test_chats_are_scored_as_the_tokenizer_writes_them(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    chat = [{"role": "user", "content": "The cache"}, {"role": "assistant", "content": "holds one latent."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    arguments = ["--framework", "torch", "--device", "cpu", "--text-field", "messages", "--data"]
    assert evaluation.main([str(folder), *arguments, str(tmp_path / "chats.jsonl")]) == 0
    text = "User: The cache\n\nAssistant: holds one latent."
    model = open_trained(folder, "torch", device="cpu")
    assert capsys.readouterr().out == f"{evaluate(model, [text], 128)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/file.txt"], "--data no/such/file.txt"),
        (["--document-bytes", "255"], "--document-bytes 255: must be 0 or from 256"),
        (["--seq-len", "0"], "--seq-len 0: must be from 1 to the model's context of 128"),
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
    (file := tmp_path / "a.jsonl").write_text('{"other": 1}\n')
    for given in (["--data", str(file)], ["--validation-dataset", f"news={file}"]):
        assert evaluation.main([str(folder), *given]) == 2
        assert f"error: {' '.join(given)}: no text in there" in capsys.readouterr().err


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


def test_a_prompt_that_does_not_fit_leaves_the_next_one_its_turn(folder, capsys, monkeypatch):
    pytest.importorskip("torch")
    arguments = [str(folder), "--framework", "torch", "--max-new-tokens", "3", "--greedy"]
    assert generation.main([*arguments, "--prompt", "The cache"]) == 0
    text = capsys.readouterr().out
    typed = io.StringIO(f"{'cache ' * 1000}\nThe cache\n\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    assert generation.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == text and "error: --max-new-tokens 3: " in captured.err


def test_every_flag_of_generate_reaches_the_sampling(folder):
    options = generation.GenerateOptions(
        folder, max_new_tokens=3, greedy=True, temperature=0.5, top_k=6, top_p=0.7, min_p=0.1, repetition_penalty=1.2
    )
    assert options.sampling(9) == Sampling(
        max_new_tokens=3,
        greedy=True,
        repetition_penalty=1.2,
        temperature=0.5,
        top_k=6,
        top_p=0.7,
        min_p=0.1,
        stop_token=9,
    )


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
    written = stream_bytes([b"a", b"\xe4", b"\xb8", b"\x96", b" b", b"\xff", b"", b"c", b"\xe4", b"\xb8"])
    assert written == ["a", "世", " b", "\ufffdc", "\ufffd"]


def stream_bytes(tokens: list[bytes]) -> list[str]:
    """What a stream writes of these tokens one after the other. It may decode few at a time, and hold back no more than
    what may still become a character: nothing but U+FFFD, of the last three tokens."""
    written = []

    def decode(ids: list[int]) -> str:
        parts = [tokens[number] for number in ids if tokens[number]]
        assert len(parts) <= 8
        return b"".join(parts).decode(errors="replace")

    stream = TextStream(decode, written.append)
    for number in range(len(tokens)):
        stream.add(number)
        read = [token for token in tokens[: number + 1] if token]
        text, said = b"".join(read).decode(errors="replace"), "".join(written)
        decided = b"".join(read[:-3]).decode(errors="replace").removesuffix("\ufffd")
        assert text.startswith(said) and said.startswith((decided, text.rstrip("\ufffd")))
        assert len(said) >= max(len(decided), len(text.rstrip("\ufffd")))
    stream.close()
    assert "".join(written) == b"".join(tokens).decode(errors="replace")
    return written


@pytest.mark.parametrize("text", ["the 漢字 a", "漢字漢字漢字 é", "🙂🙂 the the", "   a ", "a\ufffdb"])
@pytest.mark.parametrize("before", ["", "the", "é漢"])
def test_stream_of_bytes_one_a_token_is_their_text(text, before):
    """Of a tokenizer as Llama's: a sequence of bytes that is cut in a character decodes to U+FFFD for each byte of it,
    and a text begins without the space that its first token has."""
    tokenizer = TextTokenizer(byte_fallback_tokenizer().to_str(), "made here", {"eos_token": "</s>"})
    whole = tokenizer.encode(before + text)
    ids = whole[len(tokenizer.encode(before)) :]
    assert tokenizer.encode(before) + ids == whole and tokenizer.decode_after(tokenizer.encode(before), ids) == text
    written = []
    stream = TextStream(tokenizer.decode, written.append, tokenizer.encode(before))
    for token in ids:
        stream.add(token)
    assert "".join(written) == text
    stream.close()
    assert "".join(written) == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_continuation_keeps_the_space_it_begins_with(stream, capsys):
    tokenizer = TextTokenizer(byte_fallback_tokenizer().to_str(), "made here", {"eos_token": "</s>"})
    new = tokenizer.encode("the a 漢")[1:]

    def generate(prompts, sampling, seed, on_token=None):
        for token in new if on_token else []:
            on_token([token])
        return [new]

    model = SimpleNamespace(tokenizer=tokenizer, generate=generate)
    text = generation.continue_text(model, "the", generation.GenerateOptions(Path()), stream)
    assert text == " a 漢" and capsys.readouterr().out == (" a 漢\n" if stream else "")


def test_stream_of_any_bytes_is_their_text():
    """Of random bytes, of parts of characters, and of invalid bytes that never end."""
    generator = np.random.default_rng(0)
    characters = "aé世😀\ufffd".encode()
    for _ in range(200):
        size = int(generator.integers(1, 60))
        values = generator.choice(np.frombuffer(characters, np.uint8), size).tobytes()
        cuts = np.sort(generator.integers(0, size, 30))
        stream_bytes([values[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)])
    stream_bytes([b"\xff"] * 2000 + [b"\xe4", b"\xb8", b"\x96"])


@pytest.mark.parametrize("way", ["prompt", "input", "undecodable input"])
def test_bytes_that_are_no_text_are_refused_in_one_line(folder, capsys, monkeypatch, way):
    pytest.importorskip("torch")
    arguments, stdin = [str(folder), "--framework", "torch"], io.BytesIO(b"a\xffb")
    if way == "prompt":
        arguments += ["--prompt", "a\udcffb"]  # Python's reading of the argument a\xffb
    errors = "surrogateescape" if way == "input" else "strict"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin, encoding="utf-8", errors=errors))
    assert generation.main(arguments) == 2
    captured = capsys.readouterr()
    what = {"prompt": "--prompt", "input": "standard input", "undecodable input": "standard input"}[way]
    place = "at byte 2" if way == "undecodable input" else "at character 2"
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"error: {what}: not UTF-8 text, {place}"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_an_ascii_terminal_lacks_is_escaped(folder, monkeypatch, terminal):
    pytest.importorskip("torch")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    out.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", out)

    def decode(self, ids):
        return "".join("ü世"[number % 2] for number in ids)

    monkeypatch.setattr("train.data.tokenizer.TextTokenizer.decode", decode)
    arguments = [str(folder), "--framework", "torch", "--prompt", "Grüße", "--max-new-tokens", "10"]
    assert generation.main([*arguments, "--repetition-penalty", "1.1", "--seed", "2"]) == 0
    out.flush()
    written = out.buffer.getvalue().decode("ascii")
    assert written.count("\\xfc") + written.count("\\u4e16") == 10
    assert written.replace("\\xfc", "").replace("\\u4e16", "") == "\n"
