"""What is written for `transformers`: every value in its place, equal logits, clear refusals.

`transformers` is the outside judge: none of its code is ours, and it loads the folder as it would anyone's. This file
and `test_huggingface_import.py` pass under its versions 5 and 4; `transformers_v4.sh` runs them under the latter.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.exports import (
    SMALL,
    VARIANTS,
    assert_same,
    imported,
    is_version_4,
    load,
    relative_error,
    torch_logits,
    values_with_bias,
)
from torch_ref.spec.huggingface import export_folder
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import parameter_table
from torch_ref.spec.storage import TensorReader, from_bfloat16_bits, to_bfloat16_bits

TOKENIZER = Path(__file__).resolve().parents[3] / "shared/data/smollm2-tokenizer"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_constant_lands_in_its_place(tmp_path, name):
    """A different number in every (layer, expert, matrix) and per row inside a matrix: a swapped expert, layer,
    projection, head or group shows. No key may be missing, unexpected or of another shape."""
    config = VARIANTS[name]
    constants = {}
    for index, row in enumerate(parameter_table(config)):
        rows = np.arange(row.size // row.shape[-1], dtype=np.float32).reshape(*row.shape[:-1], 1)
        constants[row.name] = np.broadcast_to(1000.0 * index + rows, row.shape).astype(np.float32)
    export_folder(tmp_path / "out", config, ((row, constants[row.name]) for row in parameter_table(config)))
    model, info = load(tmp_path / "out")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    loaded = {key: value.numpy() for key, value in model.state_dict().items()}
    assert np.array_equal(loaded.pop("lm_head.weight"), constants["embed_tokens.weight"])
    same = {"model.embed_tokens.weight": "embed_tokens.weight", "model.norm.weight": "norm.weight"}
    for theirs, ours in same.items():
        np.testing.assert_array_equal(loaded.pop(theirs), constants[ours])
    for layer in range(config.num_layers):
        _check_layer(config, layer, loaded, constants)
    assert all(value.size == 0 for value in loaded.values()), f"not checked: {sorted(loaded)}"


@pytest.mark.parametrize("name", VARIANTS)
def test_an_engine_that_does_not_tie_finds_every_tensor(tmp_path, name):
    """vLLM and mlx-lm have a head of their own, whatever config.json says: with the embedding's values, and one that
    is not another view of it."""
    torch = pytest.importorskip("torch")
    config = VARIANTS[name]
    export_folder(tmp_path / "out", config, values_with_bias(config))
    settings = json.loads((tmp_path / "out/config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "out/config.json").write_text(json.dumps(settings))
    model, info = load(tmp_path / "out")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr() and torch.equal(head, embedding)


def _check_layer(config, layer, loaded, constants):
    """The names of `transformers`, written out here a second time: the test must not use the mapping it tests."""
    ours = {name.removeprefix(f"layers.{layer}."): value for name, value in constants.items() if f"s.{layer}." in name}
    theirs = f"model.layers.{layer}."
    simple = {
        "input_layernorm.weight": "input_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_a_proj.weight",
        "self_attn.kv_a_layernorm.weight": "attention.kv_a_norm.weight",
        "self_attn.o_proj.weight": "attention.o_proj.weight",
    }
    if config.q_lora_rank is None:
        simple["self_attn.q_proj.weight"] = "attention.q_proj.weight"
    else:
        simple["self_attn.q_a_proj.weight"] = "attention.q_a_proj.weight"
        simple["self_attn.q_a_layernorm.weight"] = "attention.q_a_norm.weight"
        simple["self_attn.q_b_proj.weight"] = "attention.q_b_proj.weight"
    dense = layer < config.first_k_dense
    for projection in ("gate_proj", "up_proj", "down_proj"):
        if dense:
            simple[f"mlp.{projection}.weight"] = f"mlp.{projection}.weight"
        elif config.n_shared_experts:
            simple[f"mlp.shared_experts.{projection}.weight"] = f"mlp.shared_expert.{projection}.weight"
    if not dense:
        simple["mlp.gate.weight"] = "mlp.router.weight"
        simple["mlp.gate.e_score_correction_bias"] = "mlp.router.balance_bias"
    for key, name in simple.items():
        np.testing.assert_array_equal(loaded.pop(theirs + key), ours[name], err_msg=key)
    if not dense:
        for projection, value in _experts(loaded, theirs + "mlp.experts.").items():
            np.testing.assert_array_equal(value, ours[f"mlp.experts.{projection}"], err_msg=projection)
    size = config.qk_nope_head_dim + config.v_head_dim
    kv_b = loaded.pop(theirs + "self_attn.kv_b_proj.weight")
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        expected = ours["attention.kv_b_proj.weight"][group * size : (group + 1) * size]
        np.testing.assert_array_equal(kv_b[head * size : (head + 1) * size], expected)


def _experts(loaded, prefix) -> dict[str, np.ndarray]:
    """The routed experts of a layer, stacked: version 5 holds them as two tensors, version 4 as modules."""
    if prefix + "gate_up_proj" in loaded:
        gate, up = np.split(loaded.pop(prefix + "gate_up_proj"), 2, axis=1)
        return {"gate_proj": gate, "up_proj": up, "down_proj": loaded.pop(prefix + "down_proj")}
    experts = range(sum(key.startswith(prefix) for key in loaded) // 3)
    return {
        projection: np.stack([loaded.pop(f"{prefix}{expert}.{projection}.weight") for expert in experts])
        for projection in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(tmp_path, name, attention):
    """560 tokens at once and token by token with its cache: max abs difference over max abs logit at most 1e-5."""
    torch = pytest.importorskip("torch")
    config = VARIANTS[name]
    export_folder(tmp_path / "out", config, values_with_bias(config))
    theirs, _ = load(tmp_path / "out", attn_implementation=attention)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, config.vocab_size, (2, 560)))
    expected = torch_logits(config, values_with_bias(config), tokens)
    with torch.no_grad():
        assert relative_error(theirs(tokens).logits, expected) <= 1e-5
        start = 520
        past = theirs(tokens[:, :start], use_cache=True).past_key_values
        for position in range(start, tokens.shape[1]):
            step = theirs(tokens[:, position : position + 1], past_key_values=past, use_cache=True)
            past = step.past_key_values
            assert relative_error(step.logits[:, 0], expected[:, position]) <= 1e-5


def test_bfloat16_export_keeps_router_and_bias_in_float32(tmp_path):
    torch = pytest.importorskip("torch")
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), dtype="bfloat16")
    stored = {spec.name: spec.dtype for spec in TensorReader(tmp_path / "out/model.safetensors").specs.values()}
    wide = {name for name, dtype in stored.items() if dtype == "float32"}
    assert wide == {name for name in stored if ".mlp.gate." in name} and len(wide) == 2 * SMALL.num_layers
    assert set(stored.values()) == {"float32", "bfloat16"}
    model, info = load(tmp_path / "out", dtype="auto")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    gate = model.model.layers[0].mlp.gate
    expected = {row.name: value for row, value in values_with_bias(SMALL)}
    assert model.dtype == torch.bfloat16
    if gate.weight.dtype == torch.float32:  # version 4 and early version 5 round them while loading
        np.testing.assert_array_equal(gate.weight.detach().numpy(), expected["layers.0.mlp.router.weight"])
        np.testing.assert_array_equal(
            gate.e_score_correction_bias.numpy(), expected["layers.0.mlp.router.balance_bias"]
        )
    read = {row.name: value for row, value in imported(tmp_path / "out")[1]}
    for name, value in expected.items():
        rounded = value if ".router." in name else from_bfloat16_bits(to_bfloat16_bits(value))
        np.testing.assert_array_equal(read[name], rounded, err_msg=name, strict=True)


def test_config_states_every_field_and_no_head_dim(tmp_path):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), end_of_text=7)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert "head_dim" not in written
    assert written["num_key_value_heads"] == SMALL.num_heads
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    for field in ("rope_theta", "routed_scaling_factor", "rms_norm_eps", "initializer_range"):
        assert type(written[field]) is float
    assert written["bos_token_id"] == written["eos_token_id"] == 7
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    if is_version_4(transformers):
        own_fields = set(inspect.signature(type(loaded)).parameters) - {"kwargs", "rope_scaling"}
    else:
        own_fields = {field for field in type(loaded).__annotations__ if not field.startswith("base_model")}
    neutral = {"output_router_logits", "pad_token_id", "pretraining_tp", "num_mtp_layers", "attribute_map"}
    assert own_fields - written.keys() <= neutral, "a default of the 671B model is left standing"
    for field in own_fields & written.keys():
        assert getattr(loaded, field) == written[field], field
    assert loaded.num_nextn_predict_layers == 0
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (7, 7, 7)


def test_a_large_model_is_split_into_files(tmp_path):
    export_folder(tmp_path / "one", SMALL, values_with_bias(SMALL))
    export_folder(tmp_path / "many", SMALL, values_with_bias(SMALL), shard_bytes=100_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "many/model.safetensors").exists()
    assert all(path.stat().st_size < 110_000 for path in files)
    sizes = [sum(spec.nbytes for spec in TensorReader(path).specs.values()) for path in files]
    assert all(size + following > 100_000 for size, following in itertools.pairwise(sizes)), "as many as fit"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    one, many = TensorReader(tmp_path / "one/model.safetensors"), TensorReader(*files)
    assert one.keys() == many.keys() and all(np.array_equal(one[key], many[key]) for key in one)
    _, info = load(tmp_path / "many")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config, values = imported(tmp_path / "many")
    assert_same(values, values_with_bias(config))


@pytest.mark.parametrize("made", ["by training", "by others"])
def test_tokenizer_travels_with_its_end_of_text(tmp_path, made):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    source = TOKENIZER
    if made == "by training":
        from train.data.tokenizer import train_tokenizer

        source = tmp_path / "tokenizer"
        source.mkdir()
        train_tokenizer(["Five words, 1234 and an indent. " * 20], SMALL.vocab_size).save(source)
    elif not source.exists():
        pytest.skip(f"no tokenizer at {source}")
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), tokenizer=source, end_of_text=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|endoftext|>", 0, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    text = "Fünf  words, 1234 and\n\tan indent."
    inputs = tokenizer(text)
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_input_names"]
    assert list(inputs) == written == ["input_ids", "attention_mask"]  # all that `generate` takes, in version 4 too
    ids = inputs["input_ids"]
    assert ids == tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not list((tmp_path / "out").glob("**/special_tokens_map.json"))


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_chat_template_and_padding_travel_with_the_tokenizer(tmp_path, place):
    """Of a tokenizer whose own config names no `pad_token`, and wherever it keeps its template."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    source = tmp_path / "tokenizer"
    source.mkdir()
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({"<eot>": 0, **{c: i + 1 for i, c in enumerate("abc")}}, []))
    letters.add_special_tokens(["<eot>"])
    letters.save(str(source / "tokenizer.json"))
    if place == "chat_template.jinja":
        (source / place).write_text(TEMPLATE)
    else:
        (source / place).write_text(json.dumps({"chat_template": TEMPLATE}))
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), tokenizer=source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "ab"}, {"role": "model", "content": "c"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>ab\n<model>c\n"
    assert tokenizer(["a", "abc"], padding=True)["input_ids"] == [[1, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("added", ["template", "sequence", "by a foreign model"])
def test_texts_and_chats_get_the_tokens_they_were_trained_with(tmp_path, added):
    """Of a tokenizer that puts `<s>` before a text, which training here does not, but its chat template does."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pytest.importorskip("pyarrow")
    from parity_tests.support.data import byte_fallback_tokenizer
    from train.data.tokenizer import load_tokenizer

    theirs, run = tmp_path / "theirs", tmp_path / "run"
    theirs.mkdir()
    made = byte_fallback_tokenizer()
    if added == "sequence":
        parts = [tokenizers.processors.ByteLevel(trim_offsets=False), made.post_processor]
        made.post_processor = tokenizers.processors.Sequence(parts)
    made.save(str(theirs / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    trained = load_tokenizer(str(theirs))
    trained.save(run)
    foreign = added == "by a foreign model"
    settings = {"tokenizer": theirs if foreign else run, "end_of_text": trained.eot_id, "add_special_tokens": foreign}
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = trained.encode("the a 漢")
    assert tokenizer("the a 漢")["input_ids"] == ([1, *ids] if foreign else ids)
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == trained.chat.write(chat) == "<s>the</s>a</s>"


def test_the_end_of_text_may_be_a_piece_of_a_unigram_model(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    (tmp_path / "run").mkdir()
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)]
    tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0)).save(str(tmp_path / "run/tokenizer.json"))
    settings = {"tokenizer": tmp_path / "run", "end_of_text": 1}
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer("ab")["input_ids"]) == (1, [2, 3])


@pytest.mark.parametrize("fault", ["target in use", "no such token", "one expert"])
def test_export_refusals_leave_nothing_behind(tmp_path, fault):
    (tmp_path / "tokenizer").mkdir()
    vocabulary = {"model": {"vocab": {"<eot>": 0}}, "added_tokens": []}
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(vocabulary))
    config, settings = SMALL, {"tokenizer": tmp_path / "tokenizer"}
    if fault == "target in use":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("keep")
    elif fault == "no such token":
        settings["end_of_text"] = 5
    else:
        config = dataclasses.replace(SMALL, n_routed_experts=1, num_experts_per_tok=1)
    expected = {
        "target in use": "exists already",
        "no such token": "end-of-text id 5",
        "one expert": "n_routed_experts",
    }
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=expected[fault]):
        export_folder(tmp_path / "out", config, values_with_bias(config), **settings)
    assert sorted(tmp_path.rglob("*")) == before
