"""What the loop does about damaged checkpoints, foreign runs, writes that fail and logs that cannot be read: a fallback
or a refusal in one line, and nothing of a run is deleted. The frameworks' own part is in `state/test_damage.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parity_tests.support.fakes import small_options
from parity_tests.support.stage import Stage
from torch_ref.spec.interface import StepResult, UserError
from train.run.runlog import RunLog, read_metrics
from train.shell import COMPLETE
from train.state.resume import own_checkpoints


def crash_at(stage: Stage, at_step: int) -> None:
    def before_step(step: int) -> None:
        if step == at_step:
            raise RuntimeError("power cut")

    stage.backend.before_step = before_step
    with pytest.raises(RuntimeError):
        stage.train()
    stage.prepare(small_options())


def test_a_run_that_a_full_device_ended_has_failed(stage: Stage, straight: Stage) -> None:
    """It goes on from its latest checkpoint, with smaller micro-batches."""

    def before_step(step: int) -> None:
        if step == 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 6.00 GiB.")

    stage.backend.before_step = before_step
    with pytest.raises(RuntimeError, match="out of memory"):
        stage.train()
    assert [record["state"] for record in stage.records("end")] == ["failed"]
    stage.prepare(small_options())
    assert stage.train() == COMPLETE and stage.losses() == straight.losses()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_newest_checkpoint_is_told_and_set_aside(stage: Stage, straight: Stage) -> None:
    crash_at(stage, 13)
    cut_short(stage.run_dir / "checkpoints" / "step_12.npz")
    logged = (stage.run_dir / "metrics.jsonl").read_text()
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()
    path = stage.run_dir / "checkpoints" / "step_12.npz"
    assert f"Warning: {path}: not a whole checkpoint (" in stage.text and "it is now step_12.npz.damaged" in stage.text
    assert "Resuming from" in stage.text and "step_10.npz at step 10" in stage.text
    assert stage.files("checkpoints")[1:3] == ["step_12.npz", "step_12.npz.damaged"]
    # What the run had logged of the steps that were done again is set aside, not deleted.
    cut = (stage.run_dir / "metrics.cut.jsonl").read_text()
    assert {json.loads(line)["step"] for line in cut.splitlines()} == {11, 12}
    assert set(cut.splitlines()) <= set(logged.splitlines())
    assert "Step 11 |" in (stage.run_dir / "training.cut.logs").read_text()


def test_a_damaged_only_checkpoint_does_not_begin_the_run_anew(stage: Stage, straight: Stage) -> None:
    crash_at(stage, 7)
    cut_short(stage.run_dir / "checkpoints" / "step_5.npz")
    before = contents(stage.run_dir)
    with pytest.raises(UserError) as refusal:
        stage.train()
    said = str(refusal.value)
    assert "no checkpoint is whole (step_5.npz: " in said and "\n" not in said
    best = stage.run_dir / "best" / "step_4.npz"
    assert f"--resume-from {best}" in said and "another --run-dir" in said
    assert contents(stage.run_dir) == before and stage.data.given == []
    # The mend that it names works, also if that start ends before it has saved anything.
    stage.prepare(small_options(resume_from=best))
    stage.data.fails_at = 4
    stage.backend.save = lambda *_: best
    stage.train()
    assert stage.files("checkpoints") == ["step_5.npz.damaged"]
    stage.prepare(small_options(resume_from=best))
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses() and stage.data.given[0] == 4
    assert stage.files("checkpoints")[-2:] == ["step_5.npz.damaged", "step_final_15.npz"]


def test_checkpoints_that_were_set_aside_are_not_taken_for_a_fresh_folder(stage: Stage) -> None:
    crash_at(stage, 7)
    path = stage.run_dir / "checkpoints" / "step_5.npz"
    path.rename(path.with_name("step_5.npz.damaged"))
    with pytest.raises(UserError, match="no checkpoint is whole .step_5.npz.damaged was set aside"):
        stage.train()
    best = stage.run_dir / "best" / "step_4.npz"
    assert stage.train(resume_from=best) == COMPLETE, "as the message advises"
    assert stage.data.given[0] == 4


def test_a_checkpoint_that_was_asked_for_and_is_damaged_is_refused(straight: Stage, stage: Stage) -> None:
    path = straight.run_dir / "checkpoints" / "step_5.npz"
    cut_short(path)
    with pytest.raises(UserError, match="step_5.npz: not a whole checkpoint .*; take an earlier one"):
        stage.train(resume_from=path)


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(stage: Stage, straight: Stage) -> None:
    stage.prepare(small_options(keep_checkpoints=1))
    crash_at(stage, 13)
    (stage.run_dir / "checkpoints" / "step_20.npz").write_bytes(b"later, and damaged")
    assert stage.train(keep_checkpoints=1) == COMPLETE
    assert stage.files("checkpoints") == ["step_20.npz.damaged", "step_final_15.npz"]
    assert stage.losses() == straight.losses()


def test_a_run_of_the_other_framework_is_refused_and_left_alone(stage: Stage) -> None:
    """Found before the data is opened: that would write a tokenizer and validation rows over the run's own."""
    for name, framework in (("step_10.pt", "torch"), ("step_10", "Flax")):
        folder = stage.run_dir / "checkpoints"
        folder.mkdir(parents=True)
        (folder / name).write_text("") if "." in name else (folder / name / "state").mkdir(parents=True)
        with pytest.raises(UserError) as refusal:
            own_checkpoints(stage.backend, stage.run_dir, None)
        said = str(refusal.value)
        assert f"--run-dir {stage.run_dir}: holds a run of the {framework} trainer" in said
        assert f"python -m train.convert {stage.run_dir} NEW_FOLDER --to fake" in said
        shutil.rmtree(folder)
    assert own_checkpoints(stage.backend, stage.run_dir, None) == []


