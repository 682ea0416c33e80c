"""Logs: the exact wording of a step, what goes where, and cutting back on resume; and the list of runs."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import socket
import sys
import types
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from parity_tests.support.fakes import small_options
from parity_tests.support.stage import Stage
from torch_ref.spec.interface import UserError
from train.plot import plot_runs
from train.run.board import Board
from train.run.guard import HOLDER, LOCK
from train.run.runlog import PatientConsole, RunLog, cut_logs, read_metrics, step_line
from train.run.signals import StopSignals
from train.runs import find_runs, main, summarize


def values(step: int, **others: object) -> dict:
    return {"step": step, "loss": 2.0, "expert_load": [1.5, 1.0], "expert_counts": [[1, 2]]} | others


def test_the_step_line() -> None:
    told = 1000, 3.45671, 0.002345, 0.524557, 31234.5601, 8
    line = (
        "Step 1000 | Loss: 3.4567 | LR: 0.002345 | Total Step Time: 524.56ms | Tokens/sec: 31234.56 "
        "(accumulated over 8 batches)"
    )
    assert step_line(*told, 2.5e14, 0.2527, 34_120_000_000) == line + " | 250.00 TFLOP/s, MFU 25.3% | Memory: 34.12 GB"
    assert step_line(*told, 3.256e9, None, None) == line + " | 3.26 GFLOP/s", "nothing that is not known"


def test_console_and_file_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wide = "Step 1 | " + "x" * 300 + " [bold]not markup[/bold] :smile:"
    with RunLog(tmp_path, 0, small_options()) as log:
        log.step(values(1), wide)
        log.announce("A title", "a line")
        log.warn("careful")
        logging.getLogger("train.data.corpus").warning("bad row in %s", "file")
    rule = "=" * 50
    expected = f"{wide}\n{rule}\nA title\n{rule}\na line\n{rule}\nWarning: careful\nWarning: bad row in file\n"
    assert (tmp_path / "training.logs").read_text() == expected == capsys.readouterr().out
    logging.getLogger("train.data.corpus").warning("nobody listens any more")
    assert (tmp_path / "training.logs").read_text() == expected


def test_metrics_are_json_at_full_precision(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, small_options()) as log:
        log.step(values(1, loss=1 / 3, grad_norm=math.inf, nested={"a": [math.nan, 1]}), "line")
        log.validation({"step": 1, "loss": math.nan}, "line")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first["loss"] == 1 / 3 and first["grad_norm"] is None and first["nested"] == {"a": [None, 1]}
    assert (first["kind"], second["kind"], second["loss"]) == ("step", "validation", None)


def test_each_validation_dataset_has_curves_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, float] = {}
    monkeypatch.setattr(Board, "add", lambda self, step, scalars, texts: written.update(scalars))
    with RunLog(tmp_path, 0, small_options(tensorboard=True)) as log:
        log.validation({"step": 1, "loss": 2.0}, "line")
        log.validation({"step": 1, "dataset": "news", "loss": 3.0}, "line")
    assert written == {"validation/loss": 2.0, "validation/news/loss": 3.0}


def test_logs_are_cut_back(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, small_options()) as log:
        log.say("Model: ...")
        for step in range(1, 13):
            log.step(values(step), step_line(step, 2.0, 0.1, 0.1, 5.0, 1, 1e9, None, None))
            if step == 2:
                log.announce("Saving checkpoint at step 2")
                log.sample(2, "Step 99 | Loss", "; Step 98 |\nStep 97 | Loss: 1")
        log.end(12, "interrupted")
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "step", "st')  # a crash in the middle of a line
    assert cut_logs(tmp_path, 2) == 0, "which is no damage"
    text = (tmp_path / "training.logs").read_text()
    assert text.startswith("Model: ...") and "Saving checkpoint at step 2" in text
    assert "Step 97 | Loss: 1\n" in text and "Step 2 |" in text and "Step 3 |" not in text and "Step 12 |" not in text
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2]
    with RunLog(tmp_path, 0, small_options()) as log:
        log.say("anew")
    assert (tmp_path / "training.logs").read_text() == "anew\n"
    # What was cut off before stays, and what is cut off now comes after it.
    text = (tmp_path / "training.cut.logs").read_text()
    assert text.startswith("Step 3 |") and text.count("Step 12 |") == 1 and text.endswith(f"{'=' * 50}\n")
    lines = [line for line in (tmp_path / "metrics.cut.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in lines] == [*range(3, 13), 12, 1, 2, 2]


def test_what_is_logged_is_there_at_once_and_a_log_is_cut_as_a_whole(tmp_path: Path) -> None:
    """A process that is killed takes no line with it, not even while it cuts a log."""
    with RunLog(tmp_path, 0, small_options()) as log:
        for step in (1, 2):
            log.step(values(step), step_line(step, 2.0, 0.1, 0.1, 5.0, 1, 1e9, None, None))
        logged = {name: (tmp_path / name).read_text() for name in ("metrics.jsonl", "training.logs")}
    assert all(text.count("\n") == 2 for text in logged.values())
    for name in logged:
        os.link(tmp_path / name, tmp_path / f"{name} before")
    cut_logs(tmp_path, 1)
    for name, text in logged.items():
        assert (tmp_path / name).read_text() == text.splitlines(keepends=True)[0]
        assert (tmp_path / f"{name} before").read_text() == text, "another file has taken its name"


def test_no_record_is_written_into_a_line_that_was_cut_short(tmp_path: Path) -> None:
    """A crash may have left a record whole but for the end of its line."""
    with RunLog(tmp_path, 0, small_options()) as log:
        log.step(values(1), "line")
        log.step(values(2), "line")
    for name in ("metrics.jsonl", "training.logs"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with RunLog(tmp_path, 2, small_options()) as log:
        log.step(values(3), "another line")
    assert [record["step"] for record in read_metrics(tmp_path)][-1] == 3
    assert (tmp_path / "training.logs").read_text().endswith("\nanother line\n")


def test_tensorboard(tmp_path: Path) -> None:
    options = small_options(tensorboard=True)
    with RunLog(tmp_path, 0, options) as log:
        log.step(values(1, learning_rate=0.5, phase="main", applied=True), "line")
        log.sample(1, "Once", " upon")
    written = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    for tag in (b"step/loss", b"step/learning_rate", b"expert_load/layer_00", b"Once upon"):
        assert tag in written
    assert b"step/phase" not in written and b"step/applied" not in written
    with RunLog(tmp_path, 1, options):
        assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    with RunLog(tmp_path, 0, options):
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_wandb_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb: the package wandb is not installed; pip install wandb"):
        RunLog(tmp_path, 0, small_options(wandb=True))

    told: list = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=told.append, finish=lambda: told.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **arguments: told.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(tmp_path, 0, small_options(wandb=True, wandb_project="mine")) as log:
        log.step(values(3), "line")
    assert told[0]["project"] == "mine" and told[0]["name"] == tmp_path.name and told[0]["resume"] == "allow"
    assert told[0]["config"]["batch_size"] == 4
    assert told[1]["trainer/step"] == 3 and told[1]["step/loss"] == 2.0 and told[2] == "finished"
    # A resumed run goes on in its own curves; a fresh one, of the same name or not, never does.
    for step in (3, 0):
        RunLog(tmp_path, step, small_options(wandb=True)).__exit__()
    identities = [each["id"] for each in told if isinstance(each, dict) and "id" in each]
    assert identities[0] == identities[1] != identities[2] and tmp_path.name not in identities


def test_a_terminal_gets_a_bar_with_both_phases(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110)
    with RunLog(tmp_path, 10, small_options(), console=console) as log:
        log.show_progress(10)
        for step in (11, 12, 13):
            log.step(values(step, loss=1.5), step_line(step, 1.5, 0.1, 0.1, 5.0, 1, 1e9, None, None))
    shown = screen.getvalue()
    for text in ("Main phase", "12/12", "Extended phase", "1/3", "loss 1.5000", "Step 13 | Loss: 1.5000"):
        assert text in shown
    assert "\x1b" not in (tmp_path / "training.logs").read_text()


def test_without_a_terminal_there_is_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(tmp_path, 0, small_options()) as log:
        log.show_progress(0)
        log.step(values(1), "Step 1 | ...")
    assert capsys.readouterr().out == "Step 1 | ...\n"


def test_signals_are_left_alone_afterwards() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Two runs: one complete, one that ended without a word."""
    for name, steps, state in (("a-torch", 2, "complete"), ("b-flax", 1, None)):
        folder = tmp_path / name
        folder.mkdir()
        options = small_options()
        (folder / "settings.toml").write_text(options.to_toml())
        with RunLog(folder, 0, options) as log:
            for step in range(1, steps + 1):
                log.step(values(step, loss=3.0 / step, tokens_seen=1000 * step), "line")
            log.validation({"step": steps, "loss": 1.25}, "line")
            log.validation({"step": steps, "dataset": "news", "loss": 0.25}, "line")
            log.validation({"step": steps, "loss": 1.75}, "line")
            if state:
                log.end(steps, state)
    return tmp_path


