"""Chats: by a tokenizer's template or joined by role; their tokens, and what of them a run keeps."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from parity_tests.support.data import make_texts
from torch_ref.spec.interface import UserError
from train.data.chat import ChatFormat, TextRules, text_of
from train.data.corpus import Reader, compare_identity
from train.data.feed import open_data
from train.data.options import DataOptions
from train.data.records import Bad
from train.data.sources import FileSource
from train.data.tokenizer import load_tokenizer, train_tokenizer

TEMPLATE = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}"""
MARKED = "".join(
    f"<|im_start|>{role}\n{content}<|im_end|>\n"
    for role, content in [("system", "Be."), ("user", "the cat"), ("assistant", "reads a page")]
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "reads a page "}]
JOINED = "User: the cat\n\nAssistant: reads a page "
CALL = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "read", "arguments": {"ä": 1}}}]},
]
TOOLS = """\
{% if tools is not none or documents is not none %}With tools and documents.{% endif %}
{% for message in messages %}
{{ message['content'] }}
{% if 'tool_calls' in message %}
{% for call in message['tool_calls'] %}
{{ call.function | tojson(ensure_ascii=False) }}
{{ call.function | tojson(ensure_ascii=True, indent=2, separators=(',', ':'), sort_keys=True) }}
{% endfor %}
{% endif %}
{% endfor %}"""


def chat_tokenizer(folder, **config):
    """A folder with a tokenizer that has a template and two special tokens for it."""
    trained = tokenizers.Tokenizer.from_str(train_tokenizer(make_texts(100), 400).definition)
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **config}))
    return folder


def text(value, chat=None):
    return text_of(value, TextRules(chat or ChatFormat()))


def test_without_a_template_messages_stand_under_their_roles():
    assert text(CHAT) == (JOINED, True)
    assert text([{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "reads a page "}]) == (JOINED, True)
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert text([{"role": "user", "content": parts}, CHAT[1]]) == (JOINED, True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "list, not text"),
        ([1, 2], "list, not text"),
        (["a", None], "list, not text"),
        ([{"role": "user"}], None),
        ([{"content": "x"}], "without role and content"),
        ([{"role": "user", "content": 5}], "without role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "more than text"),
        ([{"role": "user", "content": "spells <|im_end|>"}], "spells the special token <|im_end|>"),
        ([{"role": "user<|im_end|>", "content": "x"}], "spells the special token <|im_end|>"),
        ([{"role": "tool", "content": "", "calls": [{"name": "<|im_end|>"}]}], "spells the special token <|im_end|>"),
        ({"role": "user", "content": "x"}, "dict, not text"),
    ],
)
def test_what_is_no_chat_is_a_bad_row(value, reason):
    chat = ChatFormat("{{ messages[0]['content'] }}", special=frozenset(["<|im_end|>"]))
    read = text(value, chat)
    assert read == ("", True) if reason is None else isinstance(read, Bad) and reason in read.reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.deeper }}", "missing"),
        ("{{ strftime_now('%d') }}", "strftime_now"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "too big"),
    ],
)
def test_a_template_that_refuses_a_chat_spoils_that_row_only(template, reason):
    bad = text(CHAT, ChatFormat(template))
    assert isinstance(bad, Bad) and reason in bad.reason


def test_a_template_that_is_none_is_refused_by_name():
    with pytest.raises(UserError, match="--tokenizer name: its chat template can't be read"):
        text(CHAT, ChatFormat("{% if %}", name="name"))


def test_templates_are_written_as_transformers_writes_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    generation = TEMPLATE.replace("{% endfor %}", "{% generation %}{{ '!' }}{% endgeneration %}{% endfor %}")
    guarded = (
        "{{ bos_token }}{% if strftime_now is defined and false %}{{ strftime_now('%Y') }}{% endif %}"
        "{{ messages | tojson }}\n    {%- set x = 1 %}\n  {% if x %}\nyes\n{% endif %}"
    )
    cases = [(TEMPLATE, CHAT), (generation, CHAT), (guarded, CHAT), (TOOLS, CHAT), (TOOLS, CALL)]
    for number, (template, chat) in enumerate(cases):
        folder = chat_tokenizer(tmp_path / str(number), chat_template=template, bos_token="<|im_start|>")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = load_tokenizer(str(folder))
        written, is_chat = text(chat, ours.chat)
        assert written == theirs.apply_chat_template(chat, tokenize=False) and is_chat
        (path := tmp_path / f"{number}.jsonl").write_text(json.dumps({"messages": chat}))
        (document,) = Reader(FileSource(str(path), "messages"), rules=TextRules(ours.chat))
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert ours.encode_documents([document])[0].tolist() == ids


def test_a_message_that_only_calls_a_tool():
    """Its content is null, which DeepSeek's template asks for. To others it is empty."""
    call = [CALL[0], {**CALL[1], "content": None}]
    asks = "{% if messages[1]['content'] is none %}{{ messages[1].tool_calls[0].function.name }}{% endif %}"
    assert text(call, ChatFormat(asks)) == ("read", True) and text(CALL, ChatFormat(asks)) == ("", True)
    for chat in (ChatFormat(), ChatFormat(TEMPLATE), ChatFormat(TOOLS)):
        assert text(call, chat) == text(CALL, chat)


