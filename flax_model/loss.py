"""Next-token cross-entropy that never holds the logits of a long sequence.

At 2048 tokens and 49,152 entries the logits are 400 MB, and their gradient as much again. Here only a chunk of tokens
has logits at a time, and its gradient is taken at once, while they are at hand: the backward pass then only scales
what was saved, one product of four less than recomputing the logits.

Twins: `torch_ref/loss.py`, `flax_model/loss.py`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from flax_model.layers import wide, wide_product
from torch_ref.spec.interface import IGNORE


def token_losses(logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"]) -> Float[Array, " tokens"]:
    """-log softmax(logits)[target] of each scored target, in nats; 0 of the others."""
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(targets != IGNORE, jax.nn.logsumexp(logits, axis=-1) - target_logits, 0)


def cross_entropy_plain(
    hidden: Float[Array, "tokens hidden"], embedding: Float[Array, "vocab hidden"], targets: Int[Array, " tokens"]
) -> Float[Array, ""]:
    """Sum over scored targets of -log softmax(hidden @ embedding.T)[target], in nats: the oracle of `cross_entropy`."""
    return token_losses(wide_product(hidden, embedding), targets).sum()


def softmax_gradient(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"], dtype: jnp.dtype
) -> tuple[Float[Array, ""], Float[Array, "tokens vocab"]]:
    """Sum of the losses, and their gradient: softmax - one-hot, and zero where nothing is scored."""
    scored, column = targets != IGNORE, jnp.maximum(targets, 0)[:, None]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    total = jnp.where(scored, normaliser - jnp.take_along_axis(logits, column, axis=1)[:, 0], 0).sum()
    one_hot = jnp.arange(logits.shape[1]) == column
    gradient = jnp.exp(logits - normaliser[:, None]) - one_hot
    return total, (scored[:, None] * gradient).astype(dtype)


def _chunks(hidden, targets, chunk):
    """Both cut into [chunks, chunk, ...]; the last one is filled up with targets that are not scored."""
    chunk = min(chunk, hidden.shape[0])
    missing = -hidden.shape[0] % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
    targets = jnp.pad(targets, (0, missing), constant_values=IGNORE)
    return hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: Float[Array, "tokens hidden"],
    embedding: Float[Array, "vocab hidden"],
    targets: Int[Array, " tokens"],
    chunk: int = 512,
) -> Float[Array, ""]:
    """`cross_entropy_plain` with the logits of at most `chunk` tokens at a time."""
    weight = embedding.astype(hidden.dtype)

    def one_chunk(total, part):
        return total + cross_entropy_plain(part[0], weight, part[1]), None

    zero = jnp.zeros((), wide(hidden[:0]).dtype)
    return jax.lax.scan(one_chunk, zero, _chunks(hidden, targets, chunk))[0]


def _forward(hidden, embedding, targets, chunk):
    weight = embedding.astype(hidden.dtype)

    def one_chunk(carry, part):
        total, embedding_gradient = carry
        rows, target = part
        loss, gradient = softmax_gradient(wide_product(rows, weight), target, hidden.dtype)
        embedding_gradient += wide_product(gradient.T, rows.T).astype(embedding.dtype)
        return (total + loss, embedding_gradient), gradient @ weight

    start = jnp.zeros((), wide(hidden[:0]).dtype), jnp.zeros_like(embedding)
    (total, embedding_gradient), hidden_gradient = jax.lax.scan(one_chunk, start, _chunks(hidden, targets, chunk))
    hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (hidden_gradient, embedding_gradient)


def _backward(chunk, saved, upstream):
    hidden_gradient, embedding_gradient = saved
    scaled = (wide(hidden_gradient) * upstream).astype(hidden_gradient.dtype)
    return scaled, embedding_gradient * upstream, None


cross_entropy.defvjp(_forward, _backward)


def row_losses(
    hidden: Float[Array, "batch seq hidden"],
    embedding: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch seq"],
    chunk: int = 512,
) -> Float[Array, " batch"]:
    """`cross_entropy` of each row by itself, for scoring: a gradient through it would keep all logits."""
    weight = embedding.astype(hidden.dtype)
    parts = _chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), chunk)
    losses = jax.lax.map(lambda part: token_losses(wide_product(part[0], weight), part[1]), parts)
    return losses.reshape(-1)[: targets.size].reshape(targets.shape).sum(1)
