"""Where each tensor lives: the parameter table's axis names mapped to the axes of a device mesh.

A mesh has the axes `data` (rows of a batch) and `expert` (routed experts). On one device both have size 1 and every
tensor is whole; the same specification places tensors on more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import Parameter, flax_path, parameter_table

RULES = {"experts": "expert"}
"""Table axis -> mesh axis it is split over; axes that are not named here are replicated."""

Tree = dict
"""Nested dict with the paths of `parameters.flax_path`."""


def make_mesh(devices: Sequence[jax.Device], expert_parallel: int = 1) -> Mesh:
    """All devices as [data, expert]. Raises ValueError where `expert_parallel` does not divide their number."""
    return Mesh(np.array(devices).reshape(-1, expert_parallel), ("data", "expert"))


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Each dimension's mesh axis by `RULES`, where the mesh axis divides it and no earlier dimension took it."""
    taken: set[str] = set()
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = RULES.get(axis) if axis else None
        if mesh_axis in taken or (mesh_axis and size % mesh.shape[mesh_axis]):
            mesh_axis = None
        if mesh_axis:
            taken.add(mesh_axis)
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of token arrays [micro_batches, micro_batch, seq]: each micro-batch is split over `data`."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def abstract_parameters(config: ModelConfig, dtype: DTypeLike, mesh: Mesh) -> tuple[Tree, Tree]:
    """Shape, dtype and sharding of every tensor of the Flax model: its parameters and its balance biases."""
    trees: tuple[Tree, Tree] = {}, {}
    for path, rows in stacked_rows(config):
        first = rows[0]
        stack = () if flax_path(config, first.name)[1] is None else (len(rows),)
        shape, axes = (*stack, *first.shape), (*(None for _ in stack), *first.axes)
        sharding = NamedSharding(mesh, partition_spec(mesh, axes, shape))
        tree = trees[0] if first.trainable else trees[1]
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return trees


def decay_mask(config: ModelConfig) -> Tree:
    """Whether weight decay applies, for every parameter of the Flax model."""
    mask: Tree = {}
    for path, rows in stacked_rows(config):
        if rows[0].trainable:
            tree = mask
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            tree[path[-1]] = rows[0].decay
    return mask


def stacked_rows(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], list[Parameter]]]:
    """The table's rows grouped by the Flax tensor they are stacked in, in the order of their layers."""
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for row in parameter_table(config):
        groups.setdefault(flax_path(config, row.name)[0], []).append(row)
    yield from groups.items()


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays in a tree, abstract ones too."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
