"""Multi-head Latent Attention (DeepSeek-V2, section 2.1) with grouped K/V heads.

Keys and values are expanded from one small latent per token; a single rotary key is shared by all heads:

    q = q_proj(x)                           per head [nope | rope]
    latent, k_rope = kv_a_proj(x)           latent normed, k_rope rotated: this is all that decoding has to cache
    k_nope, v = kv_b_proj(latent)           per K/V head; query head h reads K/V head h // (heads / kv_heads)
    softmax(q . [k_nope | k_rope] / sqrt(nope + rope)) v

Twins: `torch_ref/attention.py`, `flax_model/attention.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from flax_model.fused_attention import attend_blocked, attend_cudnn, visible_keys
from flax_model.layers import Linear, RMSNorm, wide
from flax_model.rotary import Rope, apply_rope
from torch_ref.spec.config import LATENT_NORM_EPS, ModelConfig


def attend_plain(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv_heads qk"],
    v: Float[Array, "batch seq kv_heads vdim"],
    scale: float,
    documents: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads vdim"]:
    """Causal attention with all scores held at once: the oracle of the other paths. Softmax in float32 or wider.
    `documents` are numbers of which a query and the keys it sees have the same; None: it sees all before it."""
    batch, seq, heads, _ = q.shape
    grouped = wide(q).reshape(batch, seq, k.shape[2], -1, q.shape[-1])  # heads -> kv_heads, heads of one group
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, wide(k)) * scale
    visible = visible_keys(q, documents)[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", probabilities, wide(v))
    return out.reshape(batch, seq, heads, v.shape[-1]).astype(q.dtype)


ATTENTION_PATHS = {"plain": attend_plain, "blocked": attend_blocked, "cudnn": attend_cudnn}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig) -> None:
        c = self.config = config
        query_size = c.num_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, query_size)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_norm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, query_size)
        self.kv_a_proj = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_kv_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(c.num_heads * c.v_head_dim, c.hidden_size)

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
        c = self.config
        latent, k_rope = jnp.split(self.kv_a_proj(x), (c.kv_lora_rank,), axis=-1)
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

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: Rope,
        path: str,
        documents: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """`path` is a key of `ATTENTION_PATHS`, and `documents` are `attend_plain`'s."""
        q = jnp.concatenate(self.queries(x, rope), axis=-1)
        k, v = self.expand(*self.latents(x, rope))
        out = ATTENTION_PATHS[path](q, k, v, self.config.softmax_scale, documents)
        return self.o_proj(out.reshape(*x.shape[:2], -1))
