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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_ref.grouped_experts import count_experts, cut_blocks, grouped_experts
from torch_ref.layers import SwiGLU, wide
from torch_ref.spec.config import ModelConfig

BLOCK = 64
"""Rows of one block of the `blocks` path."""


class Routing(NamedTuple):
    """The router's decision for every token."""

    chosen: Int[Tensor, "tokens topk"]
    weights: Float[Tensor, "tokens topk"]
    scores: Float[Tensor, "tokens experts"]


def route(
    x: Float[Tensor, "tokens hidden"],
    router: Float[Tensor, "experts hidden"],
    balance_bias: Float[Tensor, " experts"],
    config: ModelConfig,
) -> Routing:
    """Choose experts and weigh them, in float32 or wider whatever the dtype of `x`."""
    scores = F.linear(wide(x), wide(router)).sigmoid()
    chosen = top_k(scores.detach() + balance_bias, config.num_experts_per_tok)
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
    return Routing(chosen, weights, scores)


def top_k(scores: Float[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens topk"]:
    """Indices of the k largest, largest first; of equal scores the lowest index first."""
    # torch.topk promises no order of equal ones.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def sequence_balance_loss(scores: Float[Tensor, "batch seq experts"], topk: int) -> Float[Tensor, " batch"]:
    """DeepSeek-V3's equations 17-20 for each sequence: sum over experts of f * P, with f the expert's share of the
    sequence's top-k choices by unbiased score (1 when balanced) and P its mean normalised score."""
    batch, seq, experts = scores.shape
    chosen = top_k(scores.detach().reshape(-1, experts), topk).reshape(batch, -1, 1)
    load = (chosen == torch.arange(experts, device=scores.device)).sum(1).to(scores.dtype)
    fraction = load * (experts / (topk * seq))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (fraction * probability).sum(-1)


def updated_balance_bias(
    balance_bias: Float[Tensor, "*layers experts"], counts: Int[Tensor, "*layers experts"], rate: float
) -> Float[Tensor, "*layers experts"]:
    """The bias after one optimizer step: up by `rate` where an expert took fewer tokens than the mean, down where it
    took more. In integers, so that the sign is exact: mean - count has the sign of total - experts * count."""
    direction = (counts.sum(-1, keepdim=True) - counts.shape[-1] * counts).sign()
    return balance_bias + rate * direction.to(balance_bias.dtype)


def experts_dense(x, routing: Routing, gate, up, down, remat: bool) -> Float[Tensor, "tokens hidden"]:
    """Every expert on every token, combined with a [tokens, experts] matrix that is zero where not chosen."""
    experts = gate.shape[0]
    chosen = routing.chosen[..., None] == torch.arange(experts, device=x.device)
    combine = (chosen * routing.weights[..., None]).sum(1)
    out = torch.zeros_like(wide(x))
    for expert in range(experts):
        g, u, d = (weight[expert].to(x.dtype) for weight in (gate, up, down))
        activation = F.silu(x @ g.T) * (x @ u.T)
        out = out + combine[:, expert, None] * wide(activation @ d.T)
    return out.to(x.dtype)


def experts_grouped(
    x: Float[Tensor, "tokens hidden"],
    routing: Routing,
    gate: Float[Tensor, "experts ffn hidden"],
    up: Float[Tensor, "experts ffn hidden"],
    down: Float[Tensor, "experts hidden ffn"],
    remat: bool,
) -> Float[Tensor, "tokens hidden"]:
    """Rows sorted by expert, one product per expert on just its rows. `remat` drops the gate and up products after the
    forward pass and computes them again in the backward pass: 2 more products than 9, for 2 * ffn values a row."""
    return grouped_experts(x, routing.chosen, routing.weights, gate, up, down, remat)


def again(function: Callable, *arguments: Tensor) -> Any:
    """Call a function, of which nothing but the arguments is kept for the backward pass: that calls it again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn


def experts_blocks(x, routing: Routing, gate, up, down, remat: bool) -> Float[Tensor, "tokens hidden"]:
    """Rows sorted by expert into blocks of `BLOCK`, each expert starting a block of its own, then one batched product
    with a weight per block. Shapes depend on nothing but the number of tokens. The backward pass makes the blocks'
    rows and weights again, which are many times what they are picked from; with `remat` also the gate and up products.
    """
    tokens, topk = routing.chosen.shape
    experts = gate.shape[0]
    blocks = cut_blocks(routing.chosen, experts, BLOCK)
    # Picking each block's weight by a product with a one-hot matrix makes the gradient a product too, not a scatter.
    pick = (blocks.expert[:, None] == torch.arange(experts, device=x.device)).to(x.dtype)

    def blockwise(rows, weight):
        chosen = (pick @ weight.to(x.dtype).flatten(1)).unflatten(1, weight.shape[1:])
        return rows @ chosen.transpose(1, 2)

    def gate_and_up(x):
        padded = torch.cat((x.repeat_interleave(topk, 0), torch.zeros_like(x[:1])))
        rows = padded[blocks.source].reshape(-1, BLOCK, x.shape[1])
        return blockwise(rows, gate), blockwise(rows, up)

    def activate_and_down(gated, raised):
        return blockwise(F.silu(gated) * raised, down)

    if remat:
        out = again(lambda x: activate_and_down(*gate_and_up(x)), x)
    else:
        out = again(activate_and_down, *again(gate_and_up, x))
    out = out.reshape(-1, x.shape[1])
    per_choice = wide(out[blocks.slot].reshape(tokens, topk, -1)) * routing.weights[..., None]
    return per_choice.sum(1).to(x.dtype)


EXPERT_PATHS = {"dense": experts_dense, "grouped": experts_grouped, "blocks": experts_blocks}


class MoEOutput(NamedTuple):
    out: Float[Tensor, "batch seq hidden"]
    balance_loss: Float[Tensor, " batch"]
    expert_counts: Int[Tensor, " experts"]


class Router(nn.Module):
    """Its weight, and the balance bias, which neither the gradient nor the optimizer sees."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("balance_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return route(x, self.weight, self.balance_bias, self.config)


class Experts(nn.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, ffn = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing, path: str, remat: bool
    ) -> Float[Tensor, "tokens hidden"]:
        return EXPERT_PATHS[path](x, routing, self.gate_proj, self.up_proj, self.down_proj, remat)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_expert = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Float[Tensor, "batch seq hidden"], path: str, remat: bool) -> MoEOutput:
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
