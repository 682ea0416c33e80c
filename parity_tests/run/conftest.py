"""Runs of the loop to start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.support.stage import Stage
from train.shell import COMPLETE


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "run")


@pytest.fixture
def straight(tmp_path: Path) -> Stage:
    """A run that nothing disturbed."""
    stage = Stage(tmp_path / "straight")
    assert stage.train() == COMPLETE
    return stage
