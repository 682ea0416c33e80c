"""Signals as a wish to stop, for a loop that finishes the step it is in."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, a scheduler's request, a terminal that went away. Windows has no SIGHUP."""
CLOSED_PIPE = 13
"""SIGPIPE, whose number not every system has a name for."""


class Stop(Exception):
    """Raised where work is left undone on a wish to stop."""


class StopSignals:
    """While it is entered, signals are noted in `received` instead of ending the process, so that the step can be
    finished and saved; in an `interruptible` block they end it at once. A second one ends the process, by a
    `KeyboardInterrupt` with its number."""

    def __init__(self, says_so: bool = True) -> None:
        self._says_so = says_so
        self.received: int | None = None
        self._former: dict[int, Any] = {}
        self._interruptible = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def check(self, *_: object) -> None:
        """Raises `Stop` if a signal has come."""
        if self.received:
            raise Stop

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that changes nothing and may wait for long: a signal raises `Stop` in it."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt(number)
        self.received = number
        try:
            # Not print: the signal may have come in the middle of one.
            if self._says_so:
                os.write(2, b"\nStopping after this step, and saving what is trained; once more to stop at once.\n")
        except OSError:
            pass  # the terminal is gone
        if self._interruptible:
            self._interruptible = False
            raise Stop
