"""A small model that a small Llama becomes, for the tests of the warm start."""

from __future__ import annotations

import numpy as np
import torch

from torch_ref.spec.config import ComputeConfig, ModelConfig
from train.warm_start.attention import kept_theta

THETA = 10000.0
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    kv_lora_rank=10,
    qk_nope_head_dim=16,
    qk_rope_head_dim=10,
    v_head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=96,
    n_routed_experts=4,
    max_position=128,
    rope_theta=kept_theta(THETA, 16, 10),
)
COMPUTE = ComputeConfig(attention="plain", moe="dense")


def llama_config(**changes):
    import transformers

    sizes = {
        "vocab_size": SMALL.vocab_size,
        "hidden_size": SMALL.hidden_size,
        "num_hidden_layers": SMALL.num_layers,
        "num_attention_heads": SMALL.num_heads,
        "num_key_value_heads": SMALL.num_kv_heads,
        "head_dim": SMALL.v_head_dim,
        "intermediate_size": SMALL.moe_intermediate_size,
        "rms_norm_eps": SMALL.rms_norm_eps,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaConfig(**sizes | changes)


def torch_model(config: ModelConfig, values):
    from torch_ref.model import Model

    return Model(config).load_values(values)


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model.logits(model(torch.from_numpy(tokens), COMPUTE).hidden).numpy()


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
