"""Where a run's story goes: console, `training.logs`, `metrics.jsonl`, TensorBoard and, if asked for, Weights & Biases.

`training.logs` holds what the console shows. `metrics.jsonl` holds one JSON object a line, told apart by `kind`:
`step` (every optimizer step), `validation`, `sample`, `spike` and `end`; numbers that are not finite are null. When a
run resumes, both are cut back to the step it goes on from, so that no step appears twice. Nothing is deleted: what is
cut goes to `training.cut.logs` and `metrics.cut.jsonl`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import unused_name, write_errors, write_whole
from train.run.board import Board
from train.run.options import Options
from train.shell import forget_output

log = logging.getLogger(__name__)

TEXT_LOG = "training.logs"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
WANDB_ID = "wandb_id"
"""File with the name by which Weights & Biases knows a run."""
RULE = "=" * 50
LONGEST_LINE = 1000
"""Characters of a line, such as one of a table, where there is no terminal's width."""
LOGGERS = ("train", "torch_ref", "flax_model")
"""Python loggers whose messages belong in the story: bad rows, retries, fallbacks."""


def step_line(
    step: int,
    loss: float,
    learning_rate: float,
    seconds: float,
    tokens_per_second: float,
    batches: int,
    flops_per_second: float,
    mfu: float | None,
    memory: int | None,
) -> str:
    """The line of one optimizer step; `loss` in nats per token, `batches` the micro-batches it was summed over, `mfu` a
    share of 1, `memory` in bytes; None is left out."""
    share = "" if mfu is None else f", MFU {mfu:.1%}"
    held = "" if memory is None else f" | Memory: {memory / 1e9:.2f} GB"
    return (
        f"Step {step} | Loss: {loss:.4f} | LR: {learning_rate:.6f} | Total Step Time: {seconds * 1000:.2f}ms | "
        f"Tokens/sec: {tokens_per_second:.2f} (accumulated over {batches} batches) | "
        f"{flops_in_words(flops_per_second)}{share}{held}"
    )


def flops_in_words(flops: float) -> str:
    """FLOP/s with a fitting prefix."""
    unit, scale = ("TFLOP/s", 1e12) if flops >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops / scale:.2f} {unit}"


STEP_LINE = re.compile(rb"^Step (\d+) \| Loss: \S+ \| LR: \S+ \| Total Step Time: ", re.MULTILINE)
"""As `step_line` writes it: a sample or a prompt may begin a line with `Step 9 |` too."""