def test_runs_are_summed_up(shelf: Path) -> None:
    a, b = (summarize(folder) for folder in find_runs(shelf))
    assert (a.preset, a.step, a.steps, a.loss, a.best_validation, a.tokens_seen) == ("tiny", 2, 15, 1.5, 1.25, 2000)
    assert (a.state, b.state) == ("complete", "stopped")
    assert a.size == sum(file.stat().st_size for file in (shelf / "a-torch").iterdir())
    holder = shelf / "b-flax" / HOLDER
    note = {"host": socket.gethostname(), "pid": os.getppid(), "since": "today"}
    holder.write_text(json.dumps(note))
    assert summarize(shelf / "b-flax").state == "running"
    with FileLock(shelf / "b-flax" / LOCK, timeout=0):  # looking takes no lock, so a run can start meanwhile
        assert summarize(shelf / "b-flax").state == "running"
    holder.write_text(json.dumps(note | {"host": "elsewhere"}))
    assert summarize(shelf / "b-flax").state == "running"  # it has just written something
    for file in (holder, shelf / "b-flax" / "metrics.jsonl"):
        os.utime(file, (0, 0))
    assert summarize(shelf / "b-flax").state == "stopped"


def test_the_list_of_runs(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(shelf)]) == 0
    shown = capsys.readouterr().out
    for text in ("a-torch", "b-flax", "2 / 15", "1.5000", "1.2500", "2,000", "complete", "stopped"):
        assert text in shown
    assert main([str(shelf / "nothing")]) == 2
    assert capsys.readouterr().err == f"error: {shelf / 'nothing'}: no run in it or below it\n"


