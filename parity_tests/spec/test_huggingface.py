"""The bridge to `transformers`: every value in its place, exact round trips, equal logits, clear refusals.

`transformers` is the outside judge: none of its code is ours, and it loads the folder as it would anyone's. This file
passes under its version 5 and its version 4; `transformers_v4.sh` runs it under the latter.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.huggingface import SIDECAR, export_folder, import_folder
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import initial_values, parameter_table
from torch_ref.spec.storage import TensorReader, TensorSpec, TensorWriter, from_bfloat16_bits, to_bfloat16_bits

SMALL = ModelConfig(
    vocab_size=320,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    intermediate_size=56,
    moe_intermediate_size=24,
    max_position=640,
)
VARIANTS = {
    "grouped": SMALL,
    "all-heads": dataclasses.replace(SMALL, num_kv_heads=6, first_k_dense=1),
    "query-latent": dataclasses.replace(SMALL, q_lora_rank=16, n_shared_experts=2, routed_scaling_factor=1.5),
    "one-group": dataclasses.replace(SMALL, num_kv_heads=1, q_lora_rank=16, first_k_dense=1, num_experts_per_tok=3),
    "no-shared": dataclasses.replace(SMALL, n_shared_experts=0, rope_theta=1333.5),
    "dense": dataclasses.replace(SMALL, first_k_dense=3),
}
TOKENIZER = Path(__file__).resolve().parents[3] / "shared/data/smollm2-tokenizer"


def values_with_bias(config: ModelConfig, seed: int = 0):
    """Seeded values where nothing is at a neutral value: norms differ from 1 and the balance bias decides choices."""
    for row, value in initial_values(config, seed):
        noise = np.random.default_rng([seed, len(row.name), row.size]).standard_normal(row.shape, np.float32)
        if row.init == "ones":
            value = value + np.float32(0.1) * noise
        elif row.init == "zeros":
            value = np.float32(0.05) * noise
        yield row, value


def is_version_4(transformers) -> bool:
    return transformers.__version__.startswith("4.")


def imported(folder: Path):
    """Config of a folder, and its rows with their values as `Model.load_values` takes them."""
    config, arrays = import_folder(folder)
    return config, ((row, arrays[row.name]) for row in parameter_table(config))


def load(folder: Path, **settings):
    """The folder as `transformers` loads it, and what it said about the keys."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    return model.eval(), info


# Files


def test_files_are_what_the_safetensors_library_writes_and_reads(tmp_path):
    from safetensors.numpy import load_file, save_file

    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float64), "c": np.zeros((0, 4))}
    specs = [TensorSpec(name, value.shape, str(value.dtype)) for name, value in values.items()]
    with TensorWriter(tmp_path / "ours", specs, {"format": "pt"}) as writer:
        for name in ("c", "a", "b"):  # another order than declared
            writer.write(name, values[name])
    save_file({**values, "half": np.float16([0.5, np.inf])}, tmp_path / "theirs")
    theirs = TensorReader(tmp_path / "theirs")
    for name, value in values.items():
        np.testing.assert_array_equal(load_file(tmp_path / "ours")[name], value, strict=True)
        np.testing.assert_array_equal(theirs[name], value, strict=True)
    np.testing.assert_array_equal(theirs["half"], np.float32([0.5, np.inf]), strict=True)


def test_writer_wants_each_tensor_once_and_in_shape(tmp_path):
    specs = [TensorSpec("a", (2,), "float32"), TensorSpec("b", (2,), "float32")]
    with pytest.raises(ValueError, match="never written: b"), TensorWriter(tmp_path / "x", specs) as writer:
        writer.write("a", np.zeros(2))
        with pytest.raises(ValueError, match="a: written twice"):
            writer.write("a", np.zeros(2))
        with pytest.raises(ValueError, match=r"b: shape \(3,\), expected \(2,\)"):
            writer.write("b", np.zeros(3))
        with pytest.raises(ValueError, match="c: not a tensor of this file"):
            writer.write("c", np.zeros(2))


