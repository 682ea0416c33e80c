"""The checkpoints of one run folder: begun, announced once they are whole, and removed when later ones replace them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_ref.spec.interface import Backend, UserError
from train.run.runlog import RULE

log = logging.getLogger(__name__)


class Saver:
    """Arguments: `keep` is how many of the latest checkpoints stay, 0 for all; `spared()` names steps whose checkpoints
    stay besides."""

    def __init__(
        self, backend: Backend, run_dir: Path, keep: int, spared: Callable[[], Collection[int | None]]
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.best = run_dir / "best"
        self._backend = backend
        self._keep = keep
        self._spared = spared
        self._under_way: Path | None = None
        """The checkpoint that is being written."""

    def begin(self, name: str, meta: dict[str, Any], say: Callable[[str], None]) -> None:
        """Begin a checkpoint. It may land while training goes on."""
        self.settle(say)
        say(f"{RULE}\nSaving checkpoint at step {meta['step']}\n{RULE}")
        self._under_way = self._write(self.folder, name, meta)
        self.announce(say)

    def keep_best(self, meta: dict[str, Any]) -> None:
        """Write the best state so far, which replaces the one before."""
        path = self._write(self.best, f"step_{meta['step']}", meta)
        for _, other in self._backend.find(self.best):
            if other != path:
                self._remove(other)

    def announce(self, say: Callable[[str], None]) -> None:
        """Say so once the checkpoint under way has landed; only then do older ones make room. What went wrong in the
        background is raised here."""
        with _errors(self._under_way):
            self._backend.check_saves()
        if self._under_way is None or not self._under_way.exists():
            return
        say(f"Checkpoint saved to: {self._under_way}\n{RULE}")
        self._under_way = None
        if self._keep:
            for step, old in self._backend.find(self.folder)[: -self._keep]:
                if step not in self._spared():
                    self._remove(old)

    def _remove(self, old: Path) -> None:
        try:
            self._backend.delete(old)
        except OSError as error:  # it takes room, and is in nobody's way
            log.warning("%s cannot be removed (%s); it stays", old, error.strerror or error)

    def settle(self, say: Callable[[str], None]) -> None:
        """Wait for the checkpoint under way; what went wrong with it is raised here."""
        with _errors(self._under_way):
            self._backend.wait()
        self.announce(say)

    def _write(self, folder: Path, name: str, meta: dict[str, Any]) -> Path:
        with _errors(folder / name):
            return self._backend.save(folder, name, meta)


@contextmanager
def _errors(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be written: {error}; those before it are whole") from error
