"""Runs of the loop to start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.support.stage import Stage
from train.shell import COMPLETE


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second, a run here milliseconds; `test_plot.py` draws."""

    def plot_runs(run_dirs: list[Path], output: Path) -> Path:
        output.write_text(f"curves of {run_dirs}")
        return output

    monkeypatch.setattr("train.run.loop.plot_runs", plot_runs)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "run")


@pytest.fixture
def straight(tmp_path: Path) -> Stage:
    """A run that nothing disturbed."""
    stage = Stage(tmp_path / "straight")
    assert stage.train() == COMPLETE
    return stage
