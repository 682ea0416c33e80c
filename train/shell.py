"""What is around every command: its flags, and what its mistakes look like.

A mistake of the user's is one line on standard error and exit code 2, never a traceback; Ctrl-C is 130; a reader of the
output that goes away (`| head`) is 141. A character that a terminal cannot show is written as an escape. Standard
streams that are closed, a disk or a memory that is full, are no reason for a traceback either.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from typing import Any, TextIO, TypeVar

from torch_ref.spec.config import SpecificationError
from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import no_room
from torch_ref.spec.storage import with_user_paths

COMPLETE, FAILED = 0, 2
INTERRUPTED, UNREAD = 130, 141
"""Exit codes; a signal adds its number to 128: Ctrl-C, and a closed pipe."""


def shell(command: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """The `main` of a command: takes the arguments (by default the process's) and returns the exit code."""

    def main(argv: Sequence[str] | None = None) -> int:
        open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            write_any_character(stream)
        try:
            given = list(sys.argv[1:] if argv is None else argv)
            for before, word in zip([None, *given], given, strict=False):
                unicode_text(word, before if before and before.startswith("-") else "command line")
            code = command(given)
            sys.stdout.flush()  # Python would do it when it ends, and not know what to do about a failure
            return code
        except (UserError, SpecificationError) as error:
            print("error:", *str(error).splitlines(), file=sys.stderr)
            return FAILED
        except KeyboardInterrupt as stop:
            if argv is None:  # Python winds up, and would show where one more has met it
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            return 128 + stop.args[0] if stop.args else INTERRUPTED
        except BrokenPipeError:
            forget_output()
            return UNREAD
        except (RuntimeError, MemoryError) as error:
            line = no_room(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            return FAILED
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            forget_output()  # whatever else is written is so by `write_errors`
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            return FAILED

    return functools.update_wrapper(main, command, updated=()) if hasattr(command, "__name__") else main


Flags = TypeVar("Flags")


def parse_flags(
    options: type[Flags] | Any, prog: str, argv: Sequence[str], config: Sequence[Any] = (), **more: Any
) -> Flags:
    """A dataclass from the command line, by tyro (`config` and `more` are its arguments). Raises `UserError`; `--help`
    exits."""
    import tyro  # not needed where there is nothing to parse

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # Help is what stands below a field; to look for comments takes half of the time.
            config = (tyro.conf.HelptextFromCommentsOff, *config)
            parsed = tyro.cli(options, prog=prog, args=list(argv), config=config, **more)
            return with_user_paths(parsed) if isinstance(options, type) and not isinstance(parsed, tuple) else parsed
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"{_first_sentence(said.getvalue())}; --help lists the options") from None
        raise


def _first_sentence(box: str) -> str:
    """The message in tyro's error box, below its title and up to the next rule, on one line. Where the terminal knows
    ASCII alone, the title has a rule of its own below it."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("─╰╯-")

    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    message = takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines))
    return " ".join(message).removeprefix("Error parsing ")


def unicode_text(text: str, what: str) -> str:
    """The text, unless it came from bytes that are none: Python then has surrogates in their places. Raises
    `UserError` that begins with `what`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: not UTF-8 text, at character {error.start + 1}") from None
    return text


def open_closed_streams() -> None:
    """Standard streams that are closed from the start (`>&-`) lead nowhere from here on. Python has None for them, and
    the next file that is opened would get their number, to which libraries write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def write_any_character(stream: TextIO) -> None:
    """Let a stream write what its encoding lacks as escapes (a `ü` on an ASCII terminal as `\\xfc`), not fail."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Standard output to nowhere: its reader is gone, and what Python writes there when it ends would fail again."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
