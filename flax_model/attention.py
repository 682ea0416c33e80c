"""Multi-head Latent Attention (DeepSeek-V2, section 2.1) with grouped K/V heads.

Keys and values are expanded from one small latent per token; a single rotary key is shared by all heads:

    q = q_proj(x)                           per head [nope | rope]
    latent, k_rope = kv_a_proj(x)           latent normed, k_rope rotated: this is all that decoding has to cache
    k_nope, v = kv_b_proj(latent)           per K/V head; query head h reads K/V head h // (heads / kv_heads)
    softmax(q . [k_nope | k_rope] / sqrt(nope + rope)) v

Twin of `torch_ref/attention.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flax_model.layers import Linear, RMSNorm, Stack, wide
from flax_model.rotary import Rope, apply_rope
from torch_ref.spec.config import LATENT_NORM_EPS, ModelConfig

QUERY_BLOCK = 256
"""Queries of one block of the `blocked` path."""


def attend_plain(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv_heads qk"],
    v: Float[Array, "batch seq kv_heads vdim"],
    scale: float,
) -> Float[Array, "batch seq heads vdim"]:
    """Causal attention with all scores held at once: the oracle of the other paths. Softmax in float32 or wider."""
    batch, seq, heads, _ = q.shape
    grouped = wide(q).reshape(batch, seq, k.shape[2], -1, q.shape[-1])  # heads -> kv_heads, heads of one group
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, wide(k)) * scale
    causal = jnp.tril(jnp.ones((seq, seq), bool))
    probabilities = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", probabilities, wide(v))
    return out.reshape(batch, seq, heads, v.shape[-1]).astype(q.dtype)


def attend_blocked(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv_heads qk"],
    v: Float[Array, "batch seq kv_heads vdim"],
    scale: float,
) -> Float[Array, "batch seq heads vdim"]:
    """The same in blocks of queries that read only the keys they may see, with the scores of one block at a time:
    half the products of `attend_plain`, and memory that grows with the length, not its square (after FlashAttention-2,
    Dao 2023). The backward pass makes the probabilities again from the saved normalisers."""
    return _blocked(scale, q, k, v)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(scale, q, k, v):
    return _blocked_forward(scale, q, k, v)[0]


def _blocked_forward(scale, q, k, v):
    groups = q.shape[2] // k.shape[2]
    k_heads, v_heads = _by_head(k), _by_head(v)
    outs, normalisers = [], []
    for start, end in _query_blocks(q.shape[1]):
        scores = _scores(_by_kv_head(q[:, start:end], k.shape[2]), k_heads[:, :, :end], start, groups, scale)
        normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        probabilities = jnp.exp(scores - normaliser).astype(q.dtype)
        outs.append(_from_kv_head(_products("bkrs,bksd->bkrd", probabilities, v_heads[:, :, :end]), groups))
        normalisers.append(normaliser)
    out = jnp.concatenate(outs, axis=1).astype(q.dtype)
    return out, checkpoint_name((q, k, v, out, normalisers), "attention")


def _blocked_backward(scale, saved, upstream):
    q, k, v, out, normalisers = saved
    kv_heads, groups = k.shape[2], q.shape[2] // k.shape[2]
    k_heads, v_heads = _by_head(k), _by_head(v)
    d_q = []
    d_k, d_v = jnp.zeros(k_heads.shape, wide(k[:0]).dtype), jnp.zeros(v_heads.shape, wide(v[:0]).dtype)
    # Each row's softmax gradient is p * (d_p - sum(p * d_p)), and that sum is out . d_out.
    inner = (wide(out) * wide(upstream)).sum(-1, keepdims=True)
    for (start, end), normaliser in zip(_query_blocks(q.shape[1]), normalisers, strict=True):
        queries, d_out, dot = (_by_kv_head(x[:, start:end], kv_heads) for x in (q, upstream, inner))
        keys, values = k_heads[:, :, :end], v_heads[:, :, :end]
        probabilities = jnp.exp(_scores(queries, keys, start, groups, scale) - normaliser)
        d_probabilities = _products("bkrd,bksd->bkrs", d_out, values)
        d_scores = (probabilities * (d_probabilities - dot) * scale).astype(q.dtype)
        d_q.append(_from_kv_head(_products("bkrs,bksd->bkrd", d_scores, keys), groups))
        d_k = d_k.at[:, :, :end].add(_products("bkrs,bkrd->bksd", d_scores, queries))
        d_v = d_v.at[:, :, :end].add(_products("bkrs,bkrd->bksd", probabilities.astype(q.dtype), d_out))
    d_q = jnp.concatenate(d_q, axis=1).astype(q.dtype)
    return d_q, d_k.swapaxes(1, 2).astype(k.dtype), d_v.swapaxes(1, 2).astype(v.dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _query_blocks(seq: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, seq)) for start in range(0, seq, QUERY_BLOCK)]


def _by_head(x: Float[Array, "batch seq heads _"]) -> Float[Array, "batch heads seq _"]:
    return x.swapaxes(1, 2)


def _by_kv_head(x: Float[Array, "batch queries heads _"], kv_heads: int) -> Float[Array, "batch kv_heads rows _"]:
    """Queries of all heads that read one K/V head under each other, as rows of one product."""
    batch, queries, heads, size = x.shape
    return _by_head(x).reshape(batch, kv_heads, heads // kv_heads * queries, size)


def _from_kv_head(x: Float[Array, "batch kv_heads rows _"], groups: int) -> Float[Array, "batch queries heads _"]:
    batch, kv_heads, rows, size = x.shape
    return x.reshape(batch, kv_heads * groups, rows // groups, size).swapaxes(1, 2)


def _scores(queries, keys, first: int, groups: int, scale: float) -> Float[Array, "batch kv_heads rows keys"]:
    """Scaled scores of queries at positions `first` and on (of each group) with keys at 0 and on; -inf where later."""
    scores = _products("bkrd,bksd->bkrs", queries, keys) * scale
    position = first + jnp.tile(jnp.arange(queries.shape[2] // groups), groups)
    return jnp.where(position[:, None] >= jnp.arange(keys.shape[2]), scores, -jnp.inf)


def _products(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide(a[:0]).dtype)


def attend_cudnn(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv_heads qk"],
    v: Float[Array, "batch seq kv_heads vdim"],
    scale: float,
) -> Float[Array, "batch seq heads vdim"]:
    """The same by cuDNN's fused kernel on NVIDIA GPUs (half precision only), which wants one head size: v is padded
    with zeros, and the pad cut off. At 104 and 64 values that is 1.24 times the arithmetic of a tenth of the step; two
    calls, of the parts with and without position, would each run their own softmax and could not be added."""
    v_head_dim = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v_head_dim)))
    q, k, v = checkpoint_name((q, k, v), "attention")
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :v_head_dim]


def is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A checkpoint policy: whether this is cuDNN's forward pass, whose output and normalisers have no name to be kept
    by; the backward pass would otherwise run it a second time."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


ATTENTION_PATHS = {"plain": attend_plain, "blocked": attend_blocked, "cudnn": attend_cudnn}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, stack: Stack = ()) -> None:
        c = self.config = config
        query_size = c.num_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, query_size, stack)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, stack)
            self.q_a_norm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, stack)
            self.q_b_proj = Linear(c.q_lora_rank, query_size, stack)
        self.kv_a_proj = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, stack)
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, stack)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_kv_heads * (c.qk_nope_head_dim + c.v_head_dim), stack)
        self.o_proj = Linear(c.num_heads * c.v_head_dim, c.hidden_size, stack)

    def queries(
        self, x: Float[Array, "*batch hidden"], rope: Rope
    ) -> tuple[Float[Array, "*batch heads nope"], Float[Array, "*batch heads rope"]]:
        """Queries of all heads: the part without position, and the rotated part."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:-1], c.num_heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q, (c.qk_nope_head_dim,), axis=-1)
        return q_nope, apply_rope(q_rope, rope)

    def latents(
        self, x: Float[Array, "*batch hidden"], rope: Rope
    ) -> tuple[Float[Array, "*batch latent"], Float[Array, "*batch rope"]]:
        """What a token leaves for later ones: its normed latent, and the rotated key that all heads share."""
        latent, k_rope = jnp.split(self.kv_a_proj(x), (self.config.kv_lora_rank,), axis=-1)
        return self.kv_a_norm(latent), apply_rope(k_rope[..., None, :], rope)[..., 0, :]

    def expand(
        self, latent: Float[Array, "batch seq latent"], k_rope: Float[Array, "batch seq rope"]
    ) -> tuple[Float[Array, "batch seq kv_heads qk"], Float[Array, "batch seq kv_heads vdim"]]:
        """Keys and values of every K/V head."""
        c = self.config
        k_and_v = self.kv_b_proj(latent).reshape(*latent.shape[:2], c.num_kv_heads, -1)
        k_nope, v = jnp.split(k_and_v, (c.qk_nope_head_dim,), axis=-1)
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], c.qk_rope_head_dim))
        return jnp.concatenate((k_nope, k_rope), axis=-1), v

    def __call__(self, x: Float[Array, "batch seq hidden"], rope: Rope, path: str) -> Float[Array, "batch seq hidden"]:
        """`path` is a key of `ATTENTION_PATHS`."""
        q = jnp.concatenate(self.queries(x, rope), axis=-1)
        k, v = self.expand(*self.latents(x, rope))
        out = ATTENTION_PATHS[path](q, k, v, self.config.softmax_scale)
        return self.o_proj(out.reshape(*x.shape[:2], -1))
