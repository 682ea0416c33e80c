"""A filter between standard error and its reader, in a process of its own: when another of several processes ends,
JAX's runtime writes a page about its coordination service and aborts. What is read here instead is one line.

It imports nothing that takes time; the words for a process that has ended are its argument.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator

RUNTIME = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\w+)\.\w+:\d+\] (.*)")
"""A line of the runtime's own log: the file, and what it says."""
SERVICE = ("coordination_service", "coordination_service_agent", "client", "preemption_sync_manager")
"""Files that tell of other processes."""
MISSING = (
    "not all processes have come, or process 0 is not where the others look for it: --coordinator HOST:PORT is an "
    "address of its machine, and --processes N how many are started"
)
TASKS = re.compile(r"(?:/task:)?\d+(?: *, *(?:/task:)?\d+)*$")


def filtered(lines: Iterable[str], ended: str) -> Iterator[str]:
    """The lines without those of the coordination service; where it was that that ended the process, and nothing else
    says so, a last line does."""
    service, fatal, told, gone, began = False, False, False, "", True
    for line in lines:
        runtime = RUNTIME.match(line)
        if runtime:
            service = runtime[1] in SERVICE
            fatal |= service and line.startswith("F")
        elif "RegisterTask" in line:
            began = False
        elif service and TASKS.match(line.strip()):
            gone = line.strip()
        elif line.startswith(("error: ", "Warning: ", "Traceback ")):
            service = False
        if not (service or fatal):
            told |= line.startswith("error: ")
            yield line
    if fatal and not told:
        who = f"process {gone}" if gone else "process 0, or another one,"
        yield f"error: {ended.format(who) if began else MISSING}\n"


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.stdin.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    for line in filtered(iter(sys.stdin.readline, ""), ended=sys.argv[1]):
        sys.stderr.write(line)
        sys.stderr.flush()


if __name__ == "__main__":
    main()
