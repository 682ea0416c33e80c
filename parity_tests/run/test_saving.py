"""Checkpoints that land in the background, as Flax's do: what is said of them and when, and that older ones stay until
a later one is there."""

from __future__ import annotations

from pathlib import Path

from parity_tests.run.test_spikes import prepared
from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage, kill_at
from train.run.options import Options
from train.shell import COMPLETE


class SlowDisk(FakeBackend):
    """What it saves is there three steps later, or when it is waited for."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._landing: tuple[int, Path, Path] | None = None

    def save(self, folder: Path, name: str, meta: dict) -> Path:
        self.wait()
        unfinished = super().save(folder, f"unfinished_{name}", meta)
        self._landing = self._steps, unfinished, folder / f"{name}{self.checkpoint_suffix}"
        return self._landing[2]

    def check_saves(self) -> None:
        if self._landing and self._steps >= self._landing[0] + 3:
            self.wait()

    def wait(self) -> None:
        if self._landing:
            _, unfinished, path = self._landing
            unfinished.rename(path)
            self._landing = None


def slow(stage: Stage) -> Stage:
    """The stage with a backend that saves in the background, and the faults of the one it had."""
    backend = SlowDisk(stage.options)
    backend.before_step = stage.backend.before_step
    stage.backend = backend
    return stage


def test_a_checkpoint_makes_room_when_a_later_one_is_there(tmp_path: Path) -> None:
    stage = slow(Stage(tmp_path / "run", small_options(keep_checkpoints=1, eval_interval=0)))
    found: dict[int, list[str]] = {}

    def look(step: int) -> None:
        found[step] = [path.name for _, path in stage.backend.find(stage.run_dir / "checkpoints")]

    stage.backend.before_step = look
    assert stage.train() == COMPLETE
    # Saved at 5, 10, 12 (the end of the main phase) and 15, and there three steps later, or when the next one begins.
    there = {9: "step_5.npz", 13: "step_10.npz"}
    for step in range(1, 16):
        newest = max((first for first in there if first <= step), default=None)
        assert found[step] == ([there[newest]] if newest else []), step
    assert stage.files("checkpoints") == ["step_final_15.npz"]
    story = [line for line in stage.text.splitlines() if line.startswith(("Step ", "Saving", "Checkpoint saved"))]
    told = [line.split(" |")[0].replace(f"{stage.run_dir}/checkpoints/", "") for line in story]
    assert told[told.index("Step 5") :] == [
        "Step 5",
        "Saving checkpoint at step 5",
        "Step 6",
        "Step 7",
        "Step 8",
        "Checkpoint saved to: step_5.npz",
        "Step 9",
        "Step 10",
        "Saving checkpoint at step 10",
        "Step 11",
        "Step 12",
        "Checkpoint saved to: step_10.npz",
        "Saving checkpoint at step 12",
        "Step 13",
        "Step 14",
        "Step 15",
        "Checkpoint saved to: step_12.npz",
        "Saving checkpoint at step 15",
        "Checkpoint saved to: step_final_15.npz",
    ]


def test_a_run_ends_when_its_checkpoint_is_there(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run", small_options(eval_interval=0))
    stage.backend.before_step = kill_at(2, 7)
    assert slow(stage).train() == 130
    assert stage.files("checkpoints") == ["step_5.npz", "step_7.npz"]
    assert stage.text.index("step_7.npz\n") < stage.text.index("Stopped by SIGINT")


def test_a_run_is_rolled_back_to_a_checkpoint_that_is_under_way(tmp_path: Path) -> None:
    stage = slow(prepared(tmp_path / "run", 36, spike_steps=1, spike_factor=4.0))
    assert stage.train() == COMPLETE
    assert [(r["step"], r["rolled_back_to"]) for r in stage.records("spike")] == [(36, 35)]
