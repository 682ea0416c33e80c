"""Models of every shape, their values, and how `transformers` loads what is written of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.huggingface import import_folder
from torch_ref.spec.parameters import initial_values, parameter_table

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
    "odd-widths": dataclasses.replace(SMALL, hidden_size=45, moe_intermediate_size=21, v_head_dim=11),
}


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


def assert_same(values, expected) -> None:
    for (row, value), (expected_row, expected_value) in zip(values, expected, strict=True):
        assert row == expected_row
        np.testing.assert_array_equal(value, expected_value, err_msg=row.name, strict=True)
