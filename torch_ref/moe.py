"""Mixture of experts after DeepSeek-V3 (sections 2.1.2 and 4.2): sigmoid router, balance by bias, nothing dropped.

    scores = sigmoid(router(x))                        float32 or wider
    chosen = top-k of scores + balance bias            ties: lowest index first
    weights = scores[chosen] / sum * scaling           without the bias: it steers the choice, never the output
    y = shared_expert(x) + sum of weights * expert(x)

The routed experts run behind one function, `EXPERT_PATHS[path](x, routing, gate, up, down, remat)`:
`dense` runs every expert on every token and is the oracle; `grouped` sorts tokens by expert, so its cost follows the
active experts; `blocks` does so in static shapes without a host sync, for MPS. Twin of `flax_model/moe.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ref.cpu import operand
from torch_ref.layers import SwiGLU, product, wide
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
    """Indices of the k largest, largest first; of equal scores the lowest index first (`torch.topk` promises none)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def count_experts(chosen: Int[Tensor, "*batch topk"], experts: int) -> Int[Tensor, " experts"]:
    """Tokens each expert takes. By comparison: `histc` and `bincount` sync the host or fail on MPS."""
    return (chosen.reshape(-1, 1) == torch.arange(experts, device=chosen.device)).sum(0)


def sequence_balance_loss(scores: Float[Tensor, "batch seq experts"], topk: int) -> Float[Tensor, " batch"]:
    """DeepSeek-V3's equations 17-20 for each sequence: sum over experts of f * P, with f the expert's share of the
    sequence's top-k choices by unbiased score (1 when balanced) and P its mean normalised score."""
    seq, experts = scores.shape[1:]
    chosen = top_k(scores.detach().flatten(0, 1), topk).reshape(scores.shape[0], -1, 1)
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
    chosen = routing.chosen.unsqueeze(-1) == torch.arange(experts, device=x.device)
    combine = (chosen * routing.weights.unsqueeze(-1)).sum(1)
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
    run = _GroupedExperts.apply if _all_at_once(x, gate) else _one_by_one
    return run(x, routing.chosen, routing.weights, gate, up, down, remat)


def _all_at_once(x: Float[Tensor, "tokens hidden"], gate: Float[Tensor, "experts ffn hidden"]) -> bool:
    """Whether to run the experts in grouped kernels. They ask the host for nothing, and `torch.compile` sees through
    them."""
    return x.is_cuda and x.dtype == torch.bfloat16 and grouped_kernels_take(*gate.shape[1:])


def grouped_kernels_take(ffn: int, hidden: int) -> bool:
    """Whether rows of both sizes, in bfloat16, are whole 16 bytes."""
    return ffn % 8 == 0 and hidden % 8 == 0


@torch.compiler.disable
def _one_by_one(*operands):
    """The experts where the host has to know how many rows each of them has: no part of a compiled layer."""
    return _GroupedExperts.apply(*operands)


