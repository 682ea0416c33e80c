"""Mixture of experts after DeepSeek-V3 (sections 2.1.2 and 4.2): sigmoid router, balance by bias, nothing dropped.

    scores = sigmoid(router(x))                        float32 or wider
    chosen = top-k of scores + balance bias            ties: lowest index first
    weights = scores[chosen] / sum * scaling           without the bias: it steers the choice, never the output
    y = shared_expert(x) + sum of weights * expert(x)

The routed experts run behind one function, `EXPERT_PATHS[path](x, routing, gate, up, down, remat)`, where a choice of
expert `experts`, one past the last, stands for none (of this device: `expert_parallel.py`):
`dense` runs every expert on every token and is the oracle; `grouped` sorts tokens by expert, so its cost follows the
active experts; `pallas` does so in kernels of its own for NVIDIA GPUs, `blocks` without kernels or branches. Twin of
`torch_ref/moe.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from flax_model import grouped_kernels
from flax_model.expert_parallel import experts_exchanged
from flax_model.layers import Stack, SwiGLU, wide
from torch_ref.spec.config import ModelConfig

BLOCK = 64
"""Rows of one block of the `blocks` path."""


class BalanceBias(nnx.Variable):
    """State that is neither a parameter nor seen by the gradient."""


class Routing(NamedTuple):
    """The router's decision for every token."""

    chosen: Int[Array, "tokens topk"]
    weights: Float[Array, "tokens topk"]
    scores: Float[Array, "tokens experts"]


