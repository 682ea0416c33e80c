"""What generation in both frameworks shares: the check of a request, shapes, and the random numbers. NumPy only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import Sampling, UserError

LEAST_TEMPERATURE = 1e-6
"""The most likely token is drawn long before; at far lower ones scores overflow in float32."""


def check_request(prompts: list[list[int]], sampling: Sampling, config: ModelConfig) -> None:
    """Raise `UserError`, before any work, for a request that cannot be met."""
    greedy = "--greedy takes the most likely token"
    rules = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", sampling.temperature >= LEAST_TEMPERATURE, f"must be at least {LEAST_TEMPERATURE}; {greedy}"),
        ("top_k", sampling.top_k >= 0, "must be at least 0, which turns it off"),
        ("top_p", 0 <= sampling.top_p <= 1, "must be from 0 to 1, which turns it off"),
        ("min_p", 0 <= sampling.min_p <= 1, "must be from 0, which turns it off, to 1"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "must be above 0; 1 turns it off"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(sampling, name)}: {rule}")
    if not prompts or not all(prompts):
        raise UserError("--prompt: a prompt needs at least one token")
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > config.max_position:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens}: with a prompt of {longest} tokens that is more than the "
            f"context of {config.max_position}; at most {max(config.max_position - longest, 0)} fit"
        )
    for prompt in prompts:
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise UserError(f"--prompt: a token id is outside the model's vocabulary of {config.vocab_size}")


def pad_prompts(prompts: list[list[int]], length: int) -> Int32[np.ndarray, "batch prompt"]:
    """Prompts as rows, filled up on the right to `length`, where a causal model does not see it."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def bucket(length: int, context: int) -> int:
    """The length that arrays are made for, so that few shapes are compiled: 16, 24, 32, 48, 64 and so on, at most the
    context."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, context)


def draw_uniforms(seed: int, batch: int, count: int) -> Float32[np.ndarray, "batch count"]:
    """A number in [0, 1) for each new token of each prompt: one stream per seed and row, and the same ones in
    both frameworks, so that a seed gives the same text in either, up to rounding.

    They are multiples of 2**-23. For a float32 total t, t * u is then below t in float32 arithmetic too, so a search
    for it in a cumulative sum that ends at t always finds a token. Raises `UserError` for a negative seed.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    rows = [np.random.Generator(np.random.PCG64([seed, row])).integers(0, 1 << 23, count) for row in range(batch)]
    return (np.stack(rows) / (1 << 23)).astype(np.float32)
