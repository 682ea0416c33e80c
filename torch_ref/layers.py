"""The layers that everything else is made of: a linear map, RMSNorm and the SwiGLU MLP.

Weights are held in the parameter dtype and cast to the activations' dtype where they enter a product, explicitly:
there is no autocast. Twin of `flax_model/layers.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32, or in float64 where it already is: the dtype of norms, routing, softmax and losses."""
    return x.float() if x.dtype.itemsize < 4 else x


HALF_PRODUCTS_ON_CPU = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether the CPU multiplies bfloat16 matrices in hardware (AMX). Without, torch takes twice as long for them as for
float32 ones."""


FEW_ROWS = 32


def for_product(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A bfloat16 operand as it enters a product: in float32 on a CPU without bfloat16 units. The values are the same,
    and the product, which sums in float32 either way, is rounded to bfloat16 after it."""
    return x.float() if x.dtype == torch.bfloat16 and x.is_cpu and not HALF_PRODUCTS_ON_CPU else x


def product(
    x: Float[Tensor, "*batch rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "*batch rows outputs"]:
    """x @ weight.T in the dtype of `x`. Few rows, as in decoding, cost what reading the weight costs: it stays as it
    is."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return F.linear(x, weight) if x.shape[-2] < FEW_ROWS else F.linear(for_product(x), for_product(weight)).to(x.dtype)


def rms_norm(
    x: Float[Tensor, "*batch features"], weight: Float[Tensor, " features"], eps: float
) -> Float[Tensor, "*batch features"]:
    """x / rms(x) * weight over the last axis, statistics in float32 or wider (Zhang & Sennrich 2019)."""
    x_wide = wide(x)
    normed = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


class Linear(nn.Module):
    """x @ weight.T, without a bias; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return product(x, self.weight)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020): the dense MLP, and the shared expert."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn)
        self.up_proj = Linear(hidden, ffn)
        self.down_proj = Linear(ffn, hidden)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
