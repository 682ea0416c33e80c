"""The training loop: files, words, signals, faults on the way, and every way a run can end."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import UserError
from train.plot import plot_runs
from train.run import loop
from train.run.runlog import RunLog
from train.shell import COMPLETE, FAILED


def test_files_of_a_complete_run(straight: Stage) -> None:
    # Every 5 steps, at the end of the main phase (12) and once at the end, which is also a multiple of 5.
    assert straight.files("checkpoints") == ["step_10.npz", "step_12.npz", "step_5.npz", "step_final_15.npz"]
    assert straight.files("best") == [f"step_{straight.records('validation')[-1]['best_step']}.npz"]
    for name in ("training.logs", "metrics.jsonl", "settings.toml", "deepseek_final.npy", "plot.png"):
        assert (straight.run_dir / name).stat().st_size > 0, name
    assert [record["step"] for record in straight.records("validation")] == [4, 8, 12, 15]
    assert [record["step"] for record in straight.records("sample")] == [5, 10, 15]
    assert straight.records("end") == [{"kind": "end", "step": 15, "state": "complete"}]


def test_announcements_are_worded_and_ruled_as_promised(straight: Stage) -> None:
    rule = "=" * 50
    path = straight.run_dir / "checkpoints" / "step_5.npz"
    assert f"{rule}\nSaving checkpoint at step 5\n{rule}\nCheckpoint saved to: {path}\n{rule}\n" in straight.text
    sample = "Prompt: Once upon a time\nGenerated text:\nOnce upon a time" + chr(65 + 10) * 3
    assert f"{rule}\nGenerating text sample at step 10\n{rule}\n{sample}\n{rule}\n" in straight.text
    assert "Main phase: steps 1 to 12" in straight.text
    assert "Extended phase: steps 13 to 15, learning rate 0.01" in straight.text
    assert straight.text.index("Step 12 |") < straight.text.index("Extended phase") < straight.text.index("Step 13 |")


def test_metrics_hold_what_the_log_rounds(straight: Stage) -> None:
    steps = straight.records("step")
    assert [step["step"] for step in steps] == list(range(1, 16))
    assert [step["phase"] for step in steps] == ["main"] * 12 + ["extended"] * 3
    assert steps[0]["learning_rate"] == pytest.approx(0.1 / 3, rel=1e-15)
    assert [step["learning_rate"] for step in steps[-4:]] == pytest.approx([0.01] * 4, rel=1e-12)
    assert [step["tokens_seen"] for step in steps] == [32 * (n + 1) for n in range(15)]
    assert [step["data_position"] for step in steps] == [{"batch": n + 1} for n in range(15)]
    assert steps[0]["expert_load"] == [1.5, 1.0] and steps[0]["expert_counts"][0] == [6, 2, 4, 4]
    line = r"^Step (\d+) \| Loss: ([\d.]+) .*\(accumulated over 2 batches\) \| [\d.]+ GFLOP/s \| Memory: 1\.50 GB$"
    shown = re.findall(line, straight.text, re.M)
    assert shown == [(str(step["step"]), f"{step['loss']:.4f}") for step in steps]


def test_a_step_takes_as_long_as_its_data_and_its_update(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is looked at: once when the batch is there, once at the end."""
    seconds = itertools.count(1.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert stage.train() == COMPLETE
    told = [[step[f"{part}_seconds"] for part in ("data_wait", "step")] for step in stage.records("step")]
    assert told == [[1.0, 2.0]] * 15
    assert [step["tokens_per_second"] for step in stage.records("step")] == [32 / 2] * 15


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at_step", [1, 5, 7, 13])
def test_a_signal_finishes_the_step_and_the_run_goes_on(
    stage: Stage, straight: Stage, number: int, code: int, at_step: int
) -> None:
    stage.backend.before_step = kill_at(number, at_step)
    assert stage.train() == code
    assert stage.losses() == straight.losses()[:at_step]
    assert f"step_{at_step}.npz" in stage.files("checkpoints")
    assert stage.records("end")[0]["state"] == "interrupted"

    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()
    assert stage.data.given == list(range(at_step, 15))
    assert [r["loss"] for r in stage.records("validation")] == [r["loss"] for r in straight.records("validation")]


@pytest.mark.parametrize("kind", ["validation", "sample", "data"])
def test_a_signal_stops_what_takes_long_and_the_run_makes_up_for_it(stage: Stage, straight: Stage, kind: str) -> None:
    """In a validation, between sampled tokens, and while waiting for data; each is then done by the resumed run."""

    def interrupt(function):
        def interrupted(*arguments, **named):
            if stage.backend.steps_done == {"validation": 4, "sample": 10, "data": 7}[kind] and not stage.signalled:
                stage.signalled = True
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments, **named)

        return interrupted

    stage.signalled = False
    if kind == "data":
        batches = stage.data.batches

        def stalled(cursor):
            given = batches(cursor)
            while True:
                if stage.backend.steps_done == 7 and not stage.signalled:
                    stage.signalled = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(30)  # a stream that stands still
                yield next(given)

        stage.data.batches = stalled
    else:
        name = {"validation": "evaluate", "sample": "generate"}[kind]
        setattr(stage.backend, name, interrupt(getattr(stage.backend, name)))
    started = time.monotonic()
    assert stage.train() == 143
    assert time.monotonic() - started < 10
    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()
    for record in ("validation", "sample"):
        assert stage.records(record) == straight.records(record)