@pytest.mark.parametrize("damage", ["truncated", "text", "int64", "absent"])
def test_reader_names_a_damaged_file(tmp_path, damage):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(4, np.int64 if damage == "int64" else np.float32)}, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "text":
        path.write_text("not a tensor in sight")
    if damage == "absent":
        path.unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        TensorReader(path)


def test_bfloat16_rounds_to_nearest_even_like_torch():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    special = np.float32([0.0, -0.0, 1.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    value = np.concatenate([random[~np.isnan(random)], special])
    expected = torch.from_numpy(value).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16_bits(to_bfloat16_bits(value)), expected)
    assert np.isnan(from_bfloat16_bits(to_bfloat16_bits(np.uint32([0x7F800001, 0xFFFFFFFF]).view(np.float32)))).all()


# Export


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


def torch_logits(config, values, tokens):
    """Our torch model's float32 logits."""
    import torch

    from torch_ref.model import Model
    from torch_ref.spec.config import ComputeConfig

    model = Model(config).load_values(values)
    with torch.no_grad():
        return model.logits(model(tokens, ComputeConfig(attention="plain", moe="dense")).hidden)


def relative_error(value, expected) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


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
    one, many = TensorReader(tmp_path / "one/model.safetensors"), TensorReader(*files)
    assert one.keys() == many.keys() and all(np.array_equal(one[key], many[key]) for key in one)
    _, info = load(tmp_path / "many")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config, values = imported(tmp_path / "many")
    assert_same(values, values_with_bias(config))


def test_tokenizer_travels_with_its_end_of_text(tmp_path):
    if not TOKENIZER.exists():
        pytest.skip(f"no tokenizer at {TOKENIZER}")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL), tokenizer=TOKENIZER, end_of_text=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|endoftext|>", 0, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    text = "Fünf  words, 1234 and\n\tan indent."
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode(text).ids
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


# Import


