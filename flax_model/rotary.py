"""Rotary position embedding (Su et al. 2021) on interleaved pairs, from the table in `parameters.py`.

Twins: `torch_ref/rotary.py`, `flax_model/rotary.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from numpy.typing import DTypeLike

from flax_model.layers import wide
from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import rope_table


class Rope(NamedTuple):
    """Cosines and sines of the angles at the positions of a forward pass."""

    cos: Float[Array, "*batch pairs"]
    sin: Float[Array, "*batch pairs"]


def make_rope(config: ModelConfig, length: int, dtype: DTypeLike) -> Rope:
    """The table for positions 0 .. length - 1, in float32 or, for a float64 model, float64."""
    cos, sin = rope_table(config, length)
    dtype = jnp.promote_types(dtype, jnp.float32)
    return Rope(jnp.asarray(cos, dtype), jnp.asarray(sin, dtype))


def apply_rope(x: Float[Array, "*batch heads rope"], rope: Rope) -> Float[Array, "*batch heads rope"]:
    """Turn each pair (x[2i], x[2i+1]) by its position's angle i; float32 or wider inside."""
    even, odd = wide(x[..., 0::2]), wide(x[..., 1::2])
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]
    turned = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
