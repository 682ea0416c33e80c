"""The disk that a run's checkpoints will take, estimated before it begins."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from parity_tests.support.fakes import small_options
from train.run.options import Options
from train.run.overview import checkpoint_space, disk_estimate


def test_disk_estimate(tmp_path: Path) -> None:
    full = Options(eval_interval=0)
    # 10 checkpoints of the main phase and the final one, three float32 values a parameter, and the weights.
    expected = 774_015_408 * 4 * (3 * 11 + 1) / 1e9
    assert f"11 checkpoints of 9.29 GB and the final weights take up to {expected:.3g} GB" in disk_estimate(
        full, tmp_path
    )
    kept = disk_estimate(small_options(keep_checkpoints=1), tmp_path)
    assert kept.startswith("Disk: 2 checkpoints") and "the best one" in kept and "Warning" not in kept


def test_the_disk_estimate_of_a_long_run_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        assert checkpoint_space(Options(steps=1_000_001, checkpoint_interval=2)).count == 500_052
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_disk_estimate_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    assert "--keep-checkpoints N keeps only the latest N" in disk_estimate(Options(), tmp_path)
