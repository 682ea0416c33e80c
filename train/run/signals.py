"""Ctrl-C and SIGTERM as a wish to stop, for a loop that finishes what it is doing."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class StopSignals:
    """While it is entered, Ctrl-C and SIGTERM are noted in `received` instead of ending the process, so that the step
    can be finished and saved. A second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step, with a checkpoint; once more to stop at once.\n")
