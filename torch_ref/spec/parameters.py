"""The parameter table: one row per tensor of the model, from which everything else about parameters follows.

The rows drive initialisation, the count, the weight-decay mask, sharding, and every conversion (Flax, torch,
`transformers`). A new parameter is one row here and one use in each model.

Both frameworks store every weight in the same orientation, [out, in], so converting between them never transposes:
`o_proj` is square, and a forgotten transpose there would not even raise. Flax adds one thing: the tensors of
consecutive layers are stacked along a leading `layers` axis (`flax_path`).

NumPy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torch_ref.spec.config import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One row: a tensor of one layer (or of none), as it is named in the torch model's state dict."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """A name per dimension, for sharding; `jaxtyping` annotations use the same names."""
    init: Literal["normal", "ones", "zeros"] = "normal"
    decay: bool = True
    """Whether AdamW's weight decay applies: matrices yes, norms no."""
    trainable: bool = True
    """False for the balance bias, which the optimizer and the gradient never see."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _norm(name: str, size: int, axis: str) -> Parameter:
    return Parameter(f"{name}.weight", (size,), (axis,), init="ones", decay=False)


def _swiglu(name: str, hidden: int, ffn: int) -> Iterator[Parameter]:
    for projection in ("gate_proj", "up_proj"):
        yield Parameter(f"{name}.{projection}.weight", (ffn, hidden), ("ffn", "hidden"))
    yield Parameter(f"{name}.down_proj.weight", (hidden, ffn), ("hidden", "ffn"))


def _attention(config: ModelConfig, name: str) -> Iterator[Parameter]:
    c = config
    query_size = c.num_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        yield Parameter(f"{name}.q_proj.weight", (query_size, c.hidden_size), ("heads", "hidden"))
    else:
        yield Parameter(f"{name}.q_a_proj.weight", (c.q_lora_rank, c.hidden_size), ("q_latent", "hidden"))
        yield _norm(f"{name}.q_a_norm", c.q_lora_rank, "q_latent")
        yield Parameter(f"{name}.q_b_proj.weight", (query_size, c.q_lora_rank), ("heads", "q_latent"))
    # Rows of kv_a_proj: the latent first, then the rotary key that all heads share.
    latent_and_rope = c.kv_lora_rank + c.qk_rope_head_dim
    yield Parameter(f"{name}.kv_a_proj.weight", (latent_and_rope, c.hidden_size), ("latent", "hidden"))
    yield _norm(f"{name}.kv_a_norm", c.kv_lora_rank, "latent")
    # Rows of kv_b_proj: per K/V head its keys' part without position, then its values.
    key_and_value = c.num_kv_heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield Parameter(f"{name}.kv_b_proj.weight", (key_and_value, c.kv_lora_rank), ("kv_heads", "latent"))
    yield Parameter(f"{name}.o_proj.weight", (c.hidden_size, c.num_heads * c.v_head_dim), ("hidden", "heads"))


def _moe(config: ModelConfig, name: str) -> Iterator[Parameter]:
    c = config
    experts, ffn, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
    yield Parameter(f"{name}.router.weight", (experts, hidden), ("experts", "hidden"))
    yield Parameter(f"{name}.router.balance_bias", (experts,), ("experts",), "zeros", decay=False, trainable=False)
    for projection in ("gate_proj", "up_proj"):
        yield Parameter(f"{name}.experts.{projection}", (experts, ffn, hidden), ("experts", "ffn", "hidden"))
    yield Parameter(f"{name}.experts.down_proj", (experts, hidden, ffn), ("experts", "hidden", "ffn"))
    if c.n_shared_experts:
        yield from _swiglu(f"{name}.shared_expert", hidden, c.n_shared_experts * ffn)


def layer_table(config: ModelConfig, layer: int) -> tuple[Parameter, ...]:
    """The rows of one layer, with names that start at `layers.<layer>.`."""
    name = f"layers.{layer}"
    dense = layer < config.first_k_dense
    return (
        _norm(f"{name}.input_norm", config.hidden_size, "hidden"),
        *_attention(config, f"{name}.attention"),
        _norm(f"{name}.post_attention_norm", config.hidden_size, "hidden"),
        *(
            _swiglu(f"{name}.mlp", config.hidden_size, config.intermediate_size)
            if dense
            else _moe(config, f"{name}.mlp")
        ),
    )


def parameter_table(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every tensor of the model, balance biases included, in the order of the forward pass."""
    return (
        Parameter("embed_tokens.weight", (config.vocab_size, config.hidden_size), ("vocab", "hidden")),
        *(row for layer in range(config.num_layers) for row in layer_table(config, layer)),
        _norm("norm", config.hidden_size, "hidden"),
    )


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters, by the table."""
    return sum(row.size for row in parameter_table(config) if row.trainable)


def closed_form_count(config: ModelConfig) -> int:
    """Trainable parameters, by arithmetic on the sizes alone: what the table and both models are tested against."""
    c, h = config, config.hidden_size
    query = c.num_heads * c.qk_head_dim
    q = h * query if c.q_lora_rank is None else c.q_lora_rank * (h + 1 + query)
    kv = h * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    kv += c.num_kv_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    attention = q + kv + c.num_heads * c.v_head_dim * h + 2 * h
    moe = 3 * h * c.moe_intermediate_size * (c.n_routed_experts + c.n_shared_experts) + c.n_routed_experts * h
    dense = 3 * h * c.intermediate_size
    return c.vocab_size * h + h + c.num_layers * attention + c.num_moe_layers * moe + c.first_k_dense * dense


def count_active_parameters(config: ModelConfig) -> int:
    """Trainable parameters that take part in one token's forward pass: of the routed experts only those chosen."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    unused = 3 * config.hidden_size * config.moe_intermediate_size * idle * config.num_moe_layers
    return count_parameters(config) - unused


