"""Where a run stands, besides the backend's own state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch_ref.spec.interface import StepResult


@dataclass
class Progress:
    """Stored in every checkpoint, so that a resumed run goes on exactly where it was."""

    cursor: dict | None = None
    """Position in the data after the last batch trained on; None is the start."""
    tokens_seen: int = 0
    loss: float | None = None
    """Of the last step, nats per token."""
    skipped_steps: int = 0
    """Steps without an update since the start of the run."""
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Finite losses of the last steps, nats per token, for their median: `spikes.WINDOW` of them."""
    spikes_in_a_row: int = 0
    """Steps, up to the last one, whose loss was a spike."""
    rolled_back_at: int = 0
    """The step at which the run was last rolled back, or at which one that may be began; 0 if there is neither."""
    rollbacks: int = 0
    """How often in a row it was, to the same weights."""
    best_loss: float | None = None
    """Validation loss of the best state, nats per token; a later one is better if it is lower by more than
    `--min-delta`."""
    best_step: int = 0
    stale_validations: int = 0
    """Validations since the best one."""
    owed: list[str] = field(default_factory=list)
    """What a signal kept from being done at this step, `validation` and `sample`: a resumed run begins with it."""

    @classmethod
    def stored(cls, values: dict) -> Progress:
        """From a checkpoint. Raises ValueError naming a value that is unknown or of another kind."""
        kinds = get_type_hints(cls)
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"progress has a value {name!r} that this version does not know")
            if not _is(value, kinds[name]):
                raise ValueError(f"{name} {value!r} is no {kinds[name]}")
        if unknown := set(values.get("owed", ())) - {"validation", "sample"}:
            raise ValueError(f"{sorted(unknown)} are not known to be owed")
        return cls(**values)

    def stepped(self, cursor: dict, result: StepResult) -> None:
        """Take note of a step, and of the position in the data after it."""
        self.cursor = cursor
        self.tokens_seen += result.tokens
        self.loss = result.loss
        self.skipped_steps += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1

    def validated(self, step: int, loss: float, min_delta: float) -> bool:
        """Take note of a validation loss; True if it is the best. NaN never is."""
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss - min_delta)
        if better:
            self.best_loss, self.best_step, self.stale_validations = loss, step, 0
        else:
            self.stale_validations += 1
        return better

    def forget_best(self) -> None:
        """For where losses from here on are of other text."""
        self.best_loss, self.best_step, self.stale_validations = None, 0, 0


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a kind, one of a field above."""
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(member, *get_args(kind)) for member in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)
