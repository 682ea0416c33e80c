"""Training states that no training made."""

from __future__ import annotations

import dataclasses

import numpy as np

from parity_tests.support.backends import CONFIG
from torch_ref.spec.interface import TrainingState
from torch_ref.spec.parameters import parameter_table

META = {
    "step": 5,
    "options": {"learning_rate": 0.001, "model": CONFIG.to_dict()},
    "progress": {"cursor": {"epoch": 0, "carry": 17}, "best_loss": 3.5, "stale_validations": 2},
}


def random_state(step: int, dtype: str = "float32") -> TrainingState:
    """A state with something in every tensor, and with steps that were skipped."""
    generator = np.random.default_rng(step)
    rows = parameter_table(CONFIG)

    def values(rows) -> dict:
        return {row.name: generator.standard_normal(row.shape).astype(dtype) for row in rows}

    trainable = [row for row in rows if row.trainable]
    state = TrainingState(CONFIG, values(rows), values(trainable), values(trainable), step, updates=step - 3)
    return dataclasses.replace(state, meta=META | {"step": step})
