"""What both backends share about batches and training states: splitting into micro-batches, arrays that are read only
when asked for, and the checks made before a stored state is trusted. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import IGNORE, TrainingState, UserError
from torch_ref.spec.parameters import parameter_table


def split_batch(
    inputs: np.ndarray, targets: np.ndarray, micro_batch_size: int, pad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [batch, seq] as [micro_batches, micro_batch, seq]. With `pad`, rows that score nothing fill the last one up,
    so that every forward pass has the same shape; without, a remainder raises `UserError`."""
    missing = -len(inputs) % micro_batch_size
    if missing and not pad:
        raise UserError(
            f"--micro-batch-size {micro_batch_size}: does not divide a batch of {len(inputs)} rows; use a divisor"
        )
    if missing:
        inputs = np.pad(inputs, ((0, missing), (0, 0)))
        targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=IGNORE)
    shape = (-1, micro_batch_size, inputs.shape[1])
    return inputs.reshape(shape), targets.reshape(shape)


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name, each fetched when asked for and not kept: a training state is three times the model's size."""

    def __init__(self, names: Iterable[str], fetch: Callable[[str], np.ndarray]) -> None:
        self._names = dict.fromkeys(names)
        self._fetch = fetch

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_config(stored: dict, config: ModelConfig, where: Path | str) -> None:
    """Raises `UserError` naming the first model field that differs from what `where` was made with."""
    own = config.to_dict()
    for name in [*own, *(name for name in stored if name not in own)]:
        if name not in stored or name not in own:
            verdict = "unknown" if name in stored else "missing"
            raise UserError(f"{where}: model field {name} is {verdict}; it was made by another version")
        if stored[name] != own[name]:
            raise UserError(
                f"{where}: made with {name} = {stored[name]}, this run has {own[name]}; "
                f"use --{name.replace('_', '-')} {stored[name]} or another run folder"
            )


def require_tensors(
    stored: Mapping[str, tuple[tuple[int, ...], str]],
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    where: Path | str,
) -> None:
    """Compare (shape, dtype) by name. Raises `UserError` naming the first tensor that differs."""
    for name in [*expected, *(name for name in stored if name not in expected)]:
        if name not in stored or name not in expected:
            raise UserError(f"{where}: {name} is {'not part of this model' if name in stored else 'missing'}")
        if stored[name] != expected[name]:
            (shape, dtype), (own_shape, own_dtype) = stored[name], expected[name]
            raise UserError(
                f"{where}: {name} is stored as {dtype} {list(shape)}, this run needs {own_dtype} {list(own_shape)}"
            )


def require_state(state: TrainingState, config: ModelConfig) -> None:
    """Raises `UserError` unless a neutral state holds this model: same config, every tensor named, moments in pairs.
    Shapes are seen when the arrays are read."""
    where = "training state"
    require_config(state.model_config.to_dict(), config, where)
    rows = parameter_table(config)
    groups: list[tuple[str, Any, list[str]]] = [("weights", state.weights, [row.name for row in rows])]
    if (state.first_moment is None) != (state.second_moment is None):
        raise UserError(f"{where}: only one of the two moments is there; give both or neither")
    if state.first_moment is not None:
        trainable = [row.name for row in rows if row.trainable]
        groups += [("first_moment", state.first_moment, trainable), ("second_moment", state.second_moment, trainable)]
    for group, arrays, names in groups:
        for name in sorted(set(arrays) ^ set(names)):
            raise UserError(
                f"{where}: {group} of {name} is {'not part of this model' if name in arrays else 'missing'}"
            )
