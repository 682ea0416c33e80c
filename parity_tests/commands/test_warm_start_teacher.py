"""Old models that a warm start refuses, field by field and tensor by tensor, and the tokenizer that a GGUF file has."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from torch_ref.spec.interface import UserError
from train.data.tokenizer import train_tokenizer

pytest.importorskip("torch", reason="the warm start fits with torch")
transformers = pytest.importorskip("transformers", reason="the old model is read with transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from parity_tests.support.warm import SMALL, llama_config  # noqa: E402
from train.warm_start.teacher import check_shape, read_teacher  # noqa: E402


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 80),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("intermediate_size", 128),
        ("vocab_size", 1024),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", False),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 500000.0),
    ],
)
def test_a_teacher_of_another_shape_is_refused_by_field(field, value):
    check_shape("old", llama_config(), SMALL)
    with pytest.raises(UserError, match=rf"--from old: {field} is "):
        check_shape("old", llama_config(**{field: value}), SMALL)


@pytest.mark.parametrize(
    ("key", "like", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "is missing in its weights"),
        ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight", "is among its weights, which a Llama of its "),
        ("lm_head.weight", "model.embed_tokens.weight", "differs from the embedding, but tie_word_embeddings is True"),
    ],
)
def test_a_checkpoint_that_transformers_reads_as_another_model_is_refused(tmp_path, key, like, said):
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    train_tokenizer(["a b c"], 260).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if like:
        weights[key] = weights[like] + 1
    else:
        del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--from .*: {key} {said}"):
        read_teacher(str(tmp_path))


def test_another_architecture_is_refused():
    with pytest.raises(UserError, match="model_type is gpt2"):
        check_shape("old", transformers.GPT2Config(), SMALL)


@pytest.mark.parametrize(
    ("field", "value"), [("q_lora_rank", 8), ("first_k_dense", 1), ("qk_nope_head_dim", 4), ("qk_nope_head_dim", 15)]
)
def test_a_new_model_that_cannot_be_filled_is_refused_by_field(field, value):
    with pytest.raises(UserError, match=f"{field} = {value}: must be"):
        check_shape("old", llama_config(), dataclasses.replace(SMALL, **{field: value}))


def test_a_gguf_files_own_tokenizer(tmp_path):
    """SmolLM's splits numbers into digits, which the file says by a name only."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from train.warm_start.teacher import _gguf_tokenizer

    model = json.loads(train_tokenizer(["in 1984 the 1984 of 1984, the in 1984"] * 40, 300).definition)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    tokenizer = _gguf_tokenizer(file)
    assert tokenizer.eot_id == 0
    assert [tokenizer.decode([number]) for number in tokenizer.encode("the 1984")][-4:] == list("1984")
    assert tokenizer.decode(tokenizer.encode("the  é 1984")) == "the  é 1984"
    assert json.loads(tokenizer.definition)["added_tokens"][0]["content"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "its tokenizer is no byte-level BPE"),
        ({"pre": None}, "has no tokenizer.ggml.pre"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
    ],
)
def test_a_gguf_file_whose_tokenizer_cannot_be_had_is_refused(monkeypatch, changes, message):
    from train.warm_start.teacher import _gguf_tokenizer

    stored = {"model": "gpt2", "pre": "smollm", "tokens": ["a"], "merges": [], "token_type": [1]} | changes
    fields = {
        f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda value=value: value)
        for name, value in stored.items()
        if value is not None
    }
    reader = SimpleNamespace(fields=fields)
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=lambda path: reader))
    with pytest.raises(UserError) as error:
        _gguf_tokenizer(Path("old.gguf"))
    assert str(error.value) == f"--from old.gguf: {message}; name the model's transformers folder instead"
