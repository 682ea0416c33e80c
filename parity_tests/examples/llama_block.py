"""One decoder block of `transformers`' Llama, and a small Flax one that should be the same. Compare them with

python -m parity_tests.compare parity_tests/examples/llama_block.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EPS = 64, 8, 2, 8, 96, 1e-5
BATCH, SEQ = 2, 48

# The torch side: a module, and what it is called with.


def torch_side():
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=INTERMEDIATE,
        rms_norm_eps=EPS,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    block = LlamaDecoderLayer(config, layer_idx=0)
    hidden = torch.randn(BATCH, SEQ, HIDDEN)
    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), -1e30).triu(1)[None, None]
    return block, {"hidden_states": hidden, "attention_mask": mask, "position_embeddings": (cos, sin)}


# The Flax side: what a port would look like.


class RMSNorm(nnx.Module):
    def __init__(self, size):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPS)
        return self.scale * wide.astype(x.dtype)


def rotate(x, cos, sin):
    """x [batch, seq, heads, head_dim]; pairs are a value of the first half and one of the second."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos[:, :, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, :, None]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(HIDDEN, (HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.k = nnx.LinearGeneral(HIDDEN, (KV_HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.v = nnx.LinearGeneral(HIDDEN, (KV_HEADS, HEAD_DIM), use_bias=False, rngs=rngs)
        self.o = nnx.Linear(HEADS * HEAD_DIM, HIDDEN, use_bias=False, rngs=rngs)

    def __call__(self, x, cos, sin):
        q, k, v = rotate(self.q(x), cos, sin), rotate(self.k(x), cos, sin), self.v(x)
        k, v = (jnp.repeat(each, HEADS // KV_HEADS, axis=2) for each in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
        scores = jnp.where(np.tri(SEQ, dtype=bool), scores, -1e30)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.Linear(HIDDEN, INTERMEDIATE, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(HIDDEN, INTERMEDIATE, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(INTERMEDIATE, HIDDEN, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.input_norm, self.mlp_norm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.attention, self.mlp = Attention(rngs), MLP(rngs)

    def __call__(self, hidden_states, attention_mask, position_embeddings):
        x = hidden_states
        x = x + self.attention(self.input_norm(x), *position_embeddings)
        return x + self.mlp(self.mlp_norm(x))


def jax_side():
    return Block(nnx.Rngs(0))


# Names that leave no doubt (attention.q.kernel is self_attn.q_proj.weight) are found; these two could be either norm.
NAMES = {
    "input_layernorm.weight": "input_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
