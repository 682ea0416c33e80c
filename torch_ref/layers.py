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


_CPU = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")

ONE_CORE_PRODUCTS = torch.backends.mkl.is_available() and _CPU != "" and "Intel" not in _CPU
"""Whether a product of one row keeps to one core: MKL's on processors of other makers (measured on an AMD EPYC)."""

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
    if x.shape[-2] >= FEW_ROWS:
        return F.linear(for_product(x), for_product(weight)).to(x.dtype)
    if ONE_CORE_PRODUCTS and x.ndim == 2 and x.is_cpu and x.dtype != torch.bfloat16:
        return split_product(x, weight, torch.get_num_threads())
    return F.linear(x, weight)


def split_product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], parts: int
) -> Float[Tensor, "rows outputs"]:
    """x @ weight.T with the outputs in `parts` equal parts, one for each core, if they can be."""
    outputs, inputs = weight.shape
    if parts == 1 or outputs % parts:
        return F.linear(x, weight)
    by_part = torch.bmm(x.expand(parts, -1, -1), weight.view(parts, -1, inputs).mT)
    return by_part.view(1, outputs) if len(x) == 1 else by_part.transpose(0, 1).reshape(-1, outputs)


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
