"""Causal attention by torch's fused kernels: the same as `attention.attend_plain`, faster and with less memory."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from torch_ref.cpu import operand


def visible_keys(
    q: Float[Tensor, "batch seq heads qk"], documents: Int[Tensor, "batch seq"] | None
) -> Bool[Tensor, "#batch seq seq"]:
    """Which keys a query sees: none after it, and those of its own document alone."""
    seq = q.shape[1]
    causal = torch.ones(1, seq, seq, dtype=torch.bool, device=q.device).tril()
    return causal if documents is None else causal & (documents[:, :, None] == documents[:, None, :])


def of_one_size(*operands: Float[Tensor, "batch seq _ _"]) -> list[Float[Tensor, "batch seq _ size"]]:
    """Zeros appended to heads up to the largest size among them: they change no score, and no value that is kept."""
    size = max(x.shape[-1] for x in operands)
    return [x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in operands]


def attend_sdpa(
    q: Float[Tensor, "batch seq heads qk"],
    k: Float[Tensor, "batch seq kv_heads qk"],
    v: Float[Tensor, "batch seq kv_heads vdim"],
    scale: float,
    documents: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq heads vdim"]:
    """The same by torch's fused kernels, which want one head size: what is smaller is padded with zeros, and the pad
    cut off. Between documents they take a mask of all pairs, which is slower."""
    v_head_dim, dtype = v.shape[-1], q.dtype
    q, k, v = of_one_size(q, k, v)
    mask = None if documents is None else visible_keys(q, documents)[:, None]
    q, k, v = (operand(x).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :v_head_dim].to(dtype)


def attend_masked(
    q: Float[Tensor, "batch seq heads qk"],
    k: Float[Tensor, "batch seq kv_heads qk"],
    v: Float[Tensor, "batch seq kv_heads vdim"],
    scale: float,
    documents: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq heads vdim"]:
    """The same for MPS, around what its fused kernel gets wrong: the mask is explicit (`is_causal` leaked later tokens
    in half precision, pytorch #195910), v is padded to the key's size (#176767), operands are contiguous (#181133),
    heads are repeated, and q carries the scale (it was missing from the kernel cache's key, #184122)."""
    v_head_dim, groups = v.shape[-1], q.shape[2] // k.shape[2]
    mask = visible_keys(q, documents)[:, None]
    q, k, v = of_one_size(q, k, v)
    q = (q * scale).transpose(1, 2).contiguous()
    k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2).contiguous() for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2)[..., :v_head_dim]