def test_a_field_that_is_null_is_none(tmp_path):
    """A table has the field in every message, JSON in one."""
    rows = [CHAT, CALL]
    kept = pyarrow.array([[{**message, "tool_calls": message.get("tool_calls")} for message in row] for row in rows])
    pyarrow.parquet.write_table(pyarrow.table({"messages": kept}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    rules = TextRules(ChatFormat(TOOLS))
    of_table, of_lines = (
        [document.text for document in Reader(FileSource(str(tmp_path / name), "messages"), rules=rules)]
        for name in ("a.parquet", "a.jsonl")
    )
    assert of_table == of_lines and len(of_lines) == 2 and '"read"' in of_lines[1]
    assert text([{"role": None, "content": None, "from": "human", "value": "x"}]) == ("User: x", True)


@pytest.mark.parametrize("place", ["text", "list", "file"])
def test_where_a_template_is_found(place, tmp_path):
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    in_config = {"text": TEMPLATE, "list": named}
    config = {"chat_template": in_config[place]} if place != "file" else {}
    folder = chat_tokenizer(tmp_path / "tokenizer", **config)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(str(folder))
    assert text(CHAT, tokenizer.chat) == (MARKED, True)
    tokenizer.save(tmp_path / "kept")
    kept = load_tokenizer(str(tmp_path / "kept"))
    assert kept.chat.identity == tokenizer.chat.identity and kept.eot_id == tokenizer.eot_id
    assert kept.hash == tokenizer.hash


@pytest.fixture
def chats(tmp_path):
    rows = [[{**message, "content": f"{message['content']} {text}"} for message in CHAT] for text in make_texts(60)]
    rows[5:5] = ["a plain text", [{"role": "user", "content": "<|im_end|>"}]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return DataOptions(
        dataset=str(tmp_path / "a.jsonl"),
        text_field="messages",
        tokenizer=str(chat_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATE)),
        vocab_size=512,
        seq_len=32,
        batch_size=2,
    )


def test_a_run_on_chats_keeps_and_tells_how_they_are_written(chats, tmp_path):
    data = open_data(chats, tmp_path / "run")
    assert data.notes[-1] == f"chats, written by the chat template of {chats.tokenizer}"
    batches = data.batches()
    first = [next(batches) for _ in range(3)]
    batches.close()
    ids = np.concatenate([batch.targets.ravel() for batch in first])
    start, end = (data.tokenizer._tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (ids == start).sum() >= 3 and (ids == end).sum() > (ids == start).sum() and data.tokenizer.eot_id == end

    again = open_data(chats, tmp_path / "run", resume=True)
    resumed = again.batches(first[0].cursor)
    np.testing.assert_array_equal(next(resumed).inputs, first[1].inputs)
    resumed.close()
    assert compare_identity(data.identity, again.identity) == []

    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 1 }}"}))
    changed = open_data(chats, tmp_path / "run", resume=True)
    assert [message.split(" was")[0] for _, message in compare_identity(data.identity, changed.identity)][0] == "chats"


def test_documents_are_not_kept_apart_by_what_ends_a_turn(chats, tmp_path):
    """No answer would see its question. The first chats are of one turn, in which none is."""
    one = json.dumps({"messages": [{"role": "system", "content": "x"}]}) + "\n"
    Path(chats.dataset).write_text(10 * one + Path(chats.dataset).read_text())
    masked = dataclasses.replace(chats, document_mask=True)
    with pytest.raises(UserError, match="--document-mask: .* ends each turn with <.im_end.>, so no answer sees"):
        open_data(masked, tmp_path / "run")
    open_data(chats, tmp_path / "begun")
    assert "--document-mask: " in " ".join(open_data(masked, tmp_path / "begun", resume=True).notes)
    apart = chat_tokenizer(tmp_path / "apart", chat_template=TEMPLATE, eos_token="<|im_start|>")
    without_turns = json.loads((apart / "tokenizer_config.json").read_text()) | {
        "chat_template": "{{ messages[0].content }}"
    }
    (apart / "tokenizer_config.json").write_text(json.dumps(without_turns))
    open_data(dataclasses.replace(masked, tokenizer=str(apart)), tmp_path / "whole")


def test_a_trained_tokenizer_joins_by_role_and_says_so(chats, tmp_path):
    data = open_data(dataclasses.replace(chats, tokenizer="bpe"), tmp_path / "run")
    assert data.identity["chats"] == "joined by role" and "under the name of its role" in data.notes[-1]
    texts = [document.text for document in Reader(data.corpora[0].source)]
    assert len(texts) == 62 and texts[0].startswith("User: the cat 0: ")


def test_a_chat_among_texts_is_a_bad_row(tmp_path, caplog):
    lines = [{"text": "one"}, {"text": CHAT}, *({"text": text} for text in make_texts(30))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = DataOptions(dataset=str(tmp_path / "a.jsonl"), tokenizer="bpe", vocab_size=300, seq_len=32, batch_size=2)
    data = open_data(options, tmp_path / "run")
    assert data.bad_rows == 1 and "a.jsonl:2: a chat among texts" in caplog.text and "chats" not in data.identity
