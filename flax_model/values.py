"""A model's values: from the rows of the parameter table into the stacked tensors of Flax, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int
from numpy.typing import DTypeLike

from flax_model.model import Model
from flax_model.sharding import Tree, on_devices, set_leaf
from flax_model.trees import split
from torch_ref.spec.checkpoint import leaf_at
from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import Parameter, flax_path, parameter_table


@cache  # tracing the model's constructor takes as long as placing all the values of a small one
def structure(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a config's model, without making any array."""
    return split(nnx.eval_shape(partial(Model, config)))[0]


def from_values(
    config: ModelConfig,
    values: Iterable[tuple[Parameter, np.ndarray]],
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[nnx.GraphDef, Tree, Tree]:
    """`split` of a model with these values (`parameters.initial_values`, or an import) of every row of the table.

    Each layer is written straight into its place in the stacked tensor on the device: nothing is held twice. On a
    `mesh` each device gets its shard of it alone.
    """
    rows = parameter_table(config)
    expected = {row.name for row in rows}
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        path, _ = flax_path(config, row.name)
        counts[path] = counts.get(path, 0) + 1
    trees: tuple[Tree, Tree] = {}, {}
    for row, value in values:
        expected.remove(row.name)
        path, index = flax_path(config, row.name)
        tree = trees[not row.trainable]
        value = on_devices(row, value, dtype, mesh)
        if index is not None:
            stacked = leaf_at(tree, path)
            if stacked is None:
                stacked = on_devices(row, None, dtype, mesh, counts[path])
            value = _put_layer(stacked, index, value)
        set_leaf(tree, path, value)
    assert not expected, f"no value for {sorted(expected)}"
    return structure(config), *trees


def to_values(config: ModelConfig, params: Tree, biases: Tree) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Every row of the table with its value, one layer at a time; the inverse of `from_values`."""
    for row in parameter_table(config):
        path, index = flax_path(config, row.name)
        leaf = leaf_at(params if row.trainable else biases, path)
        yield row, np.asarray(leaf if index is None else leaf[index])


@partial(jax.jit, donate_argnums=0)
def _put_layer(stacked: Array, index: Int[Array, ""], value: Array) -> Array:
    return stacked.at[index].set(value.astype(stacked.dtype))
