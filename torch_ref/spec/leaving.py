"""What is said where a device has no room, and how one of several processes ends in an error: with a line, and at
once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from torch_ref.spec.config import SpecificationError
from torch_ref.spec.interface import UserError
from torch_ref.spec.processes import ALONE, Processes
from torch_ref.spec.storage import first_line

ENDED = "{} has ended or cannot be reached, so this one ends too; the same command goes on from the latest checkpoint"

CLOSED = ("Connection closed", "Connection reset", "Connection refused", "Connection timed out", "Broken pipe")
CLOSED += ("Socket closed", "Timed out waiting", "timed out connecting", "Connect timeout", "caused pair closure")
CLOSED += ("remote process exited", "communicator was aborted", "operation timeout", "heartbeat", "Heartbeat")
"""In errors of gloo and NCCL that tell of another process. Their own names stand in errors of every kind."""

FULL = ("out of memory", "resource_exhausted: failed to allocate", "can't allocate memory")
"""In errors of XLA, CUDA, MPS and torch that tell of memory that is full, of a device or the host."""


def no_room(error: BaseException) -> str | None:
    """What to say of an error of a framework that tells of full memory; None of others."""
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    # Of all that is said: on MPS torch adds how to take what the system itself needs.
    told = [part for part in first_line(error).split(". ") if any(words in part.lower() for words in FULL)]
    if not told and not isinstance(error, MemoryError):
        return None
    less = "use fewer or shorter rows at once; in training --micro-batch-size, --remat layers or --mesh fsdp=N"
    return f"memory does not suffice; {less} ({(told or ['of the host'])[0]})"


def leave(error: BaseException, processes: Processes = ALONE, lost: Sequence[str] = ()) -> NoReturn:
    """Say what is wrong, and end without a word to the others, which what is usually tidied up would wait for. `lost`
    are words in errors that tell of another process."""
    code, place = 2, "" if processes.writes else f"process {processes.index}: "
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted; what was not saved is lost.", file=sys.stderr)
        code = 128 + error.args[0] if error.args else 130
    elif isinstance(error, UserError | SpecificationError):
        print(f"error: {place}{error}", file=sys.stderr)
    elif line := no_room(error):
        print(f"error: {place}{line}", file=sys.stderr)
    elif any(word in str(error) for word in lost):
        print(f"error: {ENDED.format('another process')} ({first_line(error)})", file=sys.stderr)
    else:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