def test_the_best_loss_is_that_of_the_state_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By `--min-delta` a lower one need not be better: the run's last line, the list and the legend say the same."""
    legends: list[str] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.legend", lambda axes, **_: legends.extend(axes.get_legend_handles_labels()[1])
    )
    stage = Stage(tmp_path, small_options(min_delta=0.5, eval_interval=5))
    stage.backend.validation_losses = {5: 2.0, 10: 1.75, 15: 1.6}.get
    assert stage.train() == 0
    said = re.search(r"best validation loss ([\d.]+) at step", stage.text)[1]
    assert min(record["loss"] for record in stage.records("validation")) < float(said)
    assert f"{summarize(stage.run_dir).best_validation:.4f}" == said
    plot_runs([stage.run_dir], tmp_path / "plot.png")
    assert [label for label in legends if "validation" in label][0].endswith(f", best {float(said):.3f}")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_listed_in_a_line_whatever_the_width(
    terminal: bool, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    name = "/".join(["a-long-name-of-a-folder"] * 5)
    (shelf / name).parent.mkdir(parents=True)
    (shelf / "b-flax").rename(shelf / name)
    assert main([str(shelf)]) == 0
    shown = capsys.readouterr().out
    runs = [line.split() for line in shown.splitlines()[3:-1]]
    assert sorted((run[0], run[-1]) for run in runs) == [(name, "stopped"), ("a-torch", "complete")]
    assert terminal or "\x1b" not in shown  # FORCE_COLOR or not: it may be a file


def test_brackets_in_a_runs_name_are_listed(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    (shelf / "x[").mkdir()
    (shelf / "a-torch").rename(shelf / "x[" / "y]")
    (shelf / "b-flax").rename(shelf / "lr[a=3e-4]")
    assert main([str(shelf)]) == 0
    shown = capsys.readouterr().out
    assert "lr[a=3e-4] " in shown and "x[/y] " in shown


def test_metrics_that_cannot_be_read_are_one_line(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert main([str(shelf)]) == 2
    assert capsys.readouterr().err == f"error: {shelf / 'a-torch' / 'metrics.jsonl'}: Permission denied\n"
    with pytest.raises(UserError, match="training.logs: Permission denied"):
        cut_logs(shelf / "a-torch", step=1)


def test_the_folder_that_one_is_in_is_listed_by_its_name(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(shelf / "a-torch")
    Path("settings.toml").write_text("preset = 5")  # by hand
    assert main(["."]) == 0
    assert "a-torch" in (shown := capsys.readouterr().out) and "5" in shown


def test_runs_behind_links_are_listed_once(shelf: Path) -> None:
    here = shelf / "runs"
    here.mkdir()
    (shelf / "b-flax").rename(here / "b-flax")
    for name, target in (("a-latest", here / "b-flax"), ("c-scratch", shelf / "a-torch"), ("round", here)):
        (here / name).symlink_to(target)
    assert [folder.name for folder in find_runs(here)] == ["b-flax", "c-scratch"]


def test_what_a_run_renames_meanwhile_is_passed_over(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = shelf / "a-torch" / "checkpoints" / "step_5.partial"
    saving.mkdir(parents=True)
    scandir = os.scandir

    def renamed(folder: Path | str) -> object:
        if Path(folder) == saving:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return scandir(folder)

    monkeypatch.setattr("os.scandir", renamed)
    assert [summarize(folder).state for folder in find_runs(shelf)] == ["complete", "stopped"]


@pytest.mark.parametrize(
    "error, why",
    [
        (BrokenPipeError(), "is not read any more"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written (No space left on device)"),
    ],
)
def test_output_that_cannot_be_written_is_noted_and_the_logs_go_on(
    error: OSError, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.run.runlog.forget_output", lambda: None)  # here it is pytest's

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    with RunLog(tmp_path, 0, small_options(), console=PatientConsole(file=Closed())) as log:
        log.say("first")
        assert log.unread == why
        log.say("second")
    assert (tmp_path / "training.logs").read_text() == "first\nsecond\n"


def test_colours_never_reach_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunLog(tmp_path, 0, small_options()) as log:
        log.show_progress(0)
        log.step(values(1), step_line(1, 1.5, 0.1, 0.1, 5.0, 1, 1e9, None, None))
        log.warn("careful")
    assert "\x1b" not in (tmp_path / "training.logs").read_text() + capsys.readouterr().out


def test_line_separators_of_unicode_lose_no_record(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\u0085four"
    with RunLog(tmp_path, 0, small_options()) as log:
        log.step(values(1), "line")
        log.sample(1, "prompt", text)
        log.step(values(2), "line")
    cut_logs(tmp_path, 2)
    assert [record["kind"] for record in read_metrics(tmp_path)] == ["step", "sample", "step"]
    assert read_metrics(tmp_path)[1]["text"] == text


def test_what_is_owed_at_the_step_is_not_told_twice(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, small_options()) as log:
        log.step(values(4), "line")
        log.validation({"step": 4, "loss": 1.0}, "line")
        log.sample(4, "prompt", "text")
    cut_logs(tmp_path, 4, ["sample"])
    assert [record["kind"] for record in read_metrics(tmp_path)] == ["step", "validation"]
