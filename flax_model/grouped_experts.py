"""The experts' path `grouped`: rows sorted by expert, one product per expert on just its rows, in chunks of few sizes
that it is compiled for."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int


def count_experts(chosen: Int[Array, "*batch topk"], experts: int) -> Int[Array, " experts"]:
    """Tokens each expert takes."""
    return (chosen.reshape(-1, 1) == jnp.arange(experts)).sum(0)


def grouped_experts(
    x: Float[Array, "tokens hidden"],
    chosen: Int[Array, "tokens topk"],
    weights: Float[Array, "tokens topk"],
    gate: Float[Array, "experts ffn hidden"],
    up: Float[Array, "experts ffn hidden"],
    down: Float[Array, "experts hidden ffn"],
    remat: bool,
) -> Float[Array, "tokens hidden"]:
    """See `moe.experts_grouped`."""
    return _grouped_experts(remat, x, chosen, weights, gate, up, down)


class Chunks(NamedTuple):
    """Choices sorted by expert and cut into chunks of one expert each. Sorted arrays have a tail of one whole chunk
    that belongs to nobody, so that a slice never runs over the end."""

    order: Int[Array, " rows"]
    """Sorted row -> position in the flattened choices (the tail repeats the first)."""
    inverse: Int[Array, " choices"]
    """Position in the flattened choices -> sorted row."""
    counts: Int[Array, " experts"]
    first_row: Int[Array, " experts"]
    """Sorted row where an expert starts."""
    ends: Int[Array, " experts"]
    """Number of the chunk after an expert's last."""


class Chunk(NamedTuple):
    """One chunk while it is computed."""

    expert: Int[Array, ""]
    start: Int[Array, ""]
    """Its first sorted row."""
    rows: Int[Array, ""]
    first: Array
    """Whether it is its expert's first."""


def chunk_sizes(tokens: int, experts: int, topk: int) -> list[int]:
    """Row counts that a chunk is compiled for, in sixteenths of the mean load: close together around it, where a
    balanced router's loads lie, and far apart elsewhere. An expert with more rows than the last has several chunks."""
    sixteenth = tokens * topk / experts / 16
    sizes = (math.ceil(sixteenth * n / 8) * 8 for n in (2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 20, 24))
    return sorted({min(size, tokens) for size in sizes})  # a token takes an expert at most once


