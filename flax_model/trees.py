"""A model as plain nested dicts of arrays, with the paths of `parameters.flax_path`: modules hold parameters, and
transformations act on dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_model.moe import BalanceBias
from flax_model.sharding import Tree


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """The structure, the parameters and the balance biases of a model, or of one of its modules."""
    graphdef, params, biases = nnx.split(model, nnx.Param, BalanceBias)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(biases)


def merge(graphdef: nnx.GraphDef, params: Tree, biases: Tree) -> nnx.Module:
    """The inverse of `split`; free inside a jitted function."""
    return nnx.merge(graphdef, params, biases)


def consume(change: Callable[[tuple[str, ...], Any], Any], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """What `change(path, leaf)` makes of each leaf of nested dicts, which are emptied on the way: only one tensor
    exists twice at a time."""
    if not isinstance(tree, dict):
        return change(path, tree)
    return {key: consume(change, tree.pop(key), (*path, key)) for key in list(tree)}
