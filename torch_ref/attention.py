"""Multi-head Latent Attention (DeepSeek-V2, section 2.1) with grouped K/V heads.

Keys and values are expanded from one small latent per token; a single rotary key is shared by all heads:

    q = q_proj(x)                           per head [nope | rope]
    latent, k_rope = kv_a_proj(x)           latent normed, k_rope rotated: this is all that decoding has to cache
    k_nope, v = kv_b_proj(latent)           per K/V head; query head h reads K/V head h // (heads / kv_heads)
    softmax(q . [k_nope | k_rope] / sqrt(nope + rope)) v

Twins: `torch_ref/attention.py`, `flax_model/attention.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torch_ref.fused_attention import attend_masked, attend_sdpa, visible_keys
from torch_ref.layers import Linear, RMSNorm, wide
from torch_ref.rotary import Rope, apply_rope
from torch_ref.spec.config import LATENT_NORM_EPS, ModelConfig


def attend_plain(
    q: Float[Tensor, "batch seq heads qk"],
    k: Float[Tensor, "batch seq kv_heads qk"],
    v: Float[Tensor, "batch seq kv_heads vdim"],
    scale: float,
    documents: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq heads vdim"]:
    """Causal attention with all scores held at once: the oracle of the other paths. Softmax in float32 or wider.
    `documents` are numbers of which a query and the keys it sees have the same; None: it sees all before it."""
    batch, seq, heads, _ = q.shape
    grouped = wide(q).reshape(batch, seq, k.shape[2], -1, q.shape[-1])  # heads -> kv_heads, heads of one group
    scores = torch.einsum("bqkgd,bskd->bkgqs", grouped, wide(k)) * scale
    visible = visible_keys(q, documents)[:, None, None]
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("bkgqs,bskd->bqkgd", probabilities, wide(v))
    return out.reshape(batch, seq, heads, v.shape[-1]).to(q.dtype)


ATTENTION_PATHS = {"plain": attend_plain, "sdpa": attend_sdpa, "masked": attend_masked}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        self, x: Float[Tensor, "*batch hidden"], rope: Rope
    ) -> tuple[Float[Tensor, "*batch heads nope"], Float[Tensor, "*batch heads rope"]]:
        """Queries of all heads: the part without position, and the rotated part."""
        c = self.config
        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:-1], c.num_heads, c.qk_head_dim)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_rope, rope)

    def latents(
        self, x: Float[Tensor, "*batch hidden"], rope: Rope
    ) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch rope"]]:
        """What a token leaves for later ones: its normed latent, and the rotated key that all heads share."""
        c = self.config
        latent, k_rope = self.kv_a_proj(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self.kv_a_norm(latent), apply_rope(k_rope[..., None, :], rope)[..., 0, :]

    def expand(
        self, latent: Float[Tensor, "batch seq latent"], k_rope: Float[Tensor, "batch seq rope"]
    ) -> tuple[Float[Tensor, "batch seq kv_heads qk"], Float[Tensor, "batch seq kv_heads vdim"]]:
        """Keys and values of every K/V head."""
        c = self.config
        k_and_v = self.kv_b_proj(latent).reshape(*latent.shape[:2], c.num_kv_heads, -1)
        k_nope, v = k_and_v.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope = k_rope[:, :, None].expand(*k_nope.shape[:3], c.qk_rope_head_dim)
        return torch.cat((k_nope, k_rope), dim=-1), v

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rope: Rope,
        path: str,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`path` is a key of `ATTENTION_PATHS`, and `documents` are `attend_plain`'s."""
        q = torch.cat(self.queries(x, rope), dim=-1)
        k, v = self.expand(*self.latents(x, rope))
        out = ATTENTION_PATHS[path](q, k, v, self.config.softmax_scale, documents)
        return self.o_proj(out.reshape(*x.shape[:2], -1))
