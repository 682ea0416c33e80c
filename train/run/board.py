"""TensorBoard events of a run. tensorboardX writes in a thread, which an error (a full disk) would end in silence, and
the run would then wait for it for ever; here the error is kept and raised at the next record."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from torch_ref.spec.storage import write_errors

SCHEME = "board"


class Board:
    """Writes numbers and texts by step. With `step` > 0, events after it that lie there already are marked void."""

    def __init__(self, folder: Path, step: int) -> None:
        # tensorboardX imports torch where it is installed, for graphs and tensors that this file never writes: a second
        # of a Flax run's start, and 150 to 200 MB until its end.
        hidden = sys.modules.setdefault("torch", None) is None
        try:
            from tensorboardX import SummaryWriter
            from tensorboardX.record_writer import register_writer_factory
        finally:
            if hidden:
                del sys.modules["torch"]
        self._folder = folder.absolute()
        self._error: OSError | None = None
        register_writer_factory(SCHEME, self)
        # A file's name has its second: without the step in it, a run resumed within one would write over what it goes
        # on from.
        self._writer = SummaryWriter(
            f"{SCHEME}:{self._folder}", purge_step=step + 1 if step else None, filename_suffix=f".from_step_{step}"
        )

    def add(self, step: int, scalars: dict[str, float], texts: dict[str, str]) -> None:
        """Raises `UserError` if earlier events could not be written."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)
        if self._error is not None:
            with write_errors(self._folder):
                raise self._error

    def close(self) -> None:
        self._writer.close()

    # What tensorboardX asks of a writer factory

    def directory_check(self, path: str) -> None:
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def open(self, path: str) -> _KeepsErrors:
        with write_errors(self._folder):
            return _KeepsErrors(open(path.removeprefix(f"{SCHEME}:"), "wb"), self._note)

    def _note(self, error: OSError) -> None:
        self._error = self._error or error


class _KeepsErrors:
    """A file whose errors are handed to `note` instead of raised."""

    def __init__(self, file: BinaryIO, note: Callable[[OSError], None]) -> None:
        self._file, self._note = file, note

    def write(self, data: bytes) -> None:
        self._try(self._file.write, data)

    def flush(self) -> None:
        self._try(self._file.flush)

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, call: Callable, *arguments: bytes) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self._note(error)
