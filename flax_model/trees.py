"""A model as plain nested dicts of arrays, with the paths of `parameters.flax_path`: modules hold parameters, and
transformations act on dicts."""

from __future__ import annotations

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
