"""The next token from its scores: filters, and the draw.

Twins: `torch_ref/sampling.py`, `flax_model/sampling.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from torch_ref.spec.interface import Sampling


def filter_logits(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Scores of the next token with those that may not be drawn at -inf, in the order of `transformers`: repetition
    penalty (Keskar et al. 2019) on tokens of the prompt and of the text so far, temperature, top-k, top-p (Holtzman
    et al. 2020), min-p (Nguyen et al. 2024). Tokens tied with the last one kept are kept. Greedy: the penalty alone."""
    vocab = logits.shape[-1]
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < vocab:
        last_kept = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    if sampling.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        cumulative = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        dropped = (cumulative <= 1 - sampling.top_p).sum(-1, keepdims=True)
        last_kept = jnp.take_along_axis(ascending, jnp.minimum(dropped, vocab - 1), axis=1)
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    if sampling.min_p > 0:
        probabilities = jax.nn.softmax(logits, axis=-1)
        threshold = sampling.min_p * probabilities.max(-1, keepdims=True)
        logits = jnp.where(probabilities < threshold, -jnp.inf, logits)
    return logits


def choose_token(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    uniform: Float[Array, " batch"],
    sampling: Sampling,
) -> Int[Array, " batch"]:
    """The next token of each row: the most likely (of equals the lowest id), or drawn by inverting the cumulative
    distribution at `uniform`."""
    logits = filter_logits(logits, seen, sampling)
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    # A parallel sum need not be monotone: by its rounding, a token that was filtered out could be hit.
    cumulative = jnp.cumsum(probabilities, axis=-1) * (probabilities > 0)
    return (cumulative > uniform[:, None] * cumulative.max(-1, keepdims=True)).argmax(-1)
