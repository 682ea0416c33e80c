"""The next token from its scores: filters, and the draw.

Twins: `torch_ref/sampling.py`, `flax_model/sampling.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.spec.interface import Sampling


def filter_logits(
    logits: Float[Tensor, "batch vocab"], seen: Bool[Tensor, "batch vocab"], sampling: Sampling
) -> Float[Tensor, "batch vocab"]:
    """Scores of the next token with those that may not be drawn at -inf, in the order of `transformers`: repetition
    penalty (Keskar et al. 2019) on tokens of the prompt and of the text so far, temperature, top-k, top-p (Holtzman
    et al. 2020), min-p (Nguyen et al. 2024). Tokens tied with the last one kept are kept. Greedy: the penalty alone."""
    vocab = logits.shape[-1]
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < vocab:
        last_kept = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last_kept, float("-inf"))
    if sampling.top_p < 1:
        ascending = logits.sort(-1).values
        dropped = (ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p).sum(-1, keepdim=True)
        last_kept = ascending.gather(1, dropped.clamp(max=vocab - 1))
        logits = logits.masked_fill(logits < last_kept, float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        threshold = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < threshold, float("-inf"))
    return logits


def choose_token(
    logits: Float[Tensor, "batch vocab"],
    seen: Bool[Tensor, "batch vocab"],
    uniform: Float[Tensor, " batch"],
    sampling: Sampling,
) -> Int[Tensor, " batch"]:
    """The next token of each row: the most likely (of equals the lowest id), or drawn by inverting the cumulative
    distribution at `uniform`."""
    logits = filter_logits(logits, seen, sampling)
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = logits.softmax(-1)
    # A parallel sum need not be monotone: by its rounding, a token that was filtered out could be hit.
    cumulative = probabilities.cumsum(-1) * (probabilities > 0)
    return (cumulative > uniform[:, None] * cumulative.amax(-1, keepdim=True)).int().argmax(-1)
