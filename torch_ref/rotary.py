"""Rotary position embedding (Su et al. 2021) on interleaved pairs, from the table in `parameters.py`.

Twins: `torch_ref/rotary.py`, `flax_model/rotary.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from torch_ref.layers import wide
from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import rope_table


class Rope(NamedTuple):
    """Cosines and sines of the angles at the positions of a forward pass."""

    cos: Float[Tensor, "*batch pairs"]
    sin: Float[Tensor, "*batch pairs"]


def make_rope(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> Rope:
    """The table for positions 0 .. length - 1, in float32 or, for a float64 model, float64."""
    cos, sin = rope_table(config, length)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Rope(torch.from_numpy(cos).to(dtype).to(device), torch.from_numpy(sin).to(dtype).to(device))


def apply_rope(x: Float[Tensor, "*batch heads rope"], rope: Rope) -> Float[Tensor, "*batch heads rope"]:
    """Turn each pair (x[2i], x[2i+1]) by its position's angle i; float32 or wider inside."""
    even, odd = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.reshape(x.shape).to(x.dtype)
