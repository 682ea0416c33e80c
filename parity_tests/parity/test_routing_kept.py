"""Flax's backward pass repeats what was not kept, and what is repeated can round otherwise than it did. Routing must
not be repeated: a token that chose another expert there would move the rows of the tokens after it, in the experts'
order, away from the products that were kept of them (on an H200 gradients were off by 1.3 times their norm)."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("jax", reason="jax is not installed")

import jax
import jax.numpy as jnp

from flax_model import moe
from flax_model.model import objective
from flax_model.trees import merge
from flax_model.values import from_values
from parity_tests.support.backends import CONFIG, batch
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.parameters import initial_values

MODEL = replace(CONFIG, first_k_dense=0, num_layers=2, hidden_size=32, moe_intermediate_size=16)
PATHS = pytest.mark.parametrize("path", moe.EXPERT_PATHS)


def gradient(path, remat, scan=True):
    graphdef, params, biases = from_values(MODEL, initial_values(MODEL, 0), "float32")
    inputs, targets = map(jnp.asarray, batch(0))
    compute = ComputeConfig("float32", attention="blocked", moe=path, remat=remat, scan_layers=scan)

    def share(params):
        return objective(merge(graphdef, params, biases), inputs, targets, compute, targets.size, len(targets))[0]

    return jax.grad(share), params


def operations(jaxpr, found):
    """How often each operation stands in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                operations(inner, found)
    return found


@PATHS
@pytest.mark.parametrize("remat", ["off", "experts", "layers"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_choice_is_made_once(path, remat, scan):
    """The choice itself, and that of the balance loss, in each layer of the program, forward alone; its order, too."""
    function, params = gradient(path, remat, scan)
    found = operations(jax.make_jaxpr(function)(params).jaxpr, Counter())
    layers = 1 if scan else MODEL.num_layers
    assert found["top_k"] == 2 * layers
    assert found["sort"] == (2 * layers if path == "grouped" else 0)


@PATHS
def test_a_choice_that_would_come_out_otherwise_the_second_time(monkeypatch, path):
    """As if rounding had it so: from one call to the next the choice changes. Gradients are those of the first."""
    calls = []

    def chosen(scores, k):
        def on_the_host(scores):
            calls.append(len(calls))
            order = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k].astype(np.int32)
            return np.roll(order, len(calls) // (2 * MODEL.num_layers + 1), axis=0)

        shape = jax.ShapeDtypeStruct((len(scores), k), jnp.int32)
        return jax.pure_callback(on_the_host, shape, scores)

    function, params = gradient(path, "off")
    expected = jax.jit(function)(params)
    monkeypatch.setattr(moe, "top_k", chosen)
    got = jax.jit(gradient(path, "off")[0])(params)
    assert len(calls) == 2 * MODEL.num_layers
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
