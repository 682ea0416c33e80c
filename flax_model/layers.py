"""The layers that everything else is made of: a linear map, RMSNorm and the SwiGLU MLP.

Weights are held in the parameter dtype and cast to the activations' dtype where they enter a product, explicitly:
there is no autocast.

Twins: `torch_ref/layers.py`, `flax_model/layers.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from flax_model.cpu import linear


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in float64 where it already is: the dtype of norms, routing, softmax and losses."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def product(
    x: Float[Array, "*batch rows inputs"], weight: Float[Array, "outputs inputs"]
) -> Float[Array, "*batch rows outputs"]:
    """x @ weight.T in the dtype of `x`."""
    return linear(x, weight.astype(x.dtype))


def wide_product(
    x: Float[Array, "*batch rows inputs"], weight: Float[Array, "outputs inputs"]
) -> Float[Array, "*batch rows outputs"]:
    """x @ weight.T as it is summed, in float32 or wider: rounded to bfloat16 and widened again it would lose bits."""
    weight = weight.astype(x.dtype)
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(
    x: Float[Array, "*batch features"], weight: Float[Array, " features"], eps: float
) -> Float[Array, "*batch features"]:
    """x / rms(x) * weight over the last axis, statistics in float32 or wider (Zhang & Sennrich 2019)."""
    x_wide = wide(x)
    normed = x_wide * jax.lax.rsqrt(jnp.square(x_wide).mean(-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


class Linear(nnx.Module):
    """x @ weight.T, without a bias; weight [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.weight = nnx.Param(jnp.zeros((outputs, inputs)))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return product(x, self.weight[...])


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return rms_norm(x, self.weight[...], self.eps)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020): the dense MLP, and the shared expert."""

    def __init__(self, hidden: int, ffn: int) -> None:
        self.gate_proj = Linear(hidden, ffn)
        self.up_proj = Linear(hidden, ffn)
        self.down_proj = Linear(ffn, hidden)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        # Worth keeping for the backward pass; what lies between values with a name is computed again (`run_layers`).
        gated, raised = checkpoint_name((self.gate_proj(x), self.up_proj(x)), "swiglu")
        return self.down_proj(jax.nn.silu(gated) * raised)
