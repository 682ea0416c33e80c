"""Next-token cross-entropy that never holds the logits of a long sequence.

At 2048 tokens and 49,152 entries the logits are 400 MB, and their gradient as much again. Here only a chunk of tokens
has logits at a time, and its gradient is taken at once, while they are at hand: the backward pass then only scales
what was saved, one product of four less than recomputing the logits.

Twins: `torch_ref/loss.py`, `flax_model/loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.block import COMPILER
from torch_ref.cpu import operand
from torch_ref.layers import wide, wide_product
from torch_ref.mps import long_product
from torch_ref.spec.interface import IGNORE


def token_losses(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """-log softmax(logits)[target] of each scored target, in nats; 0 of the others."""
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None].long()).squeeze(1)
    return torch.where(targets != IGNORE, logits.logsumexp(-1) - target_logits, 0)


def cross_entropy_plain(
    hidden: Float[Tensor, "tokens hidden"], embedding: Float[Tensor, "vocab hidden"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Sum over scored targets of -log softmax(hidden @ embedding.T)[target], in nats: the oracle of `cross_entropy`."""
    return token_losses(wide_product(hidden, embedding), targets).sum()


def softmax_gradient(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], dtype: torch.dtype
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Sum of the losses, and their gradient: softmax - one-hot, and zero where nothing is scored. Uncompiled, one
    operation after the other writes into `logits`."""
    scored, column = targets != IGNORE, targets.clamp(min=0)[:, None].long()
    normaliser = logits.logsumexp(-1)
    total = torch.where(scored, normaliser - logits.gather(1, column).squeeze(1), 0).sum()
    if torch.compiler.is_compiling():  # fused into one loop, which a scatter could not be
        one_hot = torch.arange(logits.shape[1], device=logits.device) == column
        gradient = (logits - normaliser[:, None]).exp() - one_hot.to(logits.dtype)
    else:
        gradient = logits.sub_(normaliser[:, None]).exp_()
        gradient.scatter_add_(1, column, -torch.ones_like(column, dtype=gradient.dtype))
    return total, gradient.mul_(scored[:, None]).to(dtype)


@cache
def compiled_softmax_gradient() -> Callable:
    """`softmax_gradient` compiled: two passes over the logits, for ten of its operations run one by one."""
    return torch.compile(softmax_gradient, dynamic=False, backend=COMPILER)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, embedding, targets, chunk, compiled, recording):
        # `needs_input_grad` alone is true of parameters under `no_grad` too, where no backward pass will come.
        needs_gradient = recording and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        differentiate = compiled_softmax_gradient() if compiled else softmax_gradient
        states, weight = operand(hidden), operand(embedding.to(hidden.dtype))
        total = torch.zeros((), dtype=wide(hidden[:0]).dtype, device=hidden.device)
        if needs_gradient:
            hidden_gradient = torch.empty_like(hidden)
            embedding_gradient = torch.zeros_like(embedding)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            rows, target = states[part], targets[part]
            if not needs_gradient:
                total += token_losses(wide_product(rows, weight), target).sum()
                continue
            loss, gradient = differentiate(wide_product(rows, weight), target, hidden.dtype)
            total += loss
            gradient = operand(gradient)
            hidden_gradient[part] = long_product(gradient, weight)
            if embedding.dtype == gradient.dtype:
                embedding_gradient.addmm_(gradient.T, rows)
            else:
                embedding_gradient += wide_product(gradient.T, rows.T).to(embedding.dtype)
            del gradient  # before the next chunk has its logits
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient, embedding_gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, embedding_gradient = ctx.saved_tensors
        scaled = (wide(hidden_gradient) * upstream).to(hidden_gradient.dtype)
        return scaled, embedding_gradient * upstream, None, None, None, None


def cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    embedding: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " tokens"],
    chunk: int = 512,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """`cross_entropy_plain` with the logits of at most `chunk` tokens at a time, and their gradient by
    `compiled_softmax_gradient` if asked for."""
    return _ChunkedCrossEntropy.apply(hidden, embedding, targets, chunk, compiled, torch.is_grad_enabled())


def row_losses(
    hidden: Float[Tensor, "batch seq hidden"],
    embedding: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "batch seq"],
    chunk: int = 512,
) -> Float[Tensor, " batch"]:
    """`cross_entropy` of each row by itself, for scoring: a gradient through it would keep all logits."""
    weight = operand(embedding.to(hidden.dtype))
    losses = []
    for states, scored in zip(operand(hidden).flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True):
        losses.append(token_losses(wide_product(states, weight), scored))
    return torch.cat(losses).view(targets.shape).sum(1)
