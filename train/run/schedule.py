"""The learning-rate schedule: one function of the step, called before each on the host, for both frameworks."""

from __future__ import annotations

from dataclasses import dataclass


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

    def __call__(self, step: int) -> float:
        """Learning rate of the update that `step` earlier ones precede."""
        number, begins = step + 1, self.decay_begins
        if number < self.warmup:
            share = number / self.warmup
        elif number >= self.steps:
            share = self.final_ratio
        elif number <= begins:
            share = 1.0
        else:
            share = 1 - (1 - self.final_ratio) * (number - begins) / (self.steps - begins)
        return self.peak * share