def flax_path(config: ModelConfig, name: str) -> tuple[tuple[str, ...], int | None]:
    """Where a row lives in the Flax model: the path of its tensor, and its index on the stacked `layers` axis.

    The first `first_k_dense` layers are stacked in `dense_layers`, the others in `layers`; a row outside the layers
    has no index. `layers.3.attention.o_proj.weight` is (("layers", "attention", "o_proj", "weight"), 3).
    """
    first, *rest = name.split(".")
    if first != "layers":
        return (first, *rest), None
    layer = int(rest[0])
    if layer < config.first_k_dense:
        return ("dense_layers", *rest[1:]), layer
    return ("layers", *rest[1:]), layer - config.first_k_dense


def initial_value(row: Parameter, config: ModelConfig, seed: int) -> np.ndarray:
    """The float32 start value of one tensor: a function of its name, its shape and the seed alone, so that the same
    seed gives the same weights in both frameworks, whatever order they are made in."""
    if row.init == "ones":
        return np.ones(row.shape, np.float32)
    if row.init == "zeros":
        return np.zeros(row.shape, np.float32)
    digest = hashlib.sha256(f"{seed}:{row.name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    value = generator.standard_normal(row.shape, dtype=np.float32)
    value *= np.float32(config.init_std)
    return value


def initial_values(config: ModelConfig, seed: int) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Every row with its start value. Two threads draw ahead (NumPy releases the interpreter while drawing)."""
    with ThreadPoolExecutor(2) as pool:
        ahead: list = []
        for row in parameter_table(config):
            ahead.append((row, pool.submit(initial_value, row, config, seed)))
            if len(ahead) > 4:
                first, future = ahead.pop(0)
                yield first, future.result()
        for row, future in ahead:
            yield row, future.result()


def rope_table(config: ModelConfig, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary angles, each float64 [positions, rope / 2], for positions 0 .. length - 1.

    Inverse frequencies and angles are rounded to float32 at the places where `transformers` (DeepseekV3 rotary
    embedding) rounds them, so that exported models see the same angles; the cosine of that angle is exact.
    """
    length = config.max_position if length is None else length
    exponent = np.arange(0, config.qk_rope_head_dim, 2).astype(np.float32) / np.float32(config.qk_rope_head_dim)
    power = (float(np.float32(config.rope_theta)) ** exponent.astype(np.float64)).astype(np.float32)
    inverse_frequency = np.float32(1) / power
    angle = np.arange(length, dtype=np.float32)[:, None] * inverse_frequency
    return np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
