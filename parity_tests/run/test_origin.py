"""Where a start of a run begins: at its own newest checkpoint, at another run's, anew; and when that is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage
from torch_ref.spec.interface import UserError
from train.run.changes import changes_since
from train.shell import COMPLETE


def test_after_a_crash_the_logs_are_cut_back_to_the_checkpoint(stage: Stage, straight: Stage) -> None:
    def crash(step: int) -> None:
        if step == 9:
            raise RuntimeError("power cut")

    stage.backend.before_step = crash
    with pytest.raises(RuntimeError):
        stage.train()
    assert stage.losses()[-1][0] == 8

    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()
    lines = [line for line in stage.text.splitlines() if line.startswith("Step ")]
    assert [int(line.split()[1]) for line in lines] == list(range(1, 16))
    assert "Resuming from" in stage.text and "at step 5" in stage.text


def test_a_crash_before_the_first_checkpoint_starts_over(stage: Stage, straight: Stage) -> None:
    def crash(step: int) -> None:
        if step == 3:
            raise RuntimeError("power cut")

    stage.backend.before_step = crash
    with pytest.raises(RuntimeError):
        stage.train()
    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()


def test_a_complete_run_says_so_and_does_nothing(straight: Stage, capsys: pytest.CaptureFixture) -> None:
    before = straight.text
    straight.prepare(small_options())
    assert straight.train() == COMPLETE
    assert "The run is complete: 15 steps" in capsys.readouterr().out
    assert straight.text == before and straight.data.given == [] and straight.backend.saves == []


def test_missing_final_weights_of_a_complete_run_are_written(straight: Stage) -> None:
    weights = np.load(straight.run_dir / "deepseek_final.npy")
    (straight.run_dir / "deepseek_final.npy").unlink()
    straight.prepare(small_options())
    assert straight.train() == COMPLETE
    assert np.array_equal(np.load(straight.run_dir / "deepseek_final.npy"), weights)
    assert straight.backend.saves == []


def test_final_weights_of_a_shorter_run_are_not_those_of_a_longer_one(straight: Stage) -> None:
    former = np.load(straight.run_dir / "deepseek_final.npy")
    straight.prepare(small_options(extended_steps=4))
    run = straight.start()

    def killed(run_dir: Path, backend: FakeBackend) -> Path:
        raise KeyboardInterrupt

    run.write_weights = killed
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert straight.files("checkpoints")[-1] == "step_final_16.npz"  # the longer run's last one is there
    straight.prepare(small_options(extended_steps=4))
    assert straight.train() == COMPLETE
    weights = np.load(straight.run_dir / "deepseek_final.npy")
    assert np.array_equal(weights, straight.backend.state().weights["weights"]) and not np.array_equal(weights, former)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.2}, "--learning-rate was 0.1, now 0.2"),
        ({"seq_len": 4}, "--seq-len was 8, now 4"),
        ({"steps": 20}, "--steps was 12, now 20"),
        ({"dtype": "bfloat16"}, "--dtype was float32, now bfloat16"),
    ],
)
def test_a_change_of_trajectory_is_refused_by_name(straight: Stage, change: dict, named: str) -> None:
    with pytest.raises(UserError) as refusal:
        straight.train(**change)
    assert named in str(refusal.value) and "--allow-changed-settings" in str(refusal.value)
    assert straight.train(**change, extended_steps=12, allow_changed_settings=True) == COMPLETE
    assert f"Warning: changed since the checkpoint: {named}" in straight.text


def test_what_auto_chose_on_another_device_is_no_change(tmp_path: Path) -> None:
    """Only of another dtype it is told. Versions that did not note what was `auto` are taken to have meant it so."""
    meta = {"options": json.loads(json.dumps(small_options().to_dict())), "data": {}}
    here = small_options(dtype="bfloat16", remat="layers")

    def changes(**more: object) -> list[str]:
        return changes_since(tmp_path / "step_5", meta | more, here, ["dtype", "remat"], {}, 5)

    assert changes() == changes(automatic=["dtype", "remat"]) == ["--dtype auto was float32, now bfloat16"]
    with pytest.raises(UserError, match="--dtype was float32, now bfloat16: that would change the run"):
        changes(automatic=["remat"])


def test_weights_of_datasets_are_compared_to_the_last_digit(tmp_path: Path) -> None:
    """The identity of the data, which checkpoints of before have too, holds six of them."""
    names, third, half = ("a", "b"), (0.33333333, 0.66666667), (0.5, 0.5)

    def changes(before: tuple[float, ...], now: tuple[float, ...]) -> list[str]:
        options = [small_options(dataset=names, dataset_weights=weights) for weights in (before, now)]
        data = [{"weights": " ".join(f"{dataset.weight:g}" for dataset in each.datasets())} for each in options]
        meta = json.loads(json.dumps({"options": options[0].to_dict(), "data": data[0]}))
        return changes_since(tmp_path / "step_5", meta, options[1], [], data[1], 5)

    assert changes(third, third) == changes((), (1.0, 1.0)) == changes((3.0, 1.5), (3.0, 1.5)) == []
    for before, now in ((third, (0.3333333, 0.66666667)), (half, (0.5, 0.50000001)), ((), half)):
        with pytest.raises(UserError, match=r"weights was \S+ \S+, is "):
            changes(before, now)


def test_harmless_changes_are_not_refused(straight: Stage) -> None:
    changes = {"checkpoint_interval": 3, "eval_interval": 2, "micro_batch_size": 1, "remat": "layers", "patience": 9}
    assert straight.train(extended_steps=4, **changes) == COMPLETE


def test_other_data_is_refused_and_other_versions_are_named(straight: Stage) -> None:
    straight.prepare(small_options(extended_steps=4))
    straight.data.identity["files"] = {"a": "2"}
    with pytest.raises(UserError, match="files: a was 1, is 2"):
        straight.train()
    assert not straight.data.scored_is_kept, "the next start would take the rows of this one for what they were"
    straight.prepare(small_options(extended_steps=4))
    straight.data.identity["versions"] = {"numpy": "2"}
    assert straight.train() == COMPLETE
    assert "Warning: changed since the checkpoint: numpy was 1, is 2" in straight.text and straight.data.scored_is_kept


def test_going_back_to_an_older_checkpoint_is_refused(straight: Stage) -> None:
    checkpoints = straight.run_dir / "checkpoints"
    newest_but_one = checkpoints / "step_12.npz"
    for older in (checkpoints / "step_5.npz", newest_but_one, Path(os.path.relpath(newest_but_one))):
        with pytest.raises(UserError, match="holds later steps, up to 15"):
            straight.train(resume_from=older)


def test_a_run_can_branch_off_another(straight: Stage, stage: Stage) -> None:
    older = straight.run_dir / "checkpoints" / "step_5.npz"
    assert stage.train(resume_from=older) == COMPLETE
    assert stage.losses() == straight.losses()[5:]
    # Started again, it goes on from its own checkpoints.
    assert stage.train(resume_from=older, extended_steps=4) == COMPLETE
    assert stage.data.given == [15]


def test_a_run_goes_on_from_the_best_state_of_another(straight: Stage, stage: Stage) -> None:
    """The validation that found it is neither done nor counted again."""
    assert stage.train(resume_from=straight.run_dir / "best" / "step_4.npz") == COMPLETE
    told = [(record["step"], record["stale_validations"]) for record in stage.records("validation")]
    assert told == [(8, 1), (12, 2), (15, 3)]


def test_a_checkpoint_that_is_not_gone_on_from_is_named(
    straight: Stage, stage: Stage, capsys: pytest.CaptureFixture
) -> None:
    older = straight.run_dir / "checkpoints" / "step_5.npz"
    assert stage.train(resume_from=older) == COMPLETE and "not from" not in stage.text
    said = f"(not from --resume-from {older}: the folder has checkpoints of its own)"
    assert stage.train(resume_from=older, extended_steps=4) == COMPLETE and said in stage.text
    assert stage.train(resume_from=older, extended_steps=4) == COMPLETE and said in capsys.readouterr().out
    assert stage.train(resume_from=stage.run_dir, extended_steps=4) == COMPLETE
    assert "not from" not in capsys.readouterr().out
