"""A run of the loop with a fake backend: milliseconds instead of a model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from parity_tests.support.fakes import FakeBackend, FakeData, small_options
from train.run.loop import Run
from train.run.options import Options
from train.run.runlog import read_metrics


class Stage:
    """A run folder with a fake backend and data to start runs in."""

    def __init__(self, run_dir: Path, options: Options | None = None) -> None:
        self.run_dir = run_dir
        self.prepare(options or small_options())

    def prepare(self, options: Options) -> None:
        self.options, self.backend, self.data = options, FakeBackend(options), FakeData(options)

    def train(self, **changes: object) -> int:
        if changes:
            self.prepare(small_options(**changes))
        return self.start().train()

    def start(self) -> Run:
        self.run_dir.mkdir(exist_ok=True)
        return Run(self.options, self.run_dir, self.backend, self.data, write_weights)

    def records(self, kind: str) -> list[dict]:
        return [record for record in read_metrics(self.run_dir) if record["kind"] == kind]

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in self.records("step")]

    def files(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.run_dir / folder).iterdir())

    @property
    def text(self) -> str:
        return (self.run_dir / "training.logs").read_text()


def write_weights(run_dir: Path, backend: FakeBackend) -> Path:
    path = run_dir / "deepseek_final.npy"
    np.save(path, backend.state().weights["weights"])
    return path


def kill_at(number: int, at_step: int):
    def before_step(step: int) -> None:
        if step == at_step:
            os.kill(os.getpid(), number)

    return before_step