def route(
    x: Float[Array, "tokens hidden"],
    router: Float[Array, "experts hidden"],
    balance_bias: Float[Array, " experts"],
    config: ModelConfig,
) -> Routing:
    """Choose experts and weigh them, in float32 or wider whatever the dtype of `x`."""
    # In full float32 on GPUs too, where JAX's default is TF32: a choice hangs on it.
    scores = jax.nn.sigmoid(jnp.matmul(wide(x), wide(router).T, precision=jax.lax.Precision.HIGHEST))
    chosen = top_k(jax.lax.stop_gradient(scores) + balance_bias, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * config.routed_scaling_factor
    return Routing(chosen, weights, scores)


def top_k(scores: Float[Array, "tokens experts"], k: int) -> Int[Array, "tokens topk"]:
    """Indices of the k largest, largest first; of equal scores the lowest index first."""
    return jax.lax.top_k(scores, k)[1]


def count_experts(chosen: Int[Array, "*batch topk"], experts: int) -> Int[Array, " experts"]:
    """Tokens each expert takes."""
    return (chosen.reshape(-1, 1) == jnp.arange(experts)).sum(0)


def sequence_balance_loss(scores: Float[Array, "batch seq experts"], topk: int) -> Float[Array, " batch"]:
    """DeepSeek-V3's equations 17-20 for each sequence: sum over experts of f * P, with f the expert's share of the
    sequence's top-k choices by unbiased score (1 when balanced) and P its mean normalised score."""
    batch, seq, experts = scores.shape
    chosen = top_k(jax.lax.stop_gradient(scores).reshape(-1, experts), topk).reshape(batch, -1, 1)
    load = (chosen == jnp.arange(experts)).sum(1).astype(scores.dtype)
    fraction = load * (experts / (topk * seq))
    probability = (scores / scores.sum(-1, keepdims=True)).mean(1)
    return (fraction * probability).sum(-1)


def updated_balance_bias(
    balance_bias: Float[Array, "*layers experts"], counts: Int[Array, "*layers experts"], rate: float
) -> Float[Array, "*layers experts"]:
    """The bias after one optimizer step: up by `rate` where an expert took fewer tokens than the mean, down where it
    took more. In integers, so that the sign is exact: mean - count has the sign of total - experts * count."""
    direction = jnp.sign(counts.sum(-1, keepdims=True) - counts.shape[-1] * counts)
    return balance_bias + rate * direction.astype(balance_bias.dtype)


def experts_dense(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Every expert on every token, combined with a [tokens, experts] matrix that is zero where not chosen."""
    experts = gate.shape[0]
    chosen = routing.chosen[..., None] == jnp.arange(experts)
    combine = (chosen * routing.weights[..., None]).sum(1)
    out = jnp.zeros_like(wide(x))
    for expert in range(experts):
        g, u, d = (weight[expert].astype(x.dtype) for weight in (gate, up, down))
        activation = jax.nn.silu(x @ g.T) * (x @ u.T)
        out = out + combine[:, expert, None] * wide(activation @ d.T)
    return out.astype(x.dtype)


def experts_grouped(
    x: Float[Array, "tokens hidden"],
    routing: Routing,
    gate: Float[Array, "experts ffn hidden"],
    up: Float[Array, "experts ffn hidden"],
    down: Float[Array, "experts hidden ffn"],
    remat: bool,
) -> Float[Array, "tokens hidden"]:
    """Rows sorted by expert, one product per expert on just its rows. `remat` drops the gate and up products after the
    forward pass and computes them again in the backward pass: 2 more products than 9, for 2 * ffn values a row."""
    return _grouped_experts(remat, x, routing.chosen, routing.weights, gate, up, down)


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
    chunks = _cut(chosen, gate.shape[0], sizes[-1])
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


def experts_blocks(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Rows sorted by expert into blocks of `BLOCK`, each expert starting a block of its own, then one batched product
    with a weight per block. Shapes depend on nothing but the number of tokens; `remat` is not its business (whole
    layers can be rematerialised around it)."""
    tokens, topk = routing.chosen.shape
    experts = gate.shape[0]
    blocks = grouped_kernels.cut_blocks(routing.chosen, experts, BLOCK)
    padded = jnp.concatenate((jnp.repeat(x, topk, axis=0), jnp.zeros((1, x.shape[1]), x.dtype)))
    rows = padded[blocks.source].reshape(-1, BLOCK, x.shape[1])
    # Picking each block's weight by a product with a one-hot matrix makes the gradient a product too, not a scatter.
    pick = (blocks.expert[:, None] == jnp.arange(experts)).astype(x.dtype)

    def product(rows, weight):
        return jnp.einsum("bri,boi->bro", rows, jnp.einsum("be,eoi->boi", pick, weight.astype(x.dtype)))

    gated, raised = checkpoint_name((product(rows, gate), product(rows, up)), "experts")
    out = product(jax.nn.silu(gated) * raised, down).reshape(-1, x.shape[1])
    per_choice = wide(out[blocks.slot].reshape(tokens, topk, -1)) * routing.weights[..., None]
    return per_choice.sum(1).astype(x.dtype)


def experts_pallas(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Rows in blocks as in `blocks`, by kernels that read each block's weight in place (`grouped_kernels.py`). Where
    Triton does not compile for, the kernels are interpreted: slow, and good for tests."""
    blocks = grouped_kernels.cut_blocks(routing.chosen, gate.shape[0], grouped_kernels.ROW_BLOCK)

    def run(interpret: bool, *arrays):
        return grouped_kernels.swiglu_in_blocks(remat, interpret, blocks, *arrays)

    arrays = x, routing.weights, gate, up, down
    return jax.lax.platform_dependent(*arrays, cuda=partial(run, False), default=partial(run, True))


EXPERT_PATHS = {"dense": experts_dense, "grouped": experts_grouped, "blocks": experts_blocks, "pallas": experts_pallas}


class MoEOutput(NamedTuple):
    out: Float[Array, "batch seq hidden"]
    balance_loss: Float[Array, " batch"]
    expert_counts: Int[Array, " experts"]


class Router(nnx.Module):
    """Its weight, and the balance bias: a variable that neither the gradient nor the optimizer sees."""

    def __init__(self, config: ModelConfig, stack: Stack = ()) -> None:
        self.config = config
        self.weight = nnx.Param(jnp.zeros((*stack, config.n_routed_experts, config.hidden_size)))
        self.balance_bias = BalanceBias(jnp.zeros((*stack, config.n_routed_experts)))

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Routing:
        return route(x, self.weight[...], self.balance_bias[...], self.config)


class Experts(nnx.Module):
    """The routed experts' weights, stacked: all of them, or inside a step over several devices those of this one."""

    def __init__(self, config: ModelConfig, stack: Stack = ()) -> None:
        experts, hidden, ffn = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.experts = experts
        self.gate_proj = nnx.Param(jnp.zeros((*stack, experts, ffn, hidden)))
        self.up_proj = nnx.Param(jnp.zeros((*stack, experts, ffn, hidden)))
        self.down_proj = nnx.Param(jnp.zeros((*stack, experts, hidden, ffn)))

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, path: str, remat: bool
    ) -> Float[Array, "tokens hidden"]:
        weights = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        run = partial(EXPERT_PATHS[path], remat=remat)
        if len(weights[0]) < self.experts:
            return experts_exchanged(run, x, routing, *weights)
        return run(x, routing, *weights)


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, stack: Stack = ()) -> None:
        self.config = config
        self.router = Router(config, stack)
        self.experts = Experts(config, stack)
        if config.n_shared_experts:
            ffn = config.n_shared_experts * config.moe_intermediate_size
            self.shared_expert = SwiGLU(config.hidden_size, ffn, stack)

    def __call__(self, x: Float[Array, "batch seq hidden"], path: str, remat: bool) -> MoEOutput:
        """`path` is a key of `EXPERT_PATHS`; `remat` recomputes the experts' activations in the backward pass."""
        config = self.config
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        out = self.experts(tokens, routing, path, remat).reshape(x.shape)
        if config.n_shared_experts:
            out = out + self.shared_expert(x)
        scores = routing.scores.reshape(*x.shape[:2], -1)
        balance = sequence_balance_loss(scores, config.num_experts_per_tok)
        return MoEOutput(out, balance, count_experts(routing.chosen, config.n_routed_experts))
