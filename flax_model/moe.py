"""Mixture of experts after DeepSeek-V3 (sections 2.1.2 and 4.2): sigmoid router, balance by bias, nothing dropped.

    scores = sigmoid(router(x))                        float32 or wider
    chosen = top-k of scores + balance bias            ties: lowest index first
    weights = scores[chosen] / sum * scaling           without the bias: it steers the choice, never the output
    y = shared_expert(x) + sum of weights * expert(x)

The routed experts run behind one function, `EXPERT_PATHS[path](x, routing, gate, up, down, remat)`:
`dense` runs every expert on every token and is the oracle; `grouped` sorts tokens by expert, so its cost follows the
active experts; `blocks` does so without branches, for GPUs. Twin of `torch_ref/moe.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_model.layers import Stack, SwiGLU, wide
from torch_ref.config import ModelConfig

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
    scores = jax.nn.sigmoid(wide(x) @ wide(router).T)
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


class Groups(NamedTuple):
    """How choices are sorted by expert. Sorted arrays have a tail of `_tail(...)` rows that belong to nobody, so that
    a slice of an expert's rows, rounded up to one of the sizes of `bucket_sizes`, never runs over the end."""

    order: Int[Array, " rows"]
    """Sorted row -> position in the flattened choices (the tail repeats the first)."""
    inverse: Int[Array, " choices"]
    """Position in the flattened choices -> sorted row."""
    counts: Int[Array, " experts"]
    starts: Int[Array, " experts"]
    buckets: Int[Array, " experts"]
    """Index into `bucket_sizes` of the smallest size that holds an expert's rows."""


