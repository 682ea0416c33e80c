"""Tokenizers: byte-level BPE trained on a corpus, folders, and what a run keeps."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from parity_tests.support.data import make_texts, write_tokenizer
from torch_ref.spec.interface import UserError
from train.data.corpus import Document
from train.data.tokenizer import TextTokenizer, load_tokenizer, open_tokenizer, text_pieces, train_tokenizer

TEXTS = make_texts(200)
STRANGE = [
    "",
    " ",
    "naïve café\r\n\ttabs",
    "漢字かな",
    "🙂‍🚀 e\u0301",
    "\x00\x7f",
    "<|endoftext|> and <|im_start|>",
    "  a  b  ",
]
SMOLLM = Path(__file__).parents[2] / ".." / "shared" / "data" / "smollm2-tokenizer"


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(params=["trained", "smollm"])
def tokenizer(request, trained):
    if request.param == "trained":
        return trained
    if not SMOLLM.exists():
        pytest.skip(f"no tokenizer in {SMOLLM}")
    return load_tokenizer(str(SMOLLM))


def test_every_text_comes_back(tokenizer):
    for text in [*TEXTS[:20], *STRANGE]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(STRANGE) == [tokenizer.encode(text) for text in STRANGE]


def test_text_never_contains_the_end_of_text(tokenizer):
    assert tokenizer.eot_id == 0
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"


def test_ids_are_cut_between_characters(tokenizer):
    ids = tokenizer.encode("x漢字漢字🙂")
    for count in range(len(ids) + 1):
        kept, text = tokenizer.cut(list(ids), count)
        assert len(kept) <= count and tokenizer.decode(kept) == text and "x漢字漢字🙂".startswith(text)
    assert text == "x漢字漢字🙂"


def test_a_trained_tokenizer_has_the_asked_size_and_all_bytes(trained):
    assert trained.vocab_size == 400
    assert len(trained.encode("the cat reads")) < len("the cat reads") / 2
    small = train_tokenizer(["ab"], 1000)
    assert small.vocab_size < 1000 and small.decode(small.encode("漢")) == "漢"


def test_training_does_not_depend_on_the_process(trained):
    code = (
        "from parity_tests.support.data import make_texts; from train.data.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(make_texts(200), 400).hash)"
    )
    for threads in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == trained.hash


def test_training_reads_a_bounded_part(monkeypatch):
    monkeypatch.setattr("train.data.tokenizer.TRAINING_BYTES", 10)
    texts = itertools.cycle(["a" * 6, "b" * 6, "c" * 6])
    train_tokenizer(texts, 300)
    assert next(texts) == "c" * 6


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(name))
        assert again.hash == tokenizer.hash and again.encode("the naïve cat") == tokenizer.encode("the naïve cat")


def test_transformers_reads_a_saved_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the naïve cat reads 漢字 1234"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eot_id


def test_settings_of_other_uses_are_put_aside(trained):
    """Truncation, padding and added tokens of a tokenizer.json belong to how others call it."""
    other = tokenizers.Tokenizer.from_str(trained.definition)
    other.enable_truncation(2)
    other.enable_padding(length=50)
    other.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ours = TextTokenizer(other.to_str(), "other")
    assert ours.encode_batch(["the cat reads a page"]) == [trained.encode("the cat reads a page")]


def with_tokens(folder, tokens, **config):
    """A tokenizer's folder with further special tokens, and a configuration."""
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    other.add_special_tokens(tokens)
    folder.mkdir(exist_ok=True)
    other.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


