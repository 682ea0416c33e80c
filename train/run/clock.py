"""A run's wishes about time: when it has taken its share, and when its last checkpoint has grown old."""

from __future__ import annotations

from time import monotonic

from train.run.options import Options


class Clock:
    """Counts from `started`, in the seconds of `time.monotonic`; by default from now."""

    def __init__(self, options: Options, started: float | None = None) -> None:
        self._limit, self._interval = 60 * options.max_minutes, 60 * options.checkpoint_minutes
        self._started = self._saved = monotonic() if started is None else started

    def saved(self) -> None:
        """A checkpoint was begun."""
        self._saved = monotonic()

    @property
    def save_due(self) -> bool:
        return self._interval > 0 and monotonic() - self._saved >= self._interval

    @property
    def is_up(self) -> bool:
        return self._limit > 0 and monotonic() - self._started >= self._limit
