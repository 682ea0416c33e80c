"""What XLA's CPU backend is slow at, and how JAX gets around it there. Every value is the same either way; on other
devices each of these functions is the plain operation, or gives back what it is given. All but the first is for
decoding:

- `changed_if`: an update without copies of gradients or moments, 6 GB at 774 M parameters
- `linear` of few rows: weights are read where they lie, without a copy of each (not measured alone)
- `materialized`: 1.65 instead of 2.02 ms a layer; a product with 576 x 576 takes 72 instead of 272 us
- `bits`, `read`, in bfloat16: 19.2 instead of 11.2 tokens/s after 1984 tokens
- `as_bits`, in bfloat16: views instead of 3.1 GB of copies for each text
- `tied`, in bfloat16: the embedding is not widened as a whole

How it was measured is in docs/performance.md.

Twins: `torch_ref/cpu.py`, `flax_model/cpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

_compiling_for: str | None = None


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within the block, programs are made for devices of this platform, which need not be there."""
    global _compiling_for
    before, _compiling_for = _compiling_for, platform
    try:
        yield
    finally:
        _compiling_for = before


def on_cpu() -> bool:
    """Whether programs are made for a CPU: that of `compiling_for`, or of JAX's default device, where one is set."""
    chosen = jax.config.jax_default_device
    return (_compiling_for or getattr(chosen, "platform", chosen) or jax.default_backend()) == "cpu"


def changed_if(condition: Array, change: Callable[[Any], Any], tree: Any) -> Any:
    """`change(tree)` where the condition holds, else the tree itself. As a branch XLA computes it in place; other
    devices choose value by value in the kernel that changes them: to a GPU a branch is a wait for the host, and a copy
    of all it gives (18.6 GB of traffic a step at 774 M parameters)."""
    if on_cpu():
        return jax.lax.cond(condition, change, lambda tree: tree, tree)
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), change(tree), tree)


def linear(x: Float[Array, "*batch inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "*batch outputs"]:
    """x @ weight.T in their dtype. For one row, XLA reads a slice of stacked weights in place; for more it takes a
    copy, which the product reads fastest from the left."""
    if x.ndim == 2 and on_cpu():
        return x @ weight.T if len(x) == 1 else (weight @ x.T).T
    # As x @ weight.T, but the backward pass then keeps the weight itself, not a transposed copy.
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def materialized(x: Float[Array, "batch features"], step: Int[Array, ""]) -> Float[Array, "batch features"]:
    """`x` unchanged, as an array of its own. XLA fuses a cheap computation of `x` (a product of two numbers, a
    transposition) into the product of one row with a weight that reads it, and so repeats it for every row of the
    weight. It takes a division for dear; and that this one is by 1, since `step` >= 0, it cannot know."""
    return x / (jnp.arange(x.shape[-1]) >= -step).astype(x.dtype) if on_cpu() else x


def tied(weight: Array, to: Array) -> tuple[Array, Array]:
    """Both unchanged, the weight tied to the other, so that XLA does not widen it, in bfloat16, ahead of the loop that
    the other comes from."""
    return jax.lax.optimization_barrier((weight, to)) if on_cpu() else (weight, to)


def bits(x: Array) -> Array:
    """A bfloat16 array as integers of the same bits, for `read`, and others as they are. XLA has no slice of 16-bit
    floats: it would widen the whole array, for weights ahead of the loop over tokens, and read twice the bytes."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if needs_bits(x) else x


def needs_bits(x: Array) -> bool:
    return on_cpu() and x.dtype == jnp.bfloat16


def read(array: Array, *index: Int[Array, ""]) -> Array:
    """array[index] of what has passed `bits`."""
    part = array[index]
    return jax.lax.bitcast_convert_type(part, jnp.bfloat16) if part.dtype == jnp.uint16 else part


def as_bits(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the weights of layers as `bits`: views of them, where a compiled function would copy each."""

    def view(leaf: Array) -> Array:
        return jax.device_put(np.asarray(leaf).view(np.uint16), leaf.sharding) if needs_bits(leaf) else leaf

    whole = ("embed_tokens", "norm")
    return {name: tree if name in whole else jax.tree.map(view, tree) for name, tree in params.items()}
