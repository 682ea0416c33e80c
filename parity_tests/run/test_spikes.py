"""A run that diverges without a NaN: what is told, where it is rolled back to, and that an interruption changes none of
it. The loop with a fake backend, then both frameworks."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.kills import MAINS, numbers, settings
from parity_tests.support.fakes import small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import UserError
from train.run.progress import Progress
from train.run.runlog import read_metrics
from train.run.spikes import LEAST, WINDOW, diverged, good_step
from train.shell import COMPLETE, FAILED

LONG = {"steps": 45, "extended_steps": 5, "eval_interval": 0, "sample_interval": 0, "learning_rate": 1e-4}


def told(losses: list[float], **changes: object) -> list[int]:
    """Numbers, from 1, of the losses at which the run counts as diverged."""
    progress, options = Progress(), small_options(**({"spike_factor": 2.0, "spike_steps": 3} | changes))
    return [number for number, loss in enumerate(losses, 1) if diverged(progress, loss, options)]


def test_only_a_row_of_spikes_is_a_divergence() -> None:
    calm = [1.0, 1.2, 0.8, 1.1] * 10
    assert told(calm) == []
    assert told([*calm, 2.2, 2.3, 1.0, 2.2, 2.3, 1.0]) == []
    assert told([*calm, 2.2, 2.3, 2.4]) == [43]
    assert told([1.0] * 40 + [2.0] * 3) == [], "a spike is above the factor, not at it"
    assert told([9.0] * 10 + [1.0] * 30 + [2.2, 2.3, 2.4]) == [43], "of the median: high losses of before count little"
    assert told([*calm, 2.2, 2.3, 2.4], spike_factor=3.0) == []
    assert told([*calm, 2.2, 2.3, 2.4], spike_steps=2) == [42]
    assert told([*calm, 2.2, 2.3, 2.4], spike_factor=0.0) == []
    assert told([*calm, math.nan, math.inf, 2.4]) == [43], "a loss that is not finite is no return to calm"
    assert told([1.0] * (LEAST - 1) + [9.0] * 3) == [], "too few to have a median"
    assert told([1.0] * LEAST + [9.0] * 3) == [LEAST + 3]


def test_spikes_between_other_losses_do_not_raise_the_median() -> None:
    assert told([1.0] * 40 + [9.0, 9.0, 1.0] * 60 + [2.2, 2.3, 2.4]) == [40 + 180 + 3]


def test_a_row_is_told_once_and_then_the_median_follows() -> None:
    losses = [1.0] * 40 + [9.0] * WINDOW
    assert told(losses) == [43]
    assert told([*losses, *[30.0] * 3]) == [43, 40 + WINDOW + 3]


def test_the_watch_is_small_and_follows_a_falling_loss() -> None:
    progress, options = Progress(), small_options(spike_factor=1.5, spike_steps=1)
    for loss in np.linspace(10, 1, 1000).tolist():
        assert diverged(progress, loss, options) is None
    assert len(progress.recent_losses) == WINDOW
    assert diverged(progress, 5.0, options) == pytest.approx(1 + 9 * (WINDOW - 1) / 2 / 999), "of the latest losses"


@pytest.mark.parametrize(("spikes", "rolled_back", "step", "good"), [(0, 0, 12, 10), (3, 0, 12, 5), (2, 0, 12, 10)])
def test_checkpoints_of_the_row_itself_are_not_good(spikes: int, rolled_back: int, step: int, good: int) -> None:
    assert good_step(Progress(spikes_in_a_row=spikes, rolled_back_at=rolled_back), step, 5) == good
    assert good_step(Progress(spikes_in_a_row=2, rolled_back_at=17), 19, 5) == 17, "15 was within the first row"


def spiking(stage: Stage, *steps: int) -> None:
    """Let the weights of a fake run jump before some steps, which stays with it until it is rolled back."""

    def before_step(step: int) -> None:
        if step in steps:
            stage.backend._weights = stage.backend._weights * 50

    stage.backend.before_step = before_step


def prepared(folder: Path, *at: int, **changes: object) -> Stage:
    stage = Stage(folder, small_options(**(LONG | {"spike_steps": 4, "spike_action": "rollback"} | changes)))
    spiking(stage, *at)
    return stage


def test_a_run_that_diverges_is_warned_of(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", 32, spike_action="warn")
    assert stage.train() == COMPLETE
    (record,) = stage.records("spike")
    assert (record["step"], record["begun"], record["rolled_back_to"]) == (35, 32, None)
    assert record["loss"] > 1.5 * record["median"] > 0
    assert stage.text.count("Warning: steps 32 to 35 had losses above 1.5 x the median") == 1


def test_a_run_that_diverges_is_rolled_back(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", 34)
    assert stage.train() == COMPLETE
    (record,) = stage.records("spike")
    # Step 35 saved in the midst of the row; 30 is the last good one.
    assert (record["step"], record["begun"], record["rolled_back_to"]) == (37, 34, 30)
    assert "weights and moments are those of step 30 again, and the batches since then are skipped" in stage.text
    assert "step_37.npz" in stage.files("checkpoints")
    with (
        np.load(stage.run_dir / "checkpoints/step_30.npz") as good,
        np.load(stage.run_dir / "checkpoints/step_37.npz") as back,
    ):
        assert np.array_equal(good["weights"], back["weights"]) and int(back["steps"]) == 37
    assert stage.data.given == list(range(50)), "the data goes on"
    assert [step for step, _ in stage.losses()] == list(range(1, 51)), "no step twice, none missing"
    losses = dict(stage.losses())
    assert losses[38] < 1.5 * record["median"] < losses[37]


@pytest.mark.parametrize("at_step", [29, 33, 35, 36, 37, 38, 41])
@pytest.mark.parametrize("keep", [0, 1])
def test_an_interruption_changes_nothing(tmp_path: Path, at_step: int, keep: int) -> None:
    straight = prepared(tmp_path / "straight", 34)
    assert straight.train() == COMPLETE
    stage = prepared(tmp_path / "run", 34, keep_checkpoints=keep)
    jump, stop = stage.backend.before_step, kill_at(2, at_step)
    stage.backend.before_step = lambda step: (jump(step), stop(step))
    assert stage.train() == 130
    stage.prepare(stage.options)
    spiking(stage, 34)
    assert stage.train() == COMPLETE
    assert numbers(stage.run_dir) == numbers(straight.run_dir)
    assert stage.records("spike") == straight.records("spike") != []


@pytest.mark.parametrize("origin", [30, 32])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_branched_off_goes_back_to_where_it_began(tmp_path: Path, origin: int, interrupted: bool) -> None:
    """Most often that is why it began there: the other run diverged."""
    other = prepared(tmp_path / "other", 34, spike_action="warn")
    jump, stop = other.backend.before_step, kill_at(2, origin)
    other.backend.before_step = lambda step: (jump(step), stop(step))
    assert other.train() == 130
    checkpoint = other.run_dir / f"checkpoints/step_{origin}.npz"
    stage = prepared(tmp_path / "run", 34, resume_from=checkpoint, keep_checkpoints=1)
    if interrupted:
        jump, stop_again = stage.backend.before_step, kill_at(2, 36)
        stage.backend.before_step = lambda step: (jump(step), stop_again(step))
        assert stage.train() == 130
        checkpoint.unlink()
        stage.prepare(stage.options)
        spiking(stage, 34)
    assert stage.train() == COMPLETE
    assert [(r["step"], r["rolled_back_to"]) for r in stage.records("spike")] == [(37, origin)]
    assert stage.losses()[-1][0] == 50 and stage.losses()[-1][1] < 1.5 * stage.losses()[0][1]


def test_what_a_run_began_within_a_row_of_spikes_is_not_good(tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", 34, spike_action="warn")
    assert other.train() == COMPLETE
    stage = prepared(tmp_path / "run", resume_from=other.run_dir / "checkpoints/step_35.npz")
    assert stage.train() == COMPLETE
    assert [(r["step"], r["rolled_back_to"]) for r in stage.records("spike")] == [(37, None)]


@pytest.mark.parametrize("moment", ["in the validation", "after the step"])
def test_what_is_due_at_the_step_of_a_rollback_is_not_lost(tmp_path: Path, moment: str) -> None:
    def validating(name: str) -> Stage:
        stage = prepared(tmp_path / name, 34, eval_interval=37, sample_interval=37)
        stage.backend.validation_losses = float  # it rises: the best one is that of the step rolled back at
        return stage

    straight, stage = validating("straight"), validating("run")
    assert straight.train() == COMPLETE
    if moment == "in the validation":
        evaluate, stop = stage.backend.evaluate, kill_at(2, 37)
        stage.backend.evaluate = lambda *rows: (stop(stage.backend.steps_done), evaluate(*rows))[1]
        assert stage.train() == 130
    else:
        jump = stage.backend.before_step

        def crash(step: int) -> None:
            jump(step)
            if step == 38:
                raise RuntimeError("power cut")

        stage.backend.before_step = crash
        with pytest.raises(RuntimeError):
            stage.train()
    stage = validating("run")
    assert stage.train() == COMPLETE
    assert stage.data.given[0] == 37, "from the checkpoint of the rollback"
    assert numbers(stage.run_dir) == numbers(straight.run_dir)
    for kind in ("spike", "validation", "sample"):
        assert stage.records(kind) == straight.records(kind) != []


def test_a_run_that_diverges_again_and_again_stops(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", *range(31, 46), checkpoint_interval=30)
    assert stage.train() == FAILED
    assert [(r["step"], r["rolled_back_to"]) for r in stage.records("spike")] == [
        (34, 30),
        (38, 34),
        (42, 38),
        (46, 42),
    ]
    assert stage.records("end")[-1]["state"] == "diverged"
    assert "the loss rose again after each of 3 rollbacks to the same weights" in stage.text
    assert [path.name for path in stage.backend.saves][-1] == "step_46.npz" and stage.text.count("at step 46\n") == 1
    stage.prepare(stage.options)
    assert stage.train() == COMPLETE, "tries on"


def test_rollbacks_to_other_weights_each_time_are_no_reason_to_stop(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", 22, 28, 34, 40, 46, spike_steps=2, spike_factor=4.0)
    assert stage.train() == COMPLETE
    assert [r["rolled_back_to"] for r in stage.records("spike")] == [20, 25, 30, 35, 45]


def test_a_run_that_is_rolled_back_at_its_last_step_is_complete(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", *range(31, 46), checkpoint_interval=30, steps=41)
    assert stage.train() == COMPLETE
    assert stage.records("spike")[-1]["step"] == 46 and stage.files("checkpoints")[-1] == "step_final_46.npz"


def test_losses_that_are_no_numbers_are_gone_with_the_weights(tmp_path: Path) -> None:
    """They count as skipped steps too, of which as many would stop the run."""
    stage = prepared(tmp_path / "run", max_skipped_steps=4)
    stage.backend.broken_steps = {34, 35, 36, 37}
    assert stage.train() == COMPLETE
    assert [(r["step"], r["rolled_back_to"]) for r in stage.records("spike")] == [(37, 30)]


def test_without_a_good_checkpoint_it_says_so(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", 32, checkpoint_interval=40)
    assert stage.train() == COMPLETE
    assert "there is no checkpoint from before them to roll back to" in stage.text
    assert stage.records("spike")[0]["rolled_back_to"] is None


def test_a_good_checkpoint_that_is_damaged_ends_the_run(tmp_path: Path) -> None:
    stage = prepared(tmp_path / "run", 32)
    jump = stage.backend.before_step

    def before_step(step: int) -> None:
        jump(step)
        if step == 33:
            (stage.run_dir / "checkpoints/step_30.npz").write_bytes(b"")

    stage.backend.before_step = before_step
    with pytest.raises(UserError, match="--spike-action rollback: .*step_30.npz: not a whole checkpoint"):
        stage.train()


@pytest.mark.parametrize("changes", [{"spike_factor": 1.0}, {"spike_factor": math.inf}, {"spike_steps": 0}], ids=str)
def test_impossible_settings(changes: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')} "):
        small_options(**changes)


# Both frameworks

STEPS, JUMPS_AT = 36, 28


def train(framework: str, run: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> int:
    """A run of which a weight is spoilt before one step, as a broken device might; interrupted after another."""
    module = importlib.import_module({"flax": "flax_model", "torch": "torch_ref"}[framework] + ".backend")
    owner = getattr(module, f"{framework.capitalize()}Backend")
    begin_step = owner.begin_step

    def spoilt(self, *rows):
        if self.steps_done + 1 == JUMPS_AT:
            state = self.state()
            state.weights = {name: np.array(state.weights[name]) * 4 for name in state.weights}
            self.load_state(state)
        if self.steps_done + 1 == stop_at:
            kill_at(2, stop_at)(stop_at)
        return begin_step(self, *rows)

    flags = ["--eval-interval", "0", "--sample-interval", "0", "--checkpoint-interval", "10"]
    flags += ["--spike-factor", "1.3", "--spike-steps", "4", "--spike-action", "rollback"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, "begin_step", spoilt)
        return importlib.import_module(MAINS[framework]).main(
            ["--config", str(run.parent / "settings.toml"), "--run-dir", str(run), "--no-tensorboard", *flags]
        )


def spikes(run: Path) -> list[tuple]:
    return [
        (r["step"], r["begun"], r["rolled_back_to"], r["loss"], r["median"])
        for r in read_metrics(run)
        if r["kind"] == "spike"
    ]


def test_both_frameworks_roll_back_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps, and losses as near as rounding is."""
    found = {}
    settings(tmp_path, STEPS)
    for framework in MAINS:
        pytest.importorskip({"flax": "jax"}.get(framework, framework))
        assert train(framework, tmp_path / framework, monkeypatch) == 0
        (found[framework],) = spikes(tmp_path / framework)
        losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / framework) if r["kind"] == "step"}
        assert list(losses) == list(range(1, STEPS + 6)) and losses[32] < 1.3 * found[framework][4] < losses[31]
    assert found["flax"][:3] == found["torch"][:3] == (31, 28, 20)
    assert found["flax"][3:] == pytest.approx(found["torch"][3:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("framework", list(MAINS))
def test_interrupted_within_the_row_it_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str
) -> None:
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    settings(tmp_path, STEPS)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train(framework, straight, monkeypatch) == 0
    assert train(framework, broken, monkeypatch, stop_at=30) == 130
    assert train(framework, broken, monkeypatch) == 0
    assert numbers(broken) == numbers(straight) and spikes(broken) == spikes(straight) != []
