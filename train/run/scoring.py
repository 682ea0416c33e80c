"""The loss on validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from torch_ref.spec.interface import IGNORE, Backend
from train.data.feed import Validation


def score(backend: Backend, validation: Validation, rows: int, before_part: Callable[[], None]) -> dict[str, float]:
    """Mean loss in nats per token, and what else the log keeps of it. `rows` are scored at once; `before_part` may
    raise to end it."""
    loss_sum, tokens = 0.0, 0
    for inputs, targets in fixed_size_parts(*validation.rows, rows):
        before_part()
        part_sum, part_tokens = backend.evaluate(inputs, targets)
        loss_sum += part_sum
        tokens += part_tokens
    loss = loss_sum / tokens
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    bits_per_byte = loss_sum / math.log(2) / validation.bytes
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte, "tokens": tokens}


def validation_line(values: dict[str, Any]) -> str:
    """For the console: the step, the dataset if it is not the run's own text, and the scores."""
    dataset = f", {values['dataset']}" if "dataset" in values else ""
    return (
        f"Validation at step {values['step']}{dataset} | Loss: {values['loss']:.4f} | "
        f"Perplexity: {values['perplexity']:.2f} | Bits per byte: {values['bits_per_byte']:.4f}"
    )


def fixed_size_parts(inputs: np.ndarray, targets: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in parts of one size, so that a framework compiles one shape; what fills up the last part is not scored."""
    for start in range(0, len(inputs), rows):
        missing = max(start + rows - len(inputs), 0)
        fill = ((0, missing), (0, 0))
        yield (
            np.pad(inputs[start : start + rows], fill),
            np.pad(targets[start : start + rows], fill, constant_values=IGNORE),
        )
