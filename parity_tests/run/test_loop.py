"""The training loop: cadence, names, resuming, early stopping, and every way a run can end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import IGNORE, TrainingState, UserError
from train.data.feed import Validation
from train.plot import plot_runs
from train.run.changes import changes_since
from train.run.options import Options
from train.run.overview import checkpoint_space, disk_estimate
from train.run.progress import Progress
from train.run.runlog import RunLog, read_metrics, validation_curves
from train.run.scoring import fixed_size_parts
from train.shell import COMPLETE, FAILED
from train.state.card import model_card


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


def test_harmless_changes_are_not_refused(straight: Stage) -> None:
    changes = {"checkpoint_interval": 3, "eval_interval": 2, "micro_batch_size": 1, "remat": "layers", "patience": 9}
    assert straight.train(extended_steps=4, **changes) == COMPLETE


def test_other_data_is_refused_and_other_versions_are_named(straight: Stage) -> None:
    straight.prepare(small_options(extended_steps=4))
    straight.data.identity["files"] = {"a": "2"}
    with pytest.raises(UserError, match="files: a was 1, is 2"):
        straight.train()
    straight.prepare(small_options(extended_steps=4))
    straight.data.identity["versions"] = {"numpy": "2"}
    assert straight.train() == COMPLETE
    assert "Warning: changed since the checkpoint: numpy was 1, is 2" in straight.text


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


def test_a_state_is_the_best_by_the_same_rows(stage: Stage) -> None:
    """Losses of other rows are not compared with it."""
    stage.backend.validation_losses = lambda step: 1.0
    assert stage.train() == COMPLETE and stage.files("best") == ["step_4.npz"]
    stage.prepare(small_options(extended_steps=8))
    stage.backend.validation_losses = lambda step: 2.0
    stage.data.judged_by = "three rows"
    assert stage.train() == COMPLETE
    assert "Warning: changed since the checkpoint: the rows that decide which state is the best" in stage.text
    assert stage.files("best") == ["step_16.npz"] and stage.records("validation")[-1]["stale_validations"] == 1


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


def test_validation_weighs_tokens_and_counts_bytes(straight: Stage) -> None:
    targets = straight.data.validation.targets
    scored = targets != IGNORE
    last = straight.records("validation")[-1]
    weights = np.abs(np.load(straight.run_dir / "deepseek_final.npy")).mean()
    loss_sum = float((weights * scored * (1 + targets % 7)).sum())
    assert last["tokens"] == scored.sum() == 5 * 8 - 5
    assert last["loss"] == pytest.approx(loss_sum / scored.sum(), rel=1e-12)
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]), rel=1e-12)
    assert last["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / 100, rel=1e-12)


@pytest.mark.parametrize("held_out", [True, False])
def test_validation_datasets_have_records_of_their_own(stage: Stage, held_out: bool) -> None:
    """The held-out rows decide on the best state, or where there are none the first dataset."""
    stage.backend.validation_losses = lambda step: {4: 3.0, 8: 2.0, 12: 4.0, 15: 5.0}[step]
    own = Validation(stage.data._rows(3, seed=5), 50)
    others = {"news": own, "code": own._replace(bytes=10)}
    stage.data.validations = (stage.data.validations if held_out else {}) | others
    assert stage.train() == COMPLETE
    curves = validation_curves(read_metrics(stage.run_dir))
    assert list(curves) == [None, "news", "code"] if held_out else ["news", "code"]
    assert [record["loss"] for record in curves["code"]] == [3.0, 2.0, 4.0, 5.0]
    assert curves["code"][0]["bits_per_byte"] == pytest.approx(3.0 * 24 / math.log(2) / 10)
    judged = [name for name, records in curves.items() if "best_step" in records[0]]
    assert judged == [None if held_out else "news"] and stage.files("best") == ["step_8.npz"]
    assert "Validation at step 8, code | Loss: 2.0000 | Perplexity: 7.39 | Bits per byte: 6.9249\n" in stage.text
    judge, bits = ("", "1.0099") if held_out else (", news", "1.3850")
    best = f"Validation at step 8{judge} | Loss: 2.0000 | Perplexity: 7.39 | Bits per byte: {bits} (the best so far)"
    assert best in stage.text
    assert "Validation dataset news: 3 rows" in stage.text


@pytest.mark.parametrize(("interval", "at"), [(0, []), (6, [6, 12, 15]), (15, [15]), (16, [])])
def test_validation_cadence(stage: Stage, interval: int, at: list[int]) -> None:
    assert stage.train(eval_interval=interval) == COMPLETE
    assert [record["step"] for record in stage.records("validation")] == at


def test_early_stopping_ends_the_run_and_survives_a_resume(stage: Stage) -> None:
    losses = {2: 3.0, 4: 2.0, 6: 1.95, 8: math.nan, 10: 2.5}
    settings = {"eval_interval": 2, "patience": 3, "min_delta": 0.1}
    stage.prepare(small_options(**settings))
    stage.backend.validation_losses = losses.get
    stage.backend.before_step = kill_at(signal.SIGINT, 7)
    assert stage.train() == 130
    stage.prepare(small_options(**settings))
    stage.backend.validation_losses = losses.get
    assert stage.train() == COMPLETE
    # 1.95 beats 2.0 by less than min_delta, NaN is never best: the third validation after step 4 ends the run.
    assert stage.losses()[-1][0] == 10
    assert stage.files("best") == ["step_4.npz"] and "step_final_10.npz" in stage.files("checkpoints")
    assert "stopped early at step 10, after 3 validations without a better one" in stage.text
    assert "best validation loss 2.0000 at step 4" in stage.text
    meta = stage.backend.restore(stage.run_dir / "checkpoints" / "step_final_10.npz")
    card = model_card(TrainingState(stage.options.model, {}, step=10, meta=meta), None)
    assert "lowest loss on held-out text, to within 0.1: 2.0000 nats per token" in card

    stage.prepare(small_options(**settings))
    assert stage.train() == COMPLETE
    assert stage.data.given == []
    # With more patience it goes on.
    stage.prepare(small_options(**settings | {"patience": 99}))
    assert stage.train() == COMPLETE
    assert stage.losses()[-1][0] == 15


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_best(first: float) -> None:
    progress = Progress()
    assert not progress.validated(1, first, 0.0) and progress.stale_validations == 1
    assert progress.validated(2, 5.0, 0.0) and progress.best_step == 2
    assert not progress.validated(3, first, 0.0) and progress.best_loss == 5.0
    progress.forget_best()
    assert progress == Progress(), "nor does a count of other rows' losses stop the run"


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


def test_parts_have_one_size_and_score_each_target_once() -> None:
    inputs = np.arange(10, dtype=np.int32).reshape(5, 2)
    parts = list(fixed_size_parts(inputs, inputs + 1, 2))
    assert [part.shape for part, _ in parts] == [(2, 2)] * 3
    assert np.array_equal(np.concatenate([part for part, _ in parts])[:5], inputs)
    assert np.array_equal(np.concatenate([targets for _, targets in parts])[5], [IGNORE, IGNORE])


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