def bucket_sizes(tokens: int, experts: int, topk: int) -> list[int]:
    """Row counts that a product is compiled for: 0, steps of an eighth of the mean load up to twice the mean, then
    growing by a quarter, up to all tokens (a token takes an expert at most once)."""
    step = max(8, -(-tokens * topk // experts // 64) * 8)
    sizes = [min(step * i, tokens) for i in range(17)]
    while sizes[-1] < tokens:
        sizes.append(min(-(-sizes[-1] * 5 // 4 // 8) * 8, tokens))
    return sorted(set(sizes))


def _group(chosen: Int[Array, "tokens topk"], experts: int) -> tuple[Groups, list[int]]:
    tokens, topk = chosen.shape
    sizes = bucket_sizes(tokens, experts, topk)
    tail = max(large - small for small, large in zip(sizes, sizes[1:], strict=False))
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    inverse = jnp.argsort(order)
    counts = count_experts(chosen, experts)
    starts = jnp.cumsum(counts) - counts
    buckets = jnp.searchsorted(jnp.array(sizes), counts)
    return Groups(jnp.pad(order, (0, tail)), inverse, counts, starts, buckets), sizes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_experts(remat, x, chosen, weights, gate, up, down):
    return _grouped_forward(remat, x, chosen, weights, gate, up, down)[0]


def _grouped_forward(remat, x, chosen, weights, gate, up, down):
    """The routing weight enters before the down projection, so the backward pass never needs the experts' outputs."""
    topk = chosen.shape[1]
    groups, sizes = _group(chosen, gate.shape[0])
    rows = x[groups.order // topk]
    row_weights = weights.reshape(-1)[groups.order].astype(x.dtype)[:, None]
    gated, raised = grouped_product(rows, gate, groups, sizes), grouped_product(rows, up, groups, sizes)
    out = grouped_product(jax.nn.silu(gated) * raised * row_weights, down, groups, sizes)
    saved = x, weights, groups, gate, up, down, None if remat else (gated, raised)
    return out[groups.inverse].reshape(-1, topk, x.shape[1]).sum(1), saved


def _grouped_backward(remat, saved, upstream):
    x, weights, groups, gate, up, down, products = saved
    tokens, topk = weights.shape
    sizes = bucket_sizes(tokens, gate.shape[0], topk)
    rows = x[groups.order // topk]
    if products is None:
        products = grouped_product(rows, gate, groups, sizes), grouped_product(rows, up, groups, sizes)
    gated, raised = products
    row_weights = weights.reshape(-1)[groups.order].astype(x.dtype)[:, None]
    upstream = upstream[groups.order // topk]

    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    activation = silu * raised
    d_weighted = grouped_product(upstream, down.swapaxes(1, 2), groups, sizes)
    d_weights = (d_weighted * activation).sum(-1, dtype=weights.dtype)[groups.inverse].reshape(weights.shape)
    d_down = grouped_outer(upstream, activation * row_weights, groups, sizes, down.dtype)
    d_activation = d_weighted * row_weights
    d_raised = d_activation * silu
    # silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
    d_gated = d_activation * raised * (sigmoid * (1 + gated * (1 - sigmoid)))
    d_gate = grouped_outer(d_gated, rows, groups, sizes, gate.dtype)
    d_up = grouped_outer(d_raised, rows, groups, sizes, up.dtype)
    d_rows = grouped_product(d_gated, gate.swapaxes(1, 2), groups, sizes)
    d_rows += grouped_product(d_raised, up.swapaxes(1, 2), groups, sizes)
    d_x = d_rows[groups.inverse].reshape(-1, topk, x.shape[1]).sum(1)
    return d_x, None, d_weights, d_gate, d_up, d_down


_grouped_experts.defvjp(_grouped_forward, _grouped_backward)


def grouped_product(
    rows: Float[Array, "rows inputs"], weight: Float[Array, "experts outputs inputs"], groups: Groups, sizes: list[int]
) -> Float[Array, "rows outputs"]:
    """rows[i] @ weight[e].T for the expert e that row i belongs to. Rows past an expert's last are overwritten by the
    next expert; what is left in the tail means nothing."""

    def one_expert(out, expert):
        w, start, bucket = expert

        def branch(size):
            def run(out):
                part = jax.lax.dynamic_slice_in_dim(rows, start, size) @ w.astype(rows.dtype).T
                return jax.lax.dynamic_update_slice_in_dim(out, part, start, 0)

            return run

        return jax.lax.switch(bucket, [branch(size) for size in sizes], out), None

    out = jnp.zeros((rows.shape[0], weight.shape[1]), rows.dtype)
    return jax.lax.scan(one_expert, out, (weight, groups.starts, groups.buckets))[0]


def grouped_outer(
    left: Float[Array, "rows outputs"],
    right: Float[Array, "rows inputs"],
    groups: Groups,
    sizes: list[int],
    dtype: jnp.dtype,
) -> Float[Array, "experts outputs inputs"]:
    """left.T @ right over each expert's rows: the gradient of `grouped_product` with respect to its weight."""

    def one_expert(_, expert):
        start, count, bucket = expert

        def branch(size):
            def run():
                mine = (jnp.arange(size) < count)[:, None]
                a = jax.lax.dynamic_slice_in_dim(left, start, size)
                b = jax.lax.dynamic_slice_in_dim(right, start, size)
                a, b = (jnp.where(mine, a, 0), b) if left.shape[1] < right.shape[1] else (a, jnp.where(mine, b, 0))
                return (a.T @ b).astype(dtype)

            return run

        return None, jax.lax.switch(bucket, [branch(size) for size in sizes])

    return jax.lax.scan(one_expert, None, (groups.starts, groups.counts, groups.buckets))[1]


def experts_blocks(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Rows sorted by expert into blocks of `BLOCK`, each expert starting a block of its own, then one batched product
    with a weight per block. Shapes depend on nothing but the number of tokens; `remat` is not its business (whole
    layers can be rematerialised around it)."""
    tokens, topk = routing.chosen.shape
    experts = gate.shape[0]
    flat = routing.chosen.reshape(-1)
    one_hot = (flat[:, None] == jnp.arange(experts)).astype(jnp.int32)
    counts = one_hot.sum(0)
    block_ends = jnp.cumsum((counts + BLOCK - 1) // BLOCK)
    first_row = (block_ends - (counts + BLOCK - 1) // BLOCK) * BLOCK
    # A choice's row: where its expert starts, plus how many earlier choices took the same expert.
    rank = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(1)
    slot = first_row[flat] + rank
    blocks = min(-(-tokens * topk // BLOCK) + experts, experts * -(-tokens // BLOCK))
    expert_of_block = jnp.minimum((jnp.arange(blocks)[:, None] >= block_ends).sum(1), experts - 1)

    source = jnp.full(blocks * BLOCK, tokens * topk).at[slot].set(jnp.arange(tokens * topk))
    padded = jnp.concatenate((jnp.repeat(x, topk, axis=0), jnp.zeros((1, x.shape[1]), x.dtype)))
    rows = padded[source].reshape(blocks, BLOCK, -1)
    # Picking each block's weight by a product with a one-hot matrix makes the gradient a product too, not a scatter.
    pick = (expert_of_block[:, None] == jnp.arange(experts)).astype(x.dtype)

    def product(rows, weight):
        return jnp.einsum("bri,boi->bro", rows, jnp.einsum("be,eoi->boi", pick, weight.astype(x.dtype)))

    out = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down).reshape(blocks * BLOCK, -1)
    per_choice = wide(out[slot].reshape(tokens, topk, -1)) * routing.weights[..., None]
    return per_choice.sum(1).astype(x.dtype)


EXPERT_PATHS = {"dense": experts_dense, "grouped": experts_grouped, "blocks": experts_blocks}


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
    """The routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig, stack: Stack = ()) -> None:
        experts, hidden, ffn = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nnx.Param(jnp.zeros((*stack, experts, ffn, hidden)))
        self.up_proj = nnx.Param(jnp.zeros((*stack, experts, ffn, hidden)))
        self.down_proj = nnx.Param(jnp.zeros((*stack, experts, hidden, ffn)))

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, path: str, remat: bool
    ) -> Float[Array, "tokens hidden"]:
        weights = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        return EXPERT_PATHS[path](x, routing, *weights, remat)


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