def test_logs_of_a_run_without_checkpoints_are_set_aside(stage: Stage, straight: Stage) -> None:
    crash_at(stage, 3)
    text, metrics = stage.text, (stage.run_dir / "metrics.jsonl").read_text()
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses() and stage.text.startswith("Model: ")
    assert (stage.run_dir / "training.cut.logs").read_text() == text
    assert (stage.run_dir / "metrics.cut.jsonl").read_text() == metrics


def test_a_save_that_failed_in_the_background_ends_the_run_at_the_next_step(stage: Stage) -> None:
    def save(folder: Path, name: str, meta: dict) -> Path:
        stage.backend.check_saves = failed
        return folder / name  # it will never exist

    def failed() -> None:
        raise UserError("step_5: no space left")

    stage.prepare(small_options(eval_interval=0))
    stage.backend.save = save
    with pytest.raises(UserError, match="no space left"):
        stage.train()
    assert stage.losses()[-1][0] <= 6
    assert stage.records("end")[-1]["state"] == "failed"


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(UserError, match="--run-dir .*: no space left: a checkpoint takes .* kB, .* room for 10 kB"):
        stage.train()
    assert stage.data.given == []


def test_a_run_folder_that_is_removed_meanwhile_ends_the_run(stage: Stage) -> None:
    begin_step = stage.backend.begin_step

    def removed(*rows: object) -> Callable[[], StepResult]:
        if stage.backend.steps_done == 6:
            shutil.rmtree(stage.run_dir)
        return begin_step(*rows)

    stage.backend.begin_step = removed
    with pytest.raises(UserError, match="training.logs: its folder is gone; was it moved or removed meanwhile"):
        stage.train()
    assert stage.backend.steps_done == 7


def test_a_full_disk_while_logging_is_one_clear_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/dev/full` fails at every write as a full disk does."""
    opened = open

    def full(path: Path, mode: str, **more: object):
        return opened("/dev/full" if path.name == "metrics.jsonl" and mode == "a" else path, mode, **more)

    monkeypatch.setattr("train.run.runlog.open", full, raising=False)
    with pytest.raises(UserError, match=r"/dev/full: no space left, .* free; make room and start again"):
        stage.train()


def test_a_full_disk_under_tensorboard_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorboardX writes in a thread: its error would be lost, and the run would wait for the thread for ever."""
    opened = open
    monkeypatch.setattr("train.run.board.open", lambda path, mode: opened("/dev/full", mode), raising=False)
    values = {"step": 1, "loss": 2.0, "text": "long" * 5000}
    with (
        pytest.raises(UserError, match=r"tensorboard: no space left"),
        RunLog(tmp_path, 0, small_options(tensorboard=True)) as log,
    ):
        for _ in range(2000):
            log.step(values, "line")


UNREADABLE = {
    "not JSON": b"{not json\n",
    "not UTF-8": b"\xff\xfe\n",
    "no object": b"[1]\n",
    "no step": b'{"kind": "step"}\n',
    "zeros": b"\x00" * 40 + b"\n",
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_lines_of_the_metrics_that_cannot_be_read(
    stage: Stage, straight: Stage, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    crash_at(stage, 13)
    metrics = stage.run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:4], damage, *lines[4:]]))
    assert len(read_metrics(stage.run_dir)) == len(lines)
    assert "metrics.jsonl: line 5 cannot be read, and is left out" in caplog.text
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()
    assert "metrics.jsonl: 1 lines could not be read; they are now in metrics.cut.jsonl" in stage.text
    assert damage in (stage.run_dir / "metrics.cut.jsonl").read_bytes()


def test_line_separators_inside_a_text_keep_their_record(stage: Stage) -> None:
    """U+2028 and U+0085 end lines for `str.splitlines`, not for JSON lines."""
    stage.run_dir.mkdir()
    with RunLog(stage.run_dir, 0, stage.options) as log:
        log.sample(1, "a", "b\u2028c\u2029d\u0085e")
    with RunLog(stage.run_dir, 1, stage.options):
        pass
    assert [record["text"] for record in stage.records("sample")] == ["b\u2028c\u2029d\u0085e"]