DEEPSEEK = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("tokens", "config", "end"),
    [
        ([DEEPSEEK], {}, DEEPSEEK),
        ([DEEPSEEK, "</s>"], {"eos_token": DEEPSEEK}, DEEPSEEK),
        ([DEEPSEEK, "</s>"], {"eos_token": {"content": DEEPSEEK, "lstrip": False}}, DEEPSEEK),
        (["<|endoftext|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        (["<|endoftext|>", "<|im_end|>"], {}, "<|endoftext|>"),
        (["<|endoftext|>", "</s>"], {"eos_token": "<none>"}, "<|endoftext|>"),
        (["<my end>"], {"eos_token": "<my end>"}, "<my end>"),
    ],
)
def test_the_end_of_text_is_what_its_owner_says_or_a_known_one(tokens, config, end, tmp_path):
    tokenizer = load_tokenizer(str(with_tokens(tmp_path / "other", tokens, **config)))
    assert tokenizer.end_of_text == end and tokenizer.eot_id == 2 + tokens.index(end)
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run")).eot_id == tokenizer.eot_id
    assert (f"ends with {end}" in tokenizer.hash) == (end not in ("<|endoftext|>", "</s>"))


def test_a_run_keeps_the_end_of_text_it_began_with(tmp_path):
    """Its tokenizer's folder is read again, but older versions did not ask its `eos_token`."""
    folder = with_tokens(tmp_path / "other", ["<|endoftext|>", "<|im_end|>"], eos_token="<|im_end|>")
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "run")
    (tmp_path / "run" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    kept = open_tokenizer(str(folder), 400, [], tmp_path / "run", keep=True)
    assert kept.end_of_text == "<|endoftext|>" and "ends" not in kept.hash
    assert open_tokenizer(str(folder), 400, [], tmp_path / "run", keep=False).end_of_text == "<|im_end|>"


def test_a_long_text_is_encoded_in_pieces_with_the_same_tokens(tokenizer, monkeypatch):
    text = "\n".join(TEXTS) + "\n\n  indented\n" + " ".join(TEXTS)
    whole = tokenizer.encode(text)
    monkeypatch.setattr("train.data.tokenizer.PIECE", 800)
    pieces = text_pieces(text)
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 800
    documents = [Document(one, "place", 0) for one in ("short", text, "", "漢" * 2000)]
    encoded = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
    assert encoded[:3] == [tokenizer.encode("short"), whole, []] and tokenizer.decode(encoded[3]) == "漢" * 2000


def test_unusable_tokenizers_are_refused_by_name(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "tokenizer.json").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for name in ("", "bytes", "empty", "missing/folder"):
        with pytest.raises(UserError, match="--tokenizer") as error:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    endless = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(UserError, match="no end-of-text token"):
        TextTokenizer(endless.to_str(), "endless")
    with pytest.raises(UserError, match="--tokenizer .* 400 tokens do not fit .* 399; choose another$"):
        trained.require_fit(399)  # a trained model: its size is what it is
    trained.save(tmp_path)
    with pytest.raises(UserError, match="do not fit .* 399; give --vocab-size 400, choose another, or bpe"):
        open_tokenizer(str(tmp_path), 399, (), tmp_path / "run", keep=False)
    with pytest.raises(UserError, match="leaves no room"):
        train_tokenizer(TEXTS, 256)


def test_without_a_network_one_line_says_so_at_once(tmp_path):
    code = (
        "from torch_ref.spec.interface import UserError; from train.data.tokenizer import load_tokenizer\n"
        "try: load_tokenizer('HuggingFaceTB/cosmo2-tokenizer')\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.count("\n") == 1 and "can't be reached" in done.stdout and "--preset tiny" in done.stdout


def test_a_run_goes_on_with_its_own_tokenizer(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    Path("bpe").mkdir()  # is not what `bpe` names
    trained.save(run)
    kept = open_tokenizer("bpe", 400, iter(make_texts(50, seed=5)), run, keep=True)
    assert kept.hash == trained.hash
    assert open_tokenizer("owner/name", 400, [], run, keep=True).hash == trained.hash  # no network needed
    assert open_tokenizer(str(tmp_path / "moved"), 400, [], run, keep=True).hash == trained.hash
    fresh = open_tokenizer("bpe", 400, iter(make_texts(50, seed=5)), run, keep=False)
    assert fresh.hash != trained.hash
    other = write_tokenizer(tmp_path / "other", make_texts(50, seed=5))
    assert open_tokenizer(str(other), 400, [], run, keep=True).hash != trained.hash  # a change is noticed
