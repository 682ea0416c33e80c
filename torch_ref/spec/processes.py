"""Which of several processes this one is, and what is its part: of the global batch, and of the run folder. Both
frameworks' processes share these rules; neither is imported here.

All processes read the same text and know the same global batch, whatever their number: each takes its own rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """One process among those that train a model together: `index` from 0, of `count`. By default it is alone."""

    count: int = 1
    index: int = 0

    @property
    def writes(self) -> bool:
        """Whether this is the one that prints, logs, and locks and writes the run folder."""
        return self.index == 0

    def rows(self, total: int) -> slice:
        """This one's rows of `total`, of a batch or of a micro-batch over all processes: equal parts, one after the
        other. Raises ValueError where the parts would not be equal."""
        if total % self.count:
            raise ValueError(f"{total} rows over {self.count} processes")
        share = total // self.count
        return slice(self.index * share, (self.index + 1) * share)


ALONE = Processes()

Agree = Callable[[Sequence[int]], Callable[[], list[int]]]
"""`Backend.agree`."""


def agree_alone(wishes: Sequence[int]) -> Callable[[], list[int]]:
    """`Backend.agree` of one process."""
    return lambda: list(wishes)