def assert_same(values, expected) -> None:
    for (row, value), (expected_row, expected_value) in zip(values, expected, strict=True):
        assert row == expected_row
        np.testing.assert_array_equal(value, expected_value, err_msg=row.name, strict=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_our_export_comes_back_bitwise(tmp_path, name):
    config = VARIANTS[name]
    export_folder(tmp_path / "out", config, values_with_bias(config))
    back, values = imported(tmp_path / "out")
    assert back == config
    assert_same(values, values_with_bias(config))


def test_float64_comes_back_bitwise(tmp_path):
    def precise():
        return ((row, value + np.float64(1e-12)) for row, value in values_with_bias(SMALL))

    export_folder(tmp_path / "out", SMALL, precise(), dtype="float64")
    assert_same(imported(tmp_path / "out")[1], precise())


def test_values_may_come_in_any_order(tmp_path):
    forward = list(values_with_bias(SMALL))
    export_folder(tmp_path / "forward", SMALL, forward)
    export_folder(tmp_path / "backward", SMALL, reversed(forward))
    names = sorted(path.name for path in (tmp_path / "forward").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", SIDECAR]
    for name in names:
        assert (tmp_path / "forward" / name).read_bytes() == (tmp_path / "backward" / name).read_bytes()


def foreign(folder: Path, rope_theta: float = 10000.0, **changes):
    """A random DeepseekV3 made and saved by `transformers`, which knows nothing of our exporter."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = dict(
        vocab_size=200, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=600, tie_word_embeddings=True,
        initializer_range=0.2, rms_norm_eps=1e-5,
    )  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}}
    sizes |= {"rope_theta": rope_theta} if is_version_4(transformers) else rope
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "correction_bias" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_shared_experts": 2},
        {"rope_interleave": False},
        {
            "rope_interleave": False,
            "q_lora_rank": None,
            "rope_theta": 500.0,
        },
    ],
    ids=["query-latent", "query-plain", "halves", "halves-plain-theta"],
)
def test_a_foreign_model_becomes_ours_with_equal_logits(tmp_path, changes):
    torch = pytest.importorskip("torch")
    theirs = foreign(tmp_path / "theirs", **changes)
    config, values = imported(tmp_path / "theirs")
    assert config.num_kv_heads == config.num_heads == 4
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, 200, (2, 520)))
    with torch.no_grad():
        assert relative_error(torch_logits(config, values, tokens), theirs(tokens).logits) <= 1e-5


def test_what_is_saved_by_transformers_from_our_export_comes_back(tmp_path):
    """Fine-tuned elsewhere: `save_pretrained` drops our extra file, so every head has K/V rows of its own."""
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    model, _ = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "tuned")
    config, values = imported(tmp_path / "tuned")
    assert config == dataclasses.replace(SMALL, num_kv_heads=SMALL.num_heads)
    expected = {row.name: value for row, value in values_with_bias(SMALL)}
    for row, value in values:
        if "kv_b_proj" in row.name:
            value = value.reshape(2, 3, 22, 20)[:, 0].reshape(44, 20)
        np.testing.assert_array_equal(value, expected[row.name])


REFUSED_FIELDS = {
    "model_type": "deepseek_v2",
    "hidden_act": "gelu",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "quantization_config": {"quant_method": "fp8"},
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "rope_theta": 500.0,
    "hidden_size": 0,
    "num_attention_heads": 5,
    "kv_lora_rank": None,
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_import_names_the_config_field_it_refuses(tmp_path, field):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    (tmp_path / "out" / SIDECAR).unlink()
    path = tmp_path / "out/config.json"
    fields = json.loads(path.read_text()) | {field: REFUSED_FIELDS[field]}
    path.write_text(json.dumps(fields))
    ours = {"num_attention_heads": "num_key_value_heads = 6; .*num_attention_heads = 5"}
    with pytest.raises(UserError, match=ours.get(field, field)) as refusal:
        import_folder(tmp_path / "out")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["n_group", "tie_word_embeddings", "vocab_size"])
def test_a_field_left_out_means_the_default_of_transformers(tmp_path, field):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    path = tmp_path / "out/config.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=field):
        imported(tmp_path / "out")


WEIGHT_FAULTS = {
    "missing": "missing weights: model.layers.1.mlp.experts.3.up_proj.weight",
    "unexpected": "unexpected weights: model.layers.1.self_attn.q_proj.bias",
    "shape": r"model.norm.weight is \[3\], config.json asks \[48\]",
    "untied": "lm_head.weight differs",
    "multi-token": "num_nextn_predict_layers",
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_import_names_the_weights_it_refuses(tmp_path, fault):
    from safetensors.numpy import load_file, save_file

    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    if fault == "missing":
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors |= {
        "missing": {},
        "unexpected": {"model.layers.1.self_attn.q_proj.bias": np.zeros(3)},
        "shape": {"model.norm.weight": np.ones(3, np.float32)},
        "untied": {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        "multi-token": {"model.layers.3.eh_proj.weight": np.zeros(3)},
    }[fault]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=WEIGHT_FAULTS[fault]):
        imported(tmp_path / "out")


def test_a_folder_without_the_tied_head_is_accepted(tmp_path):
    from safetensors.numpy import load_file, save_file

    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    tensors = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "out/model.safetensors")
    assert_same(imported(tmp_path / "out")[1], values_with_bias(SMALL))


def test_groups_that_no_longer_hold_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.2.self_attn.kv_b_proj.weight"][30, 0] += 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match=f"layers.2.attention.kv_b_proj.weight.*num_kv_heads = 2.*delete {SIDECAR}"):
        list(imported(tmp_path / "out")[1])
    (tmp_path / "out" / SIDECAR).unlink()
    assert imported(tmp_path / "out")[0].num_kv_heads == 6


def test_a_sidecar_that_contradicts_config_json_is_refused(tmp_path):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    other = dataclasses.replace(SMALL, rope_theta=500.0)
    (tmp_path / "out" / SIDECAR).write_text(json.dumps({"model": other.to_dict()}))
    with pytest.raises(UserError, match=f"rope_theta = 500.0, but config.json says 10000.0; delete {SIDECAR}"):
        imported(tmp_path / "out")
