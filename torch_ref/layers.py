"""The layers that everything else is made of: a linear map, RMSNorm and the SwiGLU MLP.

Weights are held in the parameter dtype and cast to the activations' dtype where they enter a product, explicitly:
there is no autocast.

Twins: `torch_ref/layers.py`, `flax_model/layers.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ref.cpu import linear
from torch_ref.mps import takes_two_axes


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32, or in float64 where it already is: the dtype of norms, routing, softmax and losses."""
    return x.float() if x.dtype.itemsize < 4 else x


def product(
    x: Float[Tensor, "*batch rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "*batch rows outputs"]:
    """x @ weight.T in the dtype of `x`."""
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if x.ndim > 2 and takes_two_axes(x.device):
        return linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return linear(x, weight)


def wide_product(
    x: Float[Tensor, "*batch rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "*batch rows outputs"]:
    """x @ weight.T as it is summed, in float32 or wider, on CUDA. Elsewhere torch rounds a bfloat16 product, which is
    then widened, as is one that takes part in a backward pass: torch has none for the other."""
    weight = weight.to(x.dtype)
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.is_cuda and x.dtype == torch.bfloat16 and not recorded:
        return torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return wide(product(x, weight))


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
