"""One process a run folder: a lock, and a note of who holds it, for onlookers and for file systems without locks."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import write_whole

LOCK, HOLDER = ".lock", ".holder.json"
SILENCE = 15 * 60
"""Seconds without a line in its metrics after which a process of another machine counts as gone."""


@contextmanager
def exclusive(run_dir: Path, signs_of_life: str) -> Iterator[None]:
    """Make the run folder, and keep other processes from training in it. `signs_of_life` names the file in it that a
    training process keeps writing. Raises `UserError` if one does."""
    lock = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--run-dir {run_dir}: another process is training there{_who(run_dir)}") from None
    except NotImplementedError:
        lock = None  # a file system without locks: the note alone must do
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror or error}") from None
    try:
        # Who has the lock knows that nobody of this machine trains there: the number in a note that was left behind may
        # be another process's by now. Another machine need not see the lock.
        if (lock is None or not _is_of_this_machine(_note(run_dir))) and is_held(run_dir, signs_of_life):
            raise UserError(
                f"--run-dir {run_dir}: another process is training there{_who(run_dir)}; if it is gone, remove "
                f"{run_dir / HOLDER}"
            )
        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_whole(run_dir / HOLDER, json.dumps(note).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                (run_dir / HOLDER).unlink()
    finally:
        if lock:
            lock.release()


def is_held(run_dir: Path, signs_of_life: str) -> bool:
    """Whether a process trains in the folder, by the note it left and without touching its lock: on this machine the
    process must exist, on another it must have written something lately."""
    note = _note(run_dir)
    if not note:
        return False
    if _is_of_this_machine(note):
        return note["pid"] != os.getpid() and _exists(note["pid"])
    for file in (run_dir / signs_of_life, run_dir / HOLDER):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime < SILENCE:
                return True
    return False


def _note(run_dir: Path) -> dict | None:
    try:
        note = json.loads((run_dir / HOLDER).read_text(encoding="utf-8"))
        return note if isinstance(note["host"], str) and isinstance(note["pid"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_of_this_machine(note: dict | None) -> bool:
    return note is not None and note["host"] == socket.gethostname()


def _who(run_dir: Path) -> str:
    note = _note(run_dir)
    return f" (process {note['pid']} on {note['host']}, since {note.get('since')})" if note else ""


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True