def test_a_signal_during_the_last_step_still_completes(stage: Stage) -> None:
    stage.backend.before_step = kill_at(signal.SIGINT, 15)
    assert stage.train() == COMPLETE


def test_a_run_that_nobody_reads_any_more_saves_and_goes_on(
    stage: Stage, straight: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = RunLog.step

    def unread(log: RunLog, values: dict, line: str) -> None:
        said(log, values, line)
        log.unread = "is not read any more" if values["step"] == 7 else ""

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", unread)
        assert stage.train() == 141
    assert "step_7.npz" in stage.files("checkpoints")
    assert stage.records("end") == [{"kind": "end", "step": 7, "state": "interrupted"}]

    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()


def test_a_second_signal_ends_at_once(stage: Stage) -> None:
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in a shell's background
    stage.backend.before_step = twice
    with pytest.raises(KeyboardInterrupt):
        stage.train()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_that_ends_without_a_step_ends_as_it_does(
    straight: Stage, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to draw then."""
    monkeypatch.setattr("train.run.loop.plot_runs", plot_runs)
    newest = straight.run_dir / "checkpoints" / "step_final_15.npz"
    assert stage.train(resume_from=newest) == COMPLETE
    assert "The run is complete: 15 steps" in stage.text and (stage.run_dir / "deepseek_final.npy").exists()
    assert stage.losses() == [] and "no step has been logged yet" in stage.text
    assert stage.files("checkpoints") == ["step_final_15.npz"], "the folder has all that it goes on from"


def test_keep_checkpoints_keeps_the_latest_and_the_best(stage: Stage) -> None:
    stage.prepare(small_options(keep_checkpoints=2))
    stage.backend.validation_losses = lambda step: 1.0 if step == 4 else 2.0
    assert stage.train() == COMPLETE
    assert stage.files("checkpoints") == ["step_12.npz", "step_final_15.npz"]
    assert stage.files("best") == ["step_4.npz"]


def test_a_checkpoint_that_cannot_be_removed_stays(stage: Stage) -> None:
    stage.prepare(small_options(keep_checkpoints=1))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    stage.backend.delete = refuse
    assert stage.train() == COMPLETE
    assert "step_5.npz cannot be removed (Permission denied); it stays" in stage.text
    assert stage.files("checkpoints") == ["step_10.npz", "step_12.npz", "step_5.npz", "step_final_15.npz"]


def test_a_broken_step_changes_nothing_but_its_place(stage: Stage, straight: Stage) -> None:
    stage.backend.broken_steps = {3, 4}
    assert stage.train() == COMPLETE
    steps = stage.records("step")
    assert [step["loss"] is None for step in steps[:6]] == [False, False, True, True, False, False]
    assert [step["applied"] for step in steps[:6]] == [True, True, False, False, True, True]
    assert steps[-1]["skipped_steps"] == 2
    for ours, theirs in zip(steps, straight.records("step"), strict=True):
        assert (ours["learning_rate"], ours["data_position"]) == (theirs["learning_rate"], theirs["data_position"])
    assert "Warning: step 4 updated nothing" in stage.text and "(2 in a row, at 10 the run stops)" in stage.text


def test_too_many_broken_steps_stop_with_the_last_good_state(stage: Stage) -> None:
    stage.prepare(small_options(max_skipped_steps=3, checkpoint_interval=100))
    stage.backend.broken_steps = {4, 6, 7, 8, 9}
    assert stage.train() == FAILED
    assert stage.losses()[-1][0] == 8 and stage.files("checkpoints") == ["step_8.npz"]
    assert "weights of the last good step, 5" in stage.text
    at_five = Stage(stage.run_dir.parent / "five", small_options(checkpoint_interval=100))
    at_five.backend.broken_steps = {4}
    at_five.backend.before_step = kill_at(signal.SIGINT, 5)
    assert at_five.train() == 130
    saved = [np.load(s.run_dir / "checkpoints" / f"step_{n}.npz") for s, n in ((stage, 8), (at_five, 5))]
    assert np.array_equal(saved[0]["weights"], saved[1]["weights"])

    stage.prepare(small_options(max_skipped_steps=3, checkpoint_interval=100))
    stage.backend.broken_steps = {9, 10}  # two more are fewer than three
    assert stage.train() == COMPLETE
    assert stage.data.given[0] == 8


def test_a_checkpoint_due_where_broken_steps_stop_the_run_does_not_count_them(stage: Stage) -> None:
    settings = {"max_skipped_steps": 3, "checkpoint_interval": 8}
    stage.prepare(small_options(**settings))
    stage.backend.broken_steps = {6, 7, 8}
    assert stage.train() == FAILED
    stage.prepare(small_options(**settings))
    stage.backend.broken_steps = {9, 10}
    assert stage.train() == COMPLETE


def test_unreadable_data_saves_and_ends(stage: Stage, straight: Stage) -> None:
    stage.data.fails_at = 7
    assert stage.train() == FAILED
    assert "step_7.npz" in stage.files("checkpoints")
    assert "Stopped at step 7: dice: batch 7 fell under the table" in stage.text
    assert stage.data.closed == 1
    stage.prepare(small_options())
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses()


def test_unreadable_data_at_the_start_leaves_no_checkpoint(stage: Stage) -> None:
    stage.data.fails_at = 0
    assert stage.train() == FAILED
    assert not (stage.run_dir / "checkpoints").exists()


def test_samples_leave_training_alone(stage: Stage, straight: Stage) -> None:
    assert len(set(straight.backend.sample_seeds)) == 3
    stage.prepare(small_options(sample_interval=0))
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses() and stage.backend.sample_seeds == []


def test_a_sample_never_exceeds_the_positions(stage: Stage) -> None:
    assert stage.train(sample_tokens=1000) == COMPLETE
    assert len(stage.records("sample")[0]["text"]) == 64 - len("Once upon a time")


def test_a_prompt_that_the_tokenizer_leaves_nothing_of_is_the_start_of_a_document(stage: Stage) -> None:
    """As in `train.generate`: a model takes no prompt without a token, and the run would end at its first sample."""
    prompts, generate = [], stage.backend.generate
    stage.data.tokenizer.encode = lambda text: []
    stage.backend.generate = lambda prompt, *rest: prompts.append(prompt) or generate(prompt, *rest)
    assert stage.train() == COMPLETE
    assert prompts == [[stage.data.tokenizer.eot_id]] * 3


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(stage: Stage) -> None:
    def full(folder: Path, name: str, meta: dict) -> Path:
        raise OSError(28, "No space left on device")

    stage.backend.save = full
    with pytest.raises(UserError, match=r"step_4 cannot be written: .*No space left on device"):
        stage.train()


def test_checkpoints_hold_the_whole_configuration(straight: Stage) -> None:
    meta = FakeBackend(small_options()).restore(straight.run_dir / "checkpoints" / "step_10.npz")
    assert meta["step"] == 10 and meta["options"] == json.loads(json.dumps(small_options().to_dict()))
    assert meta["loss"] == straight.losses()[9][1]
    assert meta["progress"]["cursor"] == {"batch": 10} and meta["data"] == straight.data.identity