class _GroupedExperts(torch.autograd.Function):
    """One expert after the other, all three products of each while its activations are in the cache; or all experts at
    once, in grouped kernels (`_all_at_once`). The routing weight enters before the down projection, so the
    backward pass never needs the experts' outputs."""

    @staticmethod
    def forward(ctx, x, chosen, weights, gate, up, down, remat):
        topk = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # sorted row -> position in the flattened choices
        inverse = order.argsort()
        ends = count_experts(chosen, gate.shape[0]).cumsum(0)
        rows = x[order // topk]
        row_weights = weights.flatten()[order].to(x.dtype)[:, None]
        out, products = [], []
        for part, experts, offsets in _groups(rows, ends, gate):
            gated = grouped_product(rows[part], gate[experts], offsets)
            raised = grouped_product(rows[part], up[experts], offsets)
            activation = F.silu(gated).mul_(raised).mul_(row_weights[part])
            out.append(grouped_product(activation, down[experts], offsets))
            products += () if remat else (gated, raised)
        ctx.save_for_backward(x, order, inverse, ends, weights, gate, up, down, *products)
        return torch.cat(out)[inverse].unflatten(0, (-1, topk)).sum(1)

    @staticmethod
    def backward(ctx, upstream):
        x, order, inverse, ends, weights, gate, up, down, *products = ctx.saved_tensors
        topk = weights.shape[1]
        rows, upstream = x[order // topk], upstream[order // topk]
        row_weights = weights.flatten()[order].to(x.dtype)[:, None]
        d_rows, d_weights = [], []
        d_gate, d_up, d_down = (torch.empty_like(weight) for weight in (gate, up, down))
        for number, (part, experts, offsets) in enumerate(_groups(rows, ends, gate)):
            r, w, d_out = rows[part], row_weights[part], upstream[part]
            if products:
                gated, raised = products[2 * number : 2 * number + 2]
            else:
                gated = grouped_product(r, gate[experts], offsets)
                raised = grouped_product(r, up[experts], offsets)
            sigmoid = gated.sigmoid()
            silu = gated * sigmoid
            activation = silu * raised
            d_weighted = grouped_product(d_out, down[experts].transpose(1, 2), offsets)
            d_weights.append((d_weighted * activation).sum(-1, dtype=weights.dtype))
            grouped_outer(d_out, activation.mul_(w), offsets, out=d_down[experts])
            d_activation = d_weighted.mul_(w)
            # silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
            slope = sigmoid.addcmul_(silu, 1 - sigmoid)
            d_raised = silu.mul_(d_activation)
            d_gated = d_activation.mul_(raised).mul_(slope)
            grouped_outer(d_gated, r, offsets, out=d_gate[experts])
            grouped_outer(d_raised, r, offsets, out=d_up[experts])
            d_r = grouped_product(d_gated, gate[experts].transpose(1, 2), offsets)
            d_rows.append(d_r.add_(grouped_product(d_raised, up[experts].transpose(1, 2), offsets)))
        d_x = torch.cat(d_rows)[inverse].unflatten(0, (-1, topk)).sum(1)
        return d_x, None, torch.cat(d_weights)[inverse].view_as(weights), d_gate, d_up, d_down, None


def _groups(rows: Tensor, ends: Int[Tensor, " experts"], gate: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """What is computed together: which sorted rows, of which experts, and where each of these ends among the rows. One
    expert at a time, which has no ends (None); or all of them."""
    if _all_at_once(rows, gate):
        yield slice(None), slice(None), ends.int()  # no transfer to the host
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        yield slice(start, end), slice(expert, expert + 1), None
        start = end


def grouped_product(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "experts outputs inputs"],
    ends: Int[Tensor, " experts"] | None,
) -> Float[Tensor, "rows outputs"]:
    """rows[i] @ weight[e].T for the expert e whose rows end at ends[e]; without `ends`, for the only expert."""
    if ends is None:
        return product(rows, weight[0])
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)


def grouped_outer(
    left: Float[Tensor, "rows outputs"],
    right: Float[Tensor, "rows inputs"],
    ends: Int[Tensor, " experts"] | None,
    out: Float[Tensor, "experts outputs inputs"],
) -> None:
    """out[e] = left.T @ right over each expert's rows: the gradient of `grouped_product` for its weight."""
    if ends is not None:
        out.copy_(F.grouped_mm(left.T, right, offs=ends))
    elif out.dtype == left.dtype:
        torch.mm(left.T, right, out=out[0])
    else:
        out[0] = operand(left).T @ operand(right)


def experts_blocks(x, routing: Routing, gate, up, down, remat: bool) -> Float[Tensor, "tokens hidden"]:
    """Rows sorted by expert into blocks of `BLOCK`, each expert starting a block of its own, then one batched product
    with a weight per block. Shapes depend on nothing but the number of tokens; `remat` is not its business (whole
    layers can be rematerialised around it)."""
    tokens, topk = routing.chosen.shape
    experts = gate.shape[0]
    flat = routing.chosen.flatten()
    one_hot = (flat[:, None] == torch.arange(experts, device=x.device)).long()
    counts = one_hot.sum(0)
    block_ends = ((counts + BLOCK - 1) // BLOCK).cumsum(0)
    first_row = (block_ends - (counts + BLOCK - 1) // BLOCK) * BLOCK
    # A choice's row: where its expert starts, plus how many earlier choices took the same expert.
    rank = ((one_hot.cumsum(0) - 1) * one_hot).sum(1)
    slot = first_row[flat] + rank
    blocks = min(-(-tokens * topk // BLOCK) + experts, experts * -(-tokens // BLOCK))
    expert_of_block = (torch.arange(blocks, device=x.device)[:, None] >= block_ends).sum(1).clamp(max=experts - 1)

    source = torch.full((blocks * BLOCK,), tokens * topk, device=x.device).scatter(
        0, slot, torch.arange(tokens * topk, device=x.device)
    )
    padded = torch.cat((x.repeat_interleave(topk, 0), x.new_zeros(1, x.shape[1])))
    rows = padded[source].unflatten(0, (blocks, BLOCK))
    # Picking each block's weight by a product with a one-hot matrix makes the gradient a product too, not a scatter.
    pick = (expert_of_block[:, None] == torch.arange(experts, device=x.device)).to(x.dtype)

    def blockwise(rows: Tensor, weight: Tensor) -> Tensor:
        chosen = (pick @ weight.to(x.dtype).flatten(1)).unflatten(1, weight.shape[1:])
        return rows @ chosen.transpose(1, 2)

    out = blockwise(F.silu(blockwise(rows, gate)) * blockwise(rows, up), down).flatten(0, 1)
    per_choice = wide(out[slot].unflatten(0, (tokens, topk))) * routing.weights.unsqueeze(-1)
    return per_choice.sum(1).to(x.dtype)


EXPERT_PATHS = {"dense": experts_dense, "grouped": experts_grouped, "blocks": experts_blocks}


class MoEOutput(NamedTuple):
    out: Float[Tensor, "batch seq hidden"]
    balance_loss: Float[Tensor, " batch"]
    expert_counts: Int[Tensor, " experts"]


class Router(nn.Module):
    """Its weight, and the balance bias: a buffer that neither the gradient nor the optimizer sees."""

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
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        out = self.experts(tokens, routing, path, remat).view_as(x)
        if config.n_shared_experts:
            out = out + self.shared_expert(x)
        balance = sequence_balance_loss(routing.scores.unflatten(0, x.shape[:2]), config.num_experts_per_tok)
        return MoEOutput(out, balance, count_experts(routing.chosen, config.n_routed_experts))
