"""A device that runs ahead of the host: a step is begun before the result of the one before is known, and nothing that
is logged, saved or decided is different for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.kills import numbers
from parity_tests.run.test_spikes import prepared
from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import StepResult
from train.run.options import Options
from train.shell import COMPLETE, FAILED


class AheadBackend(FakeBackend):
    """Tells a result only when it is asked for, and keeps in which order that was."""

    runs_ahead = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.story: list[tuple[str, int]] = []

    def begin_step(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        result, step = super().begin_step(inputs, targets), self._steps
        self.story.append(("begun", step))

        def told() -> StepResult:
            self.story.append(("known", step))
            return result()

        return told


def ahead(stage: Stage) -> Stage:
    """The stage with a backend that runs ahead, and the faults of the one it had."""
    backend = AheadBackend(stage.options)
    backend.before_step, backend.broken_steps = stage.backend.before_step, stage.backend.broken_steps
    stage.backend = backend
    return stage


def same(stage: Stage, straight: Stage) -> None:
    """Metrics, checkpoints and the log's lines, but for times and folders."""
    assert numbers(stage.run_dir) == numbers(straight.run_dir)
    for kind in ("spike", "end", "validation"):
        assert stage.records(kind) == straight.records(kind)
    found = [
        sorted(path.relative_to(each.run_dir) for path in each.run_dir.rglob("*.npz")) for each in (stage, straight)
    ]
    assert found[0] == found[1] != []
    for name in found[0]:
        with np.load(stage.run_dir / name) as ours, np.load(straight.run_dir / name) as theirs:
            assert {key: str(ours[key]) for key in ours} == {key: str(theirs[key]) for key in theirs}, name


def test_a_step_is_logged_while_the_next_one_runs(straight: Stage, tmp_path: Path) -> None:
    stage = ahead(Stage(tmp_path / "run"))
    assert stage.train() == COMPLETE
    same(stage, straight)
    order = stage.backend.story
    assert order.index(("begun", 2)) < order.index(("known", 1)) < order.index(("begun", 3))
    # Steps 4 (validation), 5 (checkpoint), 12 (end of the main phase) and 15 (end) are known before the next begins.
    waited = [step for step in range(1, 15) if order.index(("known", step)) < order.index(("begun", step + 1))]
    assert waited == [4, 5, 8, 10, 12]
    assert [line.split(" |")[0] for line in stage.text.splitlines() if line.startswith("Step ")] == [
        f"Step {step}" for step in range(1, 16)
    ]
    assert stage.text.index("Step 12 |") < stage.text.index("Extended phase") < stage.text.index("Step 13 |")


@pytest.mark.parametrize("at_step", range(1, 16))
def test_a_signal_at_any_step_changes_nothing(straight: Stage, tmp_path: Path, at_step: int) -> None:
    stage = ahead(Stage(tmp_path / "run"))
    stage.backend.before_step = kill_at(2, at_step)
    assert stage.train() == (130 if at_step < 15 else COMPLETE)
    if at_step < 15:
        assert stage.records("step")[-1]["step"] == at_step, "the step that was under way is finished and told"
        stage.prepare(stage.options)
        ahead(stage)
        assert stage.train() == COMPLETE
    assert numbers(stage.run_dir) == numbers(straight.run_dir)


@pytest.mark.parametrize("spike_steps", [1, 4])
def test_spikes_are_rolled_back_at_the_same_step(tmp_path: Path, spike_steps: int) -> None:
    straight = prepared(tmp_path / "straight", 34, spike_steps=spike_steps)
    stage = ahead(prepared(tmp_path / "run", 34, spike_steps=spike_steps))
    assert straight.train() == stage.train() == COMPLETE
    same(stage, straight)
    assert len(stage.records("spike")) == 1


def test_a_step_under_way_is_no_part_of_a_row_of_spikes_yet(tmp_path: Path) -> None:
    """The checkpoint from before the row is spared while the first step of the row is written."""
    run = ahead(Stage(tmp_path / "run", small_options(checkpoint_interval=10, spike_action="rollback"))).start()
    run.backend._steps, run.progress.spikes_in_a_row = 20, 1
    assert run.good_step == 10
    run.backend._steps, run.begun = 21, object()
    assert run.good_step == 10 and 10 in run.spared()


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_run_without_finite_losses_stops_at_the_same_step(tmp_path: Path, limit: int) -> None:
    found = []
    for name in ("straight", "run"):
        stage = Stage(tmp_path / name, small_options(max_skipped_steps=limit))
        stage.backend.broken_steps = {2, *range(7, 13)}
        if name == "run":
            ahead(stage)
        assert stage.train() == FAILED
        found.append(stage)
    same(*found)
    assert found[0].records("end")[-1]["step"] == (2 if limit == 1 else 6 + limit)


def test_a_profile_holds_its_steps_alone(tmp_path: Path) -> None:
    stage = ahead(Stage(tmp_path / "run", small_options(profile_steps="7-8")))
    assert stage.train() == COMPLETE
    order = stage.backend.story
    for step in (6, 7, 8):
        assert order.index(("known", step)) < order.index(("begun", step + 1))
    assert order.index(("known", 2)) > order.index(("begun", 3))