def _cut(chosen: Int[Array, "tokens topk"], experts: int, size: int) -> Chunks:
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    counts = count_experts(chosen, experts)
    ends = jnp.cumsum(-(-counts // size))
    return Chunks(jnp.pad(order, (0, size)), jnp.argsort(order), counts, jnp.cumsum(counts) - counts, ends)


def _each_chunk(compute, put, carry: tuple, chunks: Chunks, sizes: list[int]) -> tuple:
    """carry = put(carry, chunk, compute(size, chunk)) for every chunk; `compute` is compiled for each size, and its
    results are padded to the largest. They leave the branch before they enter the carry: XLA updates the buffers of
    a loop in place, but copies them whole into and out of a branch."""
    largest = sizes[-1]

    def branch(size, chunk):
        rowwise, whole = compute(size, chunk)
        return tuple(jnp.pad(part, ((0, largest - size), (0, 0))) for part in rowwise), whole

    def one(index, carry):
        expert = jnp.searchsorted(chunks.ends, index, side="right")
        count = chunks.counts[expert]
        done = (index - chunks.ends[expert]) * largest + -(-count // largest) * largest
        chunk = Chunk(expert, chunks.first_row[expert] + done, jnp.minimum(count - done, largest), done == 0)
        size = jnp.searchsorted(jnp.array(sizes), chunk.rows)
        return put(carry, chunk, jax.lax.switch(size, [partial(branch, size) for size in sizes], chunk))

    return jax.lax.fori_loop(0, chunks.ends[-1], one, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_experts(remat, x, chosen, weights, gate, up, down):
    return _grouped_forward(remat, x, chosen, weights, gate, up, down)[0]


def _grouped_forward(remat, x, chosen, weights, gate, up, down):
    """One chunk of one expert after the other, all three products of each while its activations are in the cache. The
    routing weight enters before the down projection, so the backward pass never needs the experts' outputs."""
    tokens, topk = chosen.shape
    sizes = chunk_sizes(tokens, gate.shape[0], topk)
    chunks = checkpoint_name(_cut(chosen, gate.shape[0], sizes[-1]), "routing")
    rows = x[chunks.order // topk]
    row_weights = _row_weights(weights, chunks, x.dtype)

    def compute(size, chunk):
        r, w = _take((rows, row_weights), chunk.start, size)
        gated, raised = _dot(r, gate[chunk.expert], 1), _dot(r, up[chunk.expert], 1)
        out = _dot(jax.nn.silu(gated) * raised * w, down[chunk.expert], 1)
        return (out,) if remat else (out, gated, raised), ()

    def put(carry, chunk, results):
        return _put(carry, results[0], chunk.start)

    shapes = (x.shape[1],) if remat else (x.shape[1], gate.shape[1], gate.shape[1])
    carry = tuple(jnp.zeros((rows.shape[0], columns), x.dtype) for columns in shapes)
    out, *products = _each_chunk(compute, put, carry, chunks, sizes)
    saved = x, weights, chunks, gate, up, down, checkpoint_name(tuple(products), "experts")
    return out[chunks.inverse].reshape(-1, topk, x.shape[1]).sum(1), saved


def _grouped_backward(remat, saved, upstream):
    x, weights, chunks, gate, up, down, products = saved
    tokens, topk = weights.shape
    source = chunks.order // topk
    rows, upstream = x[source], upstream[source]
    row_weights = _row_weights(weights, chunks, x.dtype)

    def compute(size, chunk):
        r, w, du = _take((rows, row_weights, upstream), chunk.start, size)
        # Rows past the chunk's last are another's: without an upstream gradient they add nothing to the weights'.
        du = jnp.where((jnp.arange(size) < chunk.rows)[:, None], du, 0)
        g, u, d = gate[chunk.expert], up[chunk.expert], down[chunk.expert]
        gated, raised = (_dot(r, g, 1), _dot(r, u, 1)) if remat else _take(products, chunk.start, size)
        sigmoid = jax.nn.sigmoid(gated)
        silu = gated * sigmoid
        activation = silu * raised
        d_weighted = _dot(du, d, 0)
        d_weight = (d_weighted * activation).sum(-1, keepdims=True, dtype=weights.dtype)
        d_activation = d_weighted * w
        d_raised = d_activation * silu
        # silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
        d_gated = d_activation * raised * (sigmoid * (1 + gated * (1 - sigmoid)))
        d_rows = _dot(d_gated, g, 0) + _dot(d_raised, u, 0)
        return (d_rows, d_weight), (_outer(d_gated, r), _outer(d_raised, r), _outer(du, activation * w))

    def put(carry, chunk, results):
        rowwise, gradients = results
        totals = (
            jax.lax.dynamic_update_index_in_dim(
                total, gradient.astype(total.dtype) + jnp.where(chunk.first, 0, total[chunk.expert]), chunk.expert, 0
            )
            for total, gradient in zip(carry[2:], gradients, strict=True)
        )
        return *_put(carry[:2], rowwise, chunk.start), *totals

    carry = jnp.zeros_like(rows), jnp.zeros((rows.shape[0], 1), weights.dtype)
    carry += tuple(jnp.zeros_like(weight) for weight in (gate, up, down))
    d_rows, d_weights, *gradients = _each_chunk(compute, put, carry, chunks, chunk_sizes(tokens, gate.shape[0], topk))
    d_x = d_rows[chunks.inverse].reshape(-1, topk, x.shape[1]).sum(1)
    return d_x, None, d_weights[chunks.inverse].reshape(weights.shape), *gradients


_grouped_experts.defvjp(_grouped_forward, _grouped_backward)


def _row_weights(weights, chunks: Chunks, dtype) -> Float[Array, "rows 1"]:
    return weights.reshape(-1)[chunks.order].astype(dtype)[:, None]


def _take(arrays: tuple, start: Int[Array, ""], size: int) -> tuple:
    return tuple(jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays)


def _put(arrays: tuple, parts: tuple, start: Int[Array, ""]) -> tuple:
    """Parts written over the rows from `start` on: past a chunk's last row the next chunk overwrites them, and what
    is left in the tail means nothing."""
    update = jax.lax.dynamic_update_slice_in_dim
    return tuple(update(array, part, start, 0) for array, part in zip(arrays, parts, strict=True))


def _dot(rows: Float[Array, "rows _"], weight: Float[Array, "_ _"], axis: int) -> Float[Array, "rows _"]:
    """rows times the weight, summed over the weight's given axis: no transposed copy."""
    return jax.lax.dot_general(rows, weight.astype(rows.dtype), (((1,), (axis,)), ((), ())))


def _outer(left: Float[Array, "rows outputs"], right: Float[Array, "rows inputs"]) -> Float[Array, "outputs inputs"]:
    """left.T @ right: the gradient of a weight."""
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))