class RunLog:
    """Writes a run's story; a context manager. `step` is how many optimizer steps are done when it opens: with 0 the
    logs begin anew. Raises `UserError` where something cannot be written."""

    def __init__(
        self, run_dir: Path, step: int, options: Options, owed: Sequence[str] = (), console: Console | None = None
    ) -> None:
        unreadable = cut_logs(run_dir, step, owed)
        self.console = console or PatientConsole()
        self.unread = ""
        """Why the console cannot be written to any more: most often its reader has gone away."""
        self._text = _open(run_dir / TEXT_LOG)
        self._metrics = _open(run_dir / METRICS)
        self._board = Board(run_dir / BOARD, step) if options.tensorboard else None
        self._wandb = _wandb(run_dir, step, options) if options.wandb else None
        self._options = options
        self._bar: PhaseBar | None = None
        self._handler = _SayHandler(self)
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        if unreadable:
            self.warn(
                f"{run_dir / METRICS}: {unreadable} lines could not be read; they are now in {_cut_name(METRICS)}"
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
        for file in (self._text, self._metrics):
            with suppress(OSError):  # what could not be written was told when it was
                file.close()

    def say(self, text: str = "") -> None:
        """One or more lines to the console and to `training.logs`."""
        console = self._bar.console if self._bar else self.console
        try:
            if not self.unread:
                console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
        except OSError as error:
            closed = error.errno in (None, errno.EPIPE, errno.EIO)  # a pipe or a terminal
            self.unread = "is not read any more" if closed else f"cannot be written ({error.strerror})"
            forget_output()
        _write(self._text, text)

    def warn(self, text: str) -> None:
        self.say(f"Warning: {text}")

    def announce(self, title: str, *lines: str) -> None:
        """A title between two rules, lines, and a rule."""
        self.say("\n".join([RULE, title, RULE, *lines, RULE]))

    def show_progress(self, step: int) -> None:
        """On a terminal, a bar for each phase with the time it will still take."""
        if self.console.is_terminal:
            self._bar = PhaseBar(self.console, step, self._options.steps, self._options.extended_steps)

    def step(self, values: dict[str, Any], line: str) -> None:
        """One optimizer step: its line, and its values to everything that keeps numbers."""
        self.say(line)
        self._record("step", values)
        if self._bar:
            self._bar.update(values["step"], values["loss"])

    def validation(self, values: dict[str, Any], line: str) -> None:
        self.say(line)
        self._record("validation", values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.announce(f"Generating text sample at step {step}", f"Prompt: {prompt}", "Generated text:", prompt + text)
        self._record("sample", {"step": step, "prompt": prompt, "text": text})

    def spike(self, values: dict[str, Any]) -> None:
        """A run that diverges: the step, its loss, the running median, the first spike, and the step of the weights it
        was rolled back to, or None."""
        self._record("spike", values)

    def end(self, step: int, state: str) -> None:
        """Note why the run ended, for the list of runs."""
        self._record("end", {"step": step, "state": state})

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        _write(self._metrics, json.dumps({"kind": kind, **_finite(values)}, ensure_ascii=False))
        group = f"{kind}/{values['dataset']}" if "dataset" in values else kind
        scalars = {
            f"{group}/{name}": float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for layer, load in enumerate(values.get("expert_load", ())):
            scalars[f"expert_load/layer_{layer:02d}"] = load
        if self._board:
            texts = {"sample": values["prompt"] + values["text"]} if kind == "sample" else {}
            self._board.add(values["step"], scalars, texts)
        if self._wandb and scalars:
            self._wandb.log({"trainer/step": values["step"], **scalars})


class SilentLog(RunLog):
    """Of a process that does not write: nothing is said anywhere."""

    def __init__(self) -> None:
        self.unread = ""
        self._bar = None

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str = "") -> None:
        pass

    def show_progress(self, step: int) -> None:
        pass

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        pass


class PatientConsole(Console):
    """rich ends the process when its reader goes away; here the run is saved first. What is no terminal gets no
    colours and no bar, whatever FORCE_COLOR says, and long lines stay whole: it may be a file."""

    def __init__(self, file: TextIO | None = None) -> None:
        is_terminal = (file or sys.stdout).isatty()
        super().__init__(
            file=file, force_terminal=None if is_terminal else False, width=None if is_terminal else LONGEST_LINE
        )

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class PhaseBar:
    """The bars of the main and the extended phase, at the foot of the terminal."""

    def __init__(self, console: Console, step: int, steps: int, extended_steps: int) -> None:
        self._steps = steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._main = self._progress.add_task("Main phase", total=steps, completed=min(step, steps), loss="-")
        self._extended = self._progress.add_task(
            "Extended phase",
            total=extended_steps,
            completed=max(step - steps, 0),
            start=step > steps,
            visible=extended_steps > 0,
            loss="-",
        )
        self.console = self._progress.console
        self._progress.start()

    def update(self, step: int, loss: float) -> None:
        task, done = (self._main, step) if step <= self._steps else (self._extended, step - self._steps)
        if done == 1 and task == self._extended:
            self._progress.start_task(task)
        self._progress.update(task, completed=done, loss=f"{loss:.4f}")

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def heard() -> Iterator[list[str]]:
    """What `LOGGERS` warn of in the block, before there is a log that says it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    except BaseException:
        for message in messages:
            print(f"Warning: {message}", file=sys.stderr)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _SayHandler(logging.Handler):
    """Passes Python's log messages on to the run's story."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        say = self._log.warn if record.levelno >= logging.WARNING else self._log.say
        say(record.getMessage())


def _open(path: Path) -> TextIO:
    with write_errors(path):
        return open(path, "a", encoding="utf-8", buffering=1)


def _write(file: TextIO, line: str) -> None:
    """A line to one of the logs. Raises `UserError` if it cannot be written, or if the file is gone: what is written to
    a removed file is lost without a word."""
    path = Path(file.name)
    with write_errors(path):
        file.write(line + "\n")
        os.stat(path)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first. Lines that cannot be read are left out; of the last one, which a crash may
    have cut short, nothing is said. Raises `UserError` if there are none, or the file cannot be read."""
    path = Path(run_dir) / METRICS
    if (content := _content(path)) is None:
        raise UserError(f"{run_dir}: not a run folder, it has no {METRICS}")
    lines = content.split(b"\n")
    records = [(number, _record_of(line)) for number, line in enumerate(lines, 1) if line]
    for number, record in records[:-1]:
        if record is None:
            log.warning("%s: line %d cannot be read, and is left out", path, number)
    return [record for _, record in records if record is not None]


def last_word(run_dir: Path) -> str | None:
    """The state that a run's last start ended in; None if it did not come to an end, or its log is gone."""
    try:
        *_, last = read_metrics(run_dir)
    except (UserError, ValueError):
        return None
    return last.get("state") if last["kind"] == "end" else None


NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "applied")
"""Fields that hold a number or null, of records that have them."""


def _record_of(line: bytes) -> dict[str, Any] | None:
    """One line of the metrics; None if it is no record."""
    try:
        record = json.loads(line)
        kind = record["kind"]
        complete = isinstance(record["step"], int) and isinstance(kind, str)
        complete &= all(isinstance(record.get(name), int | float | None) for name in NUMBERS)
        shape = np.array(record.get("expert_counts", []), float).shape
        complete &= len(shape) == 2 or shape == (0,)  # [layers, experts], or a model without experts
        complete &= isinstance(record.get("state", ""), str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if complete else None


def validation_curves(records: list[dict[str, Any]]) -> dict[str | None, list[dict[str, Any]]]:
    """Validations by dataset, None for the held-out rows; the first one is that which decided on the best state."""
    curves: dict[str | None, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "validation":
            curves.setdefault(record.get("dataset"), []).append(record)
    return dict(sorted(curves.items(), key=lambda curve: curve[0] is not None))


def best_loss(curve: list[dict[str, Any]]) -> float | None:
    """The validation loss of the state that was kept as the best one, which the last record names by its step: by
    `--min-delta` it need not be the lowest. That is taken of a curve that decides nothing, or does not reach back."""
    known = [record for record in curve if record.get("loss") is not None]
    kept = [record for record in known if record["step"] == curve[-1].get("best_step")]
    return min((record["loss"] for record in kept or known), default=None)


def cut_logs(run_dir: Path, step: int, owed: Sequence[str] = ()) -> int:
    """Move what the logs say about steps after `step`, and the records of that step that are `owed`, to files of their
    own; with step 0, everything. Returns how many lines of the metrics could not be read."""
    text, metrics, board = run_dir / TEXT_LOG, run_dir / METRICS, run_dir / BOARD
    unreadable = 0
    if (content := _content(text)) is not None:
        later = (m.start() for m in STEP_LINE.finditer(content) if int(m[1]) > step)
        end = next(later, content.rfind(b"\n") + 1) if step else 0
        _split(text, content[:end], content[end:])
    if (content := _content(metrics)) is not None:
        kept, cut = [], []
        lines = re.findall(rb"[^\n]*\n|[^\n]+", content)
        for line in lines:
            record = _record_of(line)
            unreadable += record is None and line is not lines[-1]
            stays = record is not None and 0 < record["step"] <= step and record["kind"] != "end"
            stays = stays and not (record["step"] == step and record["kind"] in owed)
            (kept if stays and line.endswith(b"\n") else cut).append(line)
        _split(metrics, b"".join(kept), b"".join(cut))
    if step == 0 and board.exists():
        board.rename(unused_name(board.with_name(f"{BOARD}.cut")))
    return unreadable


def _content(path: Path) -> bytes | None:
    """All of a log; None if there is none. Raises `UserError` naming one that cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _split(path: Path, kept: bytes, cut: bytes) -> None:
    """Leave `kept` in a file, and add `cut` to the one beside it."""
    if not cut:
        return
    aside = path.with_name(_cut_name(path.name))
    with write_errors(aside), open(aside, "ab") as file:
        file.write(cut if cut.endswith(b"\n") else cut + b"\n")
    write_whole(path, kept)


def _cut_name(name: str) -> str:
    """`metrics.cut.jsonl` for `metrics.jsonl`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.cut{dot}{suffix}"


def _finite(values: dict) -> dict:
    """JSON has no NaN and no infinity: null stands for both."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def _wandb(run_dir: Path, step: int, options: Options) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: the package wandb is not installed; pip install wandb") from None
    # A resumed run continues its curves, and no other run of that name does.
    identity = run_dir / WANDB_ID
    if step == 0 or not identity.is_file():
        write_whole(identity, f"{uuid.uuid4().hex}\n".encode())
    run = wandb.init(
        project=options.wandb_project,
        id=identity.read_text(encoding="utf-8").strip(),
        name=run_dir.resolve().name,
        resume="allow",
        dir=str(run_dir),
        config=options.to_dict(),
    )
    run.define_metric("*", step_metric="trainer/step")
    return run
