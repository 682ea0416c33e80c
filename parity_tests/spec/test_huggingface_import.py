"""Folders of `transformers` read back: ours bitwise, others' with equal logits, the rest refused by field or weight."""

from __future__ import annotations

import dataclasses
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
from torch_ref.spec.huggingface import SIDECAR, changed_tensors, export_folder, import_folder
from torch_ref.spec.interface import UserError


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


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", ["yarn", [1, 2]])
def test_frequencies_that_are_no_object_are_refused(tmp_path, field, value):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=f"config.json: {field} = .*must be an object"):
        import_folder(tmp_path / "out")


def test_checksums_that_are_no_object_are_refused(tmp_path):
    export_folder(tmp_path / "out", SMALL, values_with_bias(SMALL))
    path = tmp_path / "out" / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": [1]}))
    with pytest.raises(UserError, match=f"{SIDECAR}: checksums is no object"):
        changed_tensors(tmp_path / "out")


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
