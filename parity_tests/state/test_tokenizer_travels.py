"""The tokenizer that goes with weights, from form to form: the same text and the same chats get the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity_tests.harness.cases import CONFIG
from parity_tests.support.data import byte_fallback_tokenizer
from torch_ref.spec.interface import TrainingState
from torch_ref.spec.parameters import initial_values
from train.convert import convert
from train.data.tokenizer import load_tokenizer
from train.state.neutral import RUN, write_state
from train.state.source import locate

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def state(tmp_path) -> Path:
    """Weights in neutral form, with the tokenizer of a run."""
    (tmp_path / "run").mkdir()
    byte_fallback_tokenizer().save(str(tmp_path / "run/tokenizer.json"))
    (tmp_path / "run/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    write_state(tmp_path / "state", TrainingState(CONFIG, weights), tmp_path / "run")
    return tmp_path / "state"


def test_the_run_folder_in_a_neutral_folder_is_found(state, tmp_path):
    assert locate(state).run == state / RUN
    convert(state, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_a_tokenizer_adds_special_tokens_where_the_model_was_trained_with_them(state, tmp_path):
    """Those of an export are left out, as training adds none; those of a foreign model stay."""
    convert(state, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["post_processor"] is None
    foreign = (state / RUN / "tokenizer.json").read_bytes()
    (tmp_path / "out/tokenizer.json").write_bytes(foreign)
    convert(tmp_path / "out", tmp_path / "again", "transformers", "bfloat16")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == foreign


@pytest.mark.parametrize("form", ["neutral", "torch", "flax", "transformers"])
def test_a_chat_template_in_a_file_of_its_own_goes_along(state, tmp_path, form):
    convert(state, tmp_path / "theirs", "transformers")
    (tmp_path / "theirs/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "theirs/chat_template.jinja").write_text(TEMPLATE)
    if form == "torch":
        pytest.importorskip("torch")
    convert(tmp_path / "theirs", tmp_path / "out", form)
    tokenizer = load_tokenizer(str(locate(tmp_path / "out").run))
    assert tokenizer.chat.write(CHAT) == "<s>the</s>a</s>"


@pytest.mark.parametrize(("stated", "end"), [(2, 2), ([5, 2], 5), (None, 0), ("</s>", 0), ([], 0)])
def test_the_end_of_text_of_weights_without_a_tokenizer_stays(state, tmp_path, stated, end):
    """As `save_pretrained` of a model leaves a folder."""
    convert(state, tmp_path / "theirs", "transformers")
    for path in (tmp_path / "theirs").glob("tokenizer*"):
        path.unlink()
    config = tmp_path / "theirs/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": stated}))
    convert(tmp_path / "theirs", tmp_path / "out", "transformers", "bfloat16")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == end
