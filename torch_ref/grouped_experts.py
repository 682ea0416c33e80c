"""The experts' path `grouped`: rows sorted by expert, one product per expert on just its rows. One expert after the
other, or, on CUDA, all at once in grouped kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from torch_ref.cpu import operand
from torch_ref.layers import product


def count_experts(chosen: Int[Tensor, "*batch topk"], experts: int) -> Int[Tensor, " experts"]:
    """Tokens each expert takes. By comparison: `histc` and `bincount` sync the host or fail on MPS."""
    return (chosen.reshape(-1, 1) == torch.arange(experts, device=chosen.device)).sum(0)


def grouped_experts(
    x: Float[Tensor, "tokens hidden"],
    chosen: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate: Float[Tensor, "experts ffn hidden"],
    up: Float[Tensor, "experts ffn hidden"],
    down: Float[Tensor, "experts hidden ffn"],
    remat: bool,
) -> Float[Tensor, "tokens hidden"]:
    """See `moe.experts_grouped`."""
    if torch.compiler.is_compiling() and not _all_at_once(x, gate):
        from torch_ref.uncompiled import one_by_one as run
    else:
        run = GroupedExperts.apply
    return run(x, chosen, weights, gate, up, down, remat)


def _all_at_once(x: Float[Tensor, "tokens hidden"], gate: Float[Tensor, "experts ffn hidden"]) -> bool:
    """Whether to run the experts in grouped kernels. They ask the host for nothing, and `torch.compile` sees through
    them."""
    return x.is_cuda and x.dtype == torch.bfloat16 and grouped_kernels_take(*gate.shape[1:])


def grouped_kernels_take(ffn: int, hidden: int) -> bool:
    """Whether rows of both sizes, in bfloat16, are whole 16 bytes."""
    return ffn % 8 == 0 and hidden % 8 == 0


class GroupedExperts(torch.autograd.Function):
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


class Blocks(NamedTuple):
    """Choices sorted by expert, each expert's in blocks of `size` rows of its own."""

    slot: Int[Tensor, " choices"]
    """Row of each choice."""
    source: Int[Tensor, " rows"]
    """Choice of each row; one past the last choice for rows that fill up a block."""
    expert: Int[Tensor, " blocks"]
    """Of each block; unused blocks have the last."""


def cut_blocks(chosen: Int[Tensor, "tokens topk"], experts: int, size: int) -> Blocks:
    """Shapes depend on nothing but the number of tokens."""
    (tokens, topk), device = chosen.shape, chosen.device
    flat = chosen.reshape(-1)
    one_hot = (flat[:, None] == torch.arange(experts, device=device)).long()
    needed = (one_hot.sum(0) + size - 1) // size
    ends = needed.cumsum(0)
    # A choice's row: where its expert starts, plus how many earlier choices took the same expert.
    rank = ((one_hot.cumsum(0) - 1) * one_hot).sum(1)
    blocks = min(-(-tokens * topk // size) + experts, experts * -(-tokens // size))
    slot = (ends - needed)[flat] * size + rank
    choices = torch.arange(tokens * topk, device=device)
    source = torch.full((blocks * size,), tokens * topk, device=device).scatter(0, slot, choices)
    expert = (torch.arange(blocks, device=device)[:, None] >= ends).sum(1).clamp(max=experts - 1)
    return Blocks(slot, source, expert)
