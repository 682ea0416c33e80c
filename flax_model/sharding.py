"""Where each tensor lives: the parameter table's axis names mapped to the axes of a device mesh.

A mesh has three axes; every device has rows of the batch of its own, whatever the shape.

- `data`: copies of the model
- `fsdp`: each matrix is split along one dimension, gathered layer by layer where it is used, and its gradient summed
  back into the shards (ZeRO-3, Rajbhandari et al. 2020)
- `expert`: each device holds some of the routed experts, and tokens travel to them (`expert_parallel.py`)

Norms, router and balance biases are small and whole everywhere. On one device all three axes have size 1. The step
itself is written for one device and its shard (`jax.shard_map`); the collectives are in this file, and do nothing on
axes of size 1. `torch_ref/sharding.py` is the counterpart, by FSDP2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped
from numpy.typing import DTypeLike

from torch_ref.spec.config import MESH_AXES, ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import Parameter, flax_path, parameter_table

MeshShape = tuple[int, int, int]
"""Sizes of `MESH_AXES`."""

Tree = dict
"""Nested dict with the paths of `parameters.flax_path`."""


def mesh_devices(first: jax.Device, shape: MeshShape) -> list[jax.Device]:
    """The devices of a mesh: `first`, or as many of its platform as the shape takes. Raises `UserError` where there are
    not as many, or some would be left idle by one of several processes."""
    wanted = math.prod(shape)
    if wanted == 1 and jax.process_count() == 1:
        return [first]
    found = jax.devices(first.platform)
    if wanted > len(found) or (wanted < len(found) and jax.process_count() > 1):
        raise UserError(f"--mesh {mesh_words(shape)}: takes {wanted} devices, and there are {len(found)}")
    return found[:wanted]


def mesh_words(shape: MeshShape) -> str:
    """As `--mesh` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))


def make_mesh(devices: Sequence[jax.Device], shape: MeshShape) -> Mesh:
    """Devices as [data, fsdp, expert]: neighbours, which are joined fastest, share experts, then shards."""
    return Mesh(np.array(devices).reshape(shape), MESH_AXES)


def mesh_shape(mesh: Mesh) -> MeshShape:
    return tuple(mesh.shape[axis] for axis in MESH_AXES)


def partition(row: Parameter, shape: MeshShape) -> tuple[str | None, ...]:
    """The mesh axis each dimension of a table's row is split over: routed experts over `expert`, and the longest
    dimension that the size divides over `fsdp`. Axes of size 1 split nothing."""
    _, fsdp, expert = shape
    spec: list[str | None] = [None] * len(row.shape)
    whole = len(row.shape) == 1 or "router" in row.name
    if whole:
        return tuple(spec)
    candidates = list(range(len(row.shape)))
    if row.axes[0] == "experts":
        candidates.remove(0)
        spec[0] = "expert" if expert > 1 else None
    candidates = [index for index in candidates if row.shape[index] % fsdp == 0]
    if fsdp > 1 and candidates:
        spec[max(candidates, key=lambda index: row.shape[index])] = "fsdp"
    return tuple(spec)


def partition_specs(config: ModelConfig, shape: MeshShape) -> tuple[Tree, Tree]:
    """The `PartitionSpec` of every tensor of the Flax model: its parameters and its balance biases."""
    trees: tuple[Tree, Tree] = {}, {}
    for path, rows in stacked_rows(config):
        stack = () if flax_path(config, rows[0].name)[1] is None else (None,)
        set_leaf(trees[not rows[0].trainable], path, PartitionSpec(*stack, *partition(rows[0], shape)))
    return trees


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


BATCH = PartitionSpec(None, MESH_AXES)
"""Of token arrays [micro_batches, rows, seq]: every device has its own rows of each micro-batch."""
WHOLE = PartitionSpec()
"""Of what is the same on every device."""


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def abstract_parameters(config: ModelConfig, dtype: DTypeLike, mesh: Mesh) -> tuple[Tree, Tree]:
    """Shape, dtype and sharding of every tensor of the Flax model: its parameters and its balance biases."""
    trees: tuple[Tree, Tree] = {}, {}
    for path, rows in stacked_rows(config):
        stacked = flax_path(config, rows[0].name)[1] is not None
        shape = (len(rows), *rows[0].shape) if stacked else rows[0].shape
        spec = PartitionSpec(*((None,) if stacked else ()), *partition(rows[0], mesh_shape(mesh)))
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        set_leaf(trees[not rows[0].trainable], path, leaf)
    return trees


