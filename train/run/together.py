"""What several processes that train together decide alike, and what only one of them does.

All of them run the same loop on the same numbers: losses, norms and counts are those of the whole batch in each. What a
single process knows (a signal it got, its clock, that its reader has gone) becomes the wish of all at the same step,
and only then has it any effect. One that is alone does what it wishes.
"""

from __future__ import annotations

import json
import logging
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch_ref.spec.interface import Backend, UserError
from train.data.corpus import DataError
from train.data.packing import Batch
from train.run.clock import Clock
from train.run.runlog import LOGGERS
from train.run.signals import StopSignals
from train.shell import forget_output

Made = TypeVar("Made")


class Wishes(NamedTuple):
    """What may happen after a step for a reason that one of several processes knows; 0 where there is none."""

    signal: int = 0
    """Number of the signal to stop by."""
    unread: int = 0
    """Whether the output has lost its reader."""
    time_is_up: int = 0
    save: int = 0
    """Whether the last checkpoint is as old as it may get."""
    no_data: int = 0
    """Whether the next batches cannot be read."""


class Together:
    """The wishes of all processes."""

    def __init__(self, backend: Backend, signals: StopSignals, clock: Clock) -> None:
        self._backend, self._signals, self._clock = backend, signals, clock
        self._begun: Callable[[], list[int]] | None = None
        self.alone = backend.processes.count == 1
        self.wishes = Wishes()
        """Of all after the last step; where the device runs ahead of the host, after the one before it."""
        self.data_error: DataError | None = None
        """Why this process has no more batches."""

    def agree(self, unread: bool) -> None:
        """Find out what all wish after a step."""
        no_data = self.data_error is not None
        own = Wishes(self._signals.received or 0, unread, self._clock.is_up, self._clock.save_due, no_data)
        begun = self._backend.agree(own)
        if not self.alone and self._backend.runs_ahead:
            # The answer comes after the step, and the next one begins before that: it counts one step later.
            begun, self._begun = self._begun, begun
        saved = self.wishes.save
        self.wishes = Wishes(*begun()) if begun else Wishes()
        if saved and self._begun:
            self.wishes = self.wishes._replace(save=0)  # asked for before it was done

    @property
    def stop_number(self) -> int:
        """Number of the signal by which the run stops, 0 if there is none."""
        return (self.alone and self._signals.received) or self.wishes.signal

    def interrupted(self) -> bool:
        """Whether a signal has come to any process. All must ask at the same point."""
        if not self.alone:
            self.wishes = self.wishes._replace(signal=self._backend.agree([self._signals.received or 0])()[0])
        return bool(self.stop_number)

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; of several processes each holds those of the steps that begin before all know of an error in
        `data_error`, so that none begins a step for which another has no rows."""
        return batches if self.alone else self._held(batches)

    def _held(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        held: deque[Batch] = deque()
        more = 2 if self._backend.runs_ahead else 1
        while True:
            try:
                while len(held) <= more and self.data_error is None:
                    held.append(next(batches))
            except DataError as error:
                self.data_error, me = error, self._backend.processes
                said = str(error) if me.writes else f"process {me.index}: {error}"
                if not held:
                    raise UserError(said) from error
                if not me.writes:
                    print(f"error: {said}", file=sys.stderr)
            yield held.popleft()


def first_by_the_writer(backend: Backend, make: Callable[[bool], Made]) -> Made:
    """What each process makes for itself, by way of files that the writing one leaves for the others; `make(kept)` is
    told whether they are there."""
    if backend.processes.writes:
        made = make(False)
        backend.agree([0])()
        return made
    backend.agree([0])()
    return make(True)


def require_same(backend: Backend, what: str, *values: Any) -> None:
    """Raises `UserError` in all processes if the values differ between any two."""
    if backend.processes.count == 1:
        return
    number = zlib.crc32(json.dumps([str(value) for value in values]).encode()) >> 1
    largest, smallest = backend.agree([number, -number])()
    if largest != -smallest:
        many = f"all {backend.processes.count} processes"
        raise UserError(f"the {what} are not the same in {many}; start all alike, with a run folder that they share")


@contextmanager
def silence() -> Iterator[None]:
    """For a process that does not write: its standard output leads nowhere, and it warns of nothing."""
    forget_output()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
