"""A thread that works ahead."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator

from train.data.packing import Batch

JOIN_SECONDS = 5.0
"""How long `close` waits for a thread that is held up by the network."""


class Prefetcher:
    """Iterates over `batches` in a thread that works up to `depth` items ahead; an error in it is raised here, after
    the items before it. `close`, the end of the program, or losing the last reference ends the thread."""

    def __init__(self, batches: Iterator[Batch], depth: int, stop: threading.Event):
        self._end: BaseException | None = None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(depth, 1))
        thread = threading.Thread(target=_fill, args=(batches, self._queue, stop), name="data", daemon=True)
        thread.start()
        # Not a method: the thread and this would keep each other alive. It also runs at exit, where a thread still
        # inside a C++ reader can crash the interpreter.
        self._finalizer = weakref.finalize(self, _stop, stop, thread)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        if self._end is None and self._finalizer.alive:
            item = self._queue.get()
            if isinstance(item, Batch):
                return item
            self._end = item
        raise self._end or StopIteration

    def close(self) -> None:
        self._finalizer()


def _fill(batches: Iterator[Batch], into: queue.Queue, stop: threading.Event) -> None:
    end: BaseException = StopIteration()
    try:
        for batch in batches:
            if not _put(batch, into, stop):
                break
    except BaseException as error:
        end = error
    batches.close()
    _put(end, into, stop)


def _put(item: Batch | BaseException, into: queue.Queue, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            into.put(item, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=JOIN_SECONDS)