def on_devices(
    row: Parameter, value: np.ndarray | None, dtype: DTypeLike, mesh: Mesh | None, layers: int | None = None
) -> Array:
    """A row's value on the devices, or zeros for it, or for a stack of `layers` of it. A mesh's devices get just their
    shards: each process cuts them out of the same value."""
    stack = () if layers is None else (layers,)
    shape = (*stack, *row.shape)
    if mesh is None or mesh.size == 1:
        return jnp.zeros(shape, dtype) if value is None else jnp.array(value, dtype)
    sharding = NamedSharding(mesh, PartitionSpec(*(None for _ in stack), *partition(row, mesh_shape(mesh))))
    if value is None:
        return jnp.zeros(shape, dtype, device=sharding)
    return jax.make_array_from_callback(shape, sharding, lambda index: np.asarray(value[index], dtype))


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` run on each device's shards; what comes out by `WHOLE` must be the same on all. The collectives in it
    are explicit, so that JAX adds none (`check_vma`): a gradient is its device's own until it is summed."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def whole(tree: Any, mesh: Mesh) -> Any:
    """All of a tree's arrays on one device of this process, put together from their shards."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _everywhere(replicated(mesh))(tree))


@cache
def _everywhere(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def host_array(array: Array) -> np.ndarray:
    """All of an array on the host. Where other processes hold shards of it, all must ask for it together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = whole(array, array.sharding.mesh)
    return np.asarray(array)


def from_host(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays on the devices; each process takes its devices' shards of what all of them have."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree)


def own_shards(array: Array) -> dict[str, np.ndarray]:
    """Copies of the shards that this process holds, by their places in the array."""
    return {str(shard.index): np.array(shard.data) for shard in array.addressable_shards}


def own_bytes(tree: object) -> int:
    """Bytes of `own_shards` of all arrays in a tree."""
    shards = [{str(shard.index): shard.data for shard in leaf.addressable_shards} for leaf in jax.tree.leaves(tree)]
    return sum(data.nbytes for parts in shards for data in parts.values())


def from_own_shards(shards: dict[str, np.ndarray], like: jax.ShapeDtypeStruct) -> Array:
    """The array of `own_shards`, as `like` says."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: shards[str(index)])


def decay_mask(config: ModelConfig) -> Tree:
    """Whether weight decay applies, for every parameter of the Flax model."""
    mask: Tree = {}
    for path, rows in stacked_rows(config):
        if rows[0].trainable:
            set_leaf(mask, path, rows[0].decay)
    return mask


def stacked_rows(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], list[Parameter]]]:
    """The table's rows grouped by the Flax tensor they are stacked in, in the order of their layers."""
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for row in parameter_table(config):
        groups.setdefault(flax_path(config, row.name)[0], []).append(row)
    yield from groups.items()


def set_leaf(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
    """Put a leaf into a nested dict, with the branches that lead there."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays in a tree, abstract ones too."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------- inside a step: collectives of a shard


def gathered_layer(layer: Tree, config: ModelConfig, shape: MeshShape, dtype: DTypeLike, stack: str) -> Tree:
    """The parameters of one layer of a stack with what `fsdp` split put together, in the products' dtype, in which
    bfloat16 travels at half the bytes. Gradients come back summed over `fsdp`, as shards in the parameters' dtype."""
    if shape[1] == 1:
        return layer
    specs = partition_specs(config, shape)[0][stack]
    return jax.tree.map(lambda shard, spec: _whole(shard, tuple(spec)[1:], dtype), layer, specs)


def gathered_embedding(params: Tree, config: ModelConfig, shape: MeshShape) -> Tree:
    """All parameters, of which the embedding is put together: in its own dtype, since its gradient is a sum over many
    tokens. Layers are left as shards."""
    if shape[1] == 1:
        return params
    specs = partition_specs(config, shape)[0]
    whole = jax.tree.map(
        lambda shard, spec: _whole(shard, tuple(spec), shard.dtype), params["embed_tokens"], specs["embed_tokens"]
    )
    return {**params, "embed_tokens": whole}


def _whole(shard: Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    return _gather(shard, axes.index("fsdp"), jnp.dtype(dtype)) if "fsdp" in axes else shard


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Shaped[Array, "*shard"], dimension: int, dtype: jnp.dtype) -> Shaped[Array, "*whole"]:
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=dimension, tiled=True)


def _gather_forward(shard, dimension, dtype):
    return _gather(shard, dimension, dtype), jnp.zeros(0, shard.dtype)


def _gather_backward(dimension, dtype, like, gradient):
    gradient = gradient.astype(like.dtype)
    return (jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def _spread(shape: MeshShape) -> tuple[str, ...]:
    """The axes of a mesh that have more than one device."""
    return tuple(axis for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1)


def sum_over_devices(tree: Any, shape: MeshShape) -> Any:
    """Every leaf summed over all devices, each of which has a part of it from its own rows."""
    axes = _spread(shape)
    return jax.lax.psum(tree, axes) if axes else tree


def sum_gradients(gradients: Tree, config: ModelConfig, shape: MeshShape) -> Tree:
    """Gradients summed over the devices that hold the same shard; once a step, after all micro-batches."""
    axes = _spread(shape)

    def missing(gradient: Array, spec: PartitionSpec) -> Array:
        over = tuple(axis for axis in axes if axis not in spec)
        return jax.lax.psum(gradient, over) if over else gradient

    return jax.tree.map(missing, gradients, partition_specs(config, shape)[0])


def global_norm(gradients: Tree, config: ModelConfig, shape: MeshShape) -> Array:
    """Square root of the sum of all squares, over all shards."""
    squares: dict[tuple[str, ...], Array] = {}
    specs = partition_specs(config, shape)[0]
    for gradient, spec in zip(jax.tree.leaves(gradients), jax.tree.leaves(specs), strict=True):
        over = tuple(axis for axis in MESH_AXES if axis in spec)
        squares[over] = squares.get(over, 0) + jnp.square(gradient).sum()
    return jnp.sqrt(sum(jax.lax.psum(square, over) if over else square for over, square in squares.items()))
