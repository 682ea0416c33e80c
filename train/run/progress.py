"""Where a run stands, besides the backend's own state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


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
    """The step at which the run was last rolled back; 0 if it never was."""
    rollbacks: int = 0
    """How often in a row it was, to the same weights."""
    best_loss: float | None = None
    """Lowest validation loss, nats per token."""
    best_step: int = 0
    stale_validations: int = 0
    """Validations since the best one."""
    owed: list[str] = field(default_factory=list)
    """What a signal kept from being done at this step, `validation` and `sample`: a resumed run begins with it."""

    def validated(self, step: int, loss: float, min_delta: float) -> bool:
        """Take note of a validation loss; True if it is the best. NaN never is."""
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss - min_delta)
        if better:
            self.best_loss, self.best_step, self.stale_validations = loss, step, 0
        else:
            self.stale_validations += 1
        return better
