"""The learning-rate schedule: one function of the step for both frameworks.

It is plain arithmetic, so it takes an int, a NumPy number or a traced JAX array: torch sets the rate before each step,
optax calls it while tracing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, linear decay to `final_ratio * peak` at the last step of the main phase, and that
    rate ever after (the extended phase). With `decay_steps` the peak is held until only so many steps of the main phase
    are left (warm-up, stable, decay: WSD); without, the decay follows the warm-up.

    The first update uses peak / warmup_steps, never 0; the update number `warmup_steps` uses the peak, the update
    number `steps` the final rate. A warm-up of 0 steps means the same as of 1; one longer than the main phase is cut
    to it.
    """

    peak: float
    warmup_steps: int
    steps: int
    final_ratio: float = 0.1
    decay_steps: int | None = None

    @property
    def warmup(self) -> int:
        """The number of the update that first uses the peak."""
        return max(min(self.warmup_steps, self.steps), 1)

    @property
    def decay_begins(self) -> int:
        """The number of the last update that uses the peak."""
        return self.warmup if self.decay_steps is None else max(self.warmup, self.steps - self.decay_steps)

    def __call__(self, step: Any) -> Any:
        """Learning rate of the update that `step` earlier ones precede."""
        warmup, begins = self.warmup, self.decay_begins
        number = step * 1.0 + 1
        rising = number / warmup
        falling = 1 - (1 - self.final_ratio) * (number - begins) / max(self.steps - begins, 1)
        # A comparison counts as 0 or 1: a choice that needs no `if`, which a traced step could not take.
        warming, ended = number < warmup, number >= self.steps
        holding = (number >= warmup) * (number <= begins) * (number < self.steps)
        decaying = (number > begins) * (number < self.steps)
        return self.peak * (
            rising * warming + holding + falling * decaying + self.final_ratio * (number >= warmup) * ended
        )
