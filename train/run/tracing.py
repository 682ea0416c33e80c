"""`--profile-steps`: a trace of a few steps by the framework's profiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch_ref.spec.interface import Backend
from torch_ref.spec.storage import unused_name, write_errors


class Tracing:
    """Traces the `steps`, numbers from 1, of a run into a folder of its own below `folder`. A context manager: what
    ends a run in the midst of them ends the trace too, which then holds the steps that were done."""

    def __init__(self, backend: Backend, folder: Path, steps: range, say: Callable[[str], None]) -> None:
        self._backend, self._folder, self._steps, self._say = backend, folder, steps, say
        self._open = ExitStack()
        self._target: Path | None = None

    def __enter__(self) -> Tracing:
        if self._steps and self._backend.steps_done >= self._steps[-1]:
            self._say(f"Warning: --profile-steps {self._words}: these steps are done already, nothing is traced")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def _words(self) -> str:
        return f"{self._steps[0]}-{self._steps[-1]}"

    def before_step(self) -> None:
        """Begin where the next step is the first to trace."""
        if self._target is None and self._backend.steps_done + 1 in self._steps:
            self._target = unused_name(self._folder / f"steps_{self._words}")
            with write_errors(self._target):
                self._target.mkdir(parents=True)
            self._open.enter_context(self._backend.trace(self._target))

    def after_step(self) -> None:
        """End after the last one."""
        if self._backend.steps_done + 1 not in self._steps:
            self._end()

    def _end(self) -> None:
        if self._target is None:
            return
        target, self._target = self._target, None
        with write_errors(target):
            self._open.close()
        for file in sorted(target.rglob("*trace.json.gz")):
            if file.name != "perfetto_trace.json.gz" and (file.parent / "perfetto_trace.json.gz").exists():
                continue  # the same trace, in the form for TensorBoard
            self._say(f"Profile of steps {self._words} written to: {file} (open it at https://ui.perfetto.dev)")
