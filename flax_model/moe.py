"""Mixture of experts after DeepSeek-V3 (sections 2.1.2 and 4.2): sigmoid router, balance by bias, nothing dropped.

    scores = sigmoid(router(x))                        float32 or wider
    chosen = top-k of scores + balance bias            ties: lowest index first
    weights = scores[chosen] / sum * scaling           without the bias: it steers the choice, never the output
    y = shared_expert(x) + sum of weights * expert(x)

The routed experts run behind one function, `EXPERT_PATHS[path](x, routing, gate, up, down, remat)`: `dense` runs every
expert on every token and is the oracle; the cost of the others follows the active experts.

Twins: `torch_ref/moe.py`, `flax_model/moe.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from flax_model import grouped_kernels
from flax_model.expert_parallel import experts_exchanged
from flax_model.grouped_experts import count_experts, grouped_experts
from flax_model.layers import SwiGLU, wide
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
    logits = jnp.matmul(wide(x), wide(router).T, precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(checkpoint_name(logits, "routing"))
    chosen = top_k(jax.lax.stop_gradient(scores) + balance_bias, config.num_experts_per_tok)
    chosen = checkpoint_name(chosen, "routing")
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * config.routed_scaling_factor
    return Routing(chosen, weights, scores)


def top_k(scores: Float[Array, "tokens experts"], k: int) -> Int[Array, "tokens topk"]:
    """Indices of the k largest, largest first; of equal scores the lowest index first."""
    return jax.lax.top_k(scores, k)[1]


def sequence_balance_loss(scores: Float[Array, "batch seq experts"], topk: int) -> Float[Array, " batch"]:
    """DeepSeek-V3's equations 17-20 for each sequence: sum over experts of f * P, with f the expert's share of the
    sequence's top-k choices by unbiased score (1 when balanced) and P its mean normalised score."""
    batch, seq, experts = scores.shape
    chosen = top_k(jax.lax.stop_gradient(scores).reshape(-1, experts), topk).reshape(batch, -1, 1)
    load = (chosen == jnp.arange(experts)).sum(1).astype(scores.dtype)
    fraction = checkpoint_name(load * (experts / (topk * seq)), "routing")
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
    return grouped_experts(x, routing.chosen, routing.weights, gate, up, down, remat)


def experts_blocks(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Rows sorted by expert into blocks of `BLOCK`, each expert starting a block of its own, then one batched product
    with a weight per block. Shapes depend on nothing but the number of tokens; `remat` is not its business (whole
    layers can be rematerialised around it)."""
    tokens, topk = routing.chosen.shape
    experts = gate.shape[0]
    blocks = checkpoint_name(grouped_kernels.cut_blocks(routing.chosen, experts, BLOCK), "routing")
    padded = jnp.concatenate((jnp.repeat(x, topk, axis=0), jnp.zeros_like(x[:1])))
    rows = padded[blocks.source].reshape(-1, BLOCK, x.shape[1])
    # Picking each block's weight by a product with a one-hot matrix makes the gradient a product too, not a scatter.
    pick = (blocks.expert[:, None] == jnp.arange(experts)).astype(x.dtype)

    def blockwise(rows, weight):
        return jnp.einsum("bri,boi->bro", rows, jnp.einsum("be,eoi->boi", pick, weight.astype(x.dtype)))

    gated, raised = checkpoint_name((blockwise(rows, gate), blockwise(rows, up)), "experts")
    out = blockwise(jax.nn.silu(gated) * raised, down).reshape(-1, x.shape[1])
    per_choice = wide(out[blocks.slot].reshape(tokens, topk, -1)) * routing.weights[..., None]
    return per_choice.sum(1).astype(x.dtype)


def experts_pallas(x, routing: Routing, gate, up, down, remat: bool) -> Float[Array, "tokens hidden"]:
    """Rows in blocks as in `blocks`, by kernels that read each block's weight in place (`grouped_kernels.py`). Where
    Triton does not compile for, the kernels are interpreted: slow, and good for tests."""
    blocks = grouped_kernels.cut_blocks(routing.chosen, gate.shape[0], grouped_kernels.ROW_BLOCK)
    blocks = checkpoint_name(blocks, "routing")

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
    """Its weight, and the balance bias, which neither the gradient nor the optimizer sees."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.weight = nnx.Param(jnp.zeros((config.n_routed_experts, config.hidden_size)))
        self.balance_bias = BalanceBias(jnp.zeros(config.n_routed_experts))

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Routing:
        return route(x, self.weight[...], self.balance_bias[...], self.config)


class Experts(nnx.Module):
    """The routed experts' weights, stacked."""

    # Inside a step over several devices they are those of this one, and paths get choices of an expert one past the
    # last, which stands for none of this device (`expert_parallel.py`).

    def __init__(self, config: ModelConfig) -> None:
        experts, hidden, ffn = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.experts = experts
        self.gate_proj = nnx.Param(jnp.zeros((experts, ffn, hidden)))
        self.up_proj = nnx.Param(jnp.zeros((experts, ffn, hidden)))
        self.down_proj = nnx.Param(jnp.zeros((experts, hidden, ffn)))

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, path: str, remat: bool
    ) -> Float[Array, "tokens hidden"]:
        weights = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        run = partial(EXPERT_PATHS[path], remat=remat)
        if len(weights[0]) < self.experts:
            return experts_exchanged(run, x, routing, *weights)
        return run(x, routing, *weights)


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_expert = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

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
