"""Where a run's story goes: console, `training.logs`, `metrics.jsonl`, TensorBoard and, if asked for, Weights & Biases.

`training.logs` holds what the console shows. `metrics.jsonl` holds one JSON object a line, told apart by `kind`:
`step` (every optimizer step), `validation`, `sample` and `end`; numbers that are not finite are null. When a run
resumes, both are cut back to the step it goes on from, so that no step appears twice.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torch_ref.spec.interface import UserError
from train.run.options import Options

TEXT_LOG = "training.logs"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
RULE = "=" * 50
LOGGERS = ("train", "torch_ref", "flax_model")
"""Python loggers whose messages belong in the story: bad rows, retries, fallbacks."""


def step_line(
    step: int, loss: float, learning_rate: float, seconds: float, tokens_per_second: float, batches: int
) -> str:
    """The line of one optimizer step; `loss` in nats per token, `batches` the micro-batches it was summed over."""
    return (
        f"Step {step} | Loss: {loss:.4f} | LR: {learning_rate:.6f} | Total Step Time: {seconds * 1000:.2f}ms | "
        f"Tokens/sec: {tokens_per_second:.2f} (accumulated over {batches} batches)"
    )


class RunLog:
    """Writes a run's story; a context manager. `step` is how many optimizer steps are done when it opens: with 0 the
    logs begin anew."""

    def __init__(self, run_dir: Path, step: int, options: Options, console: Console | None = None) -> None:
        cut_logs(run_dir, step)
        self.console = console or Console()
        self._text = open(run_dir / TEXT_LOG, "a", encoding="utf-8", buffering=1)
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(run_dir, step) if options.tensorboard else None
        self._wandb = _wandb(run_dir, options) if options.wandb else None
        self._options = options
        self._bar: PhaseBar | None = None
        self._handler = _SayHandler(self)
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)

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
        self._text.close()
        self._metrics.close()

    def say(self, text: str = "") -> None:
        """One or more lines to the console and to `training.logs`."""
        console = self._bar.console if self._bar else self.console
        console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
        self._text.write(text + "\n")

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

    def end(self, step: int, state: str) -> None:
        """Note why the run ended, for the list of runs."""
        self._record("end", {"step": step, "state": state})

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        self._metrics.write(json.dumps({"kind": kind, **_finite(values)}, ensure_ascii=False) + "\n")
        scalars = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for layer, load in enumerate(values.get("expert_load", ())):
            scalars[f"expert_load/layer_{layer:02d}"] = load
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, values["step"])
            if kind == "sample":
                self._board.add_text("sample", values["prompt"] + values["text"], values["step"])
        if self._wandb and scalars:
            self._wandb.log({"trainer/step": values["step"], **scalars})


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


class _SayHandler(logging.Handler):
    """Passes Python's log messages on to the run's story."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        say = self._log.warn if record.levelno >= logging.WARNING else self._log.say
        say(record.getMessage())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first. A line that a crash cut short is left out. Raises `UserError` if there are
    none."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder, it has no {METRICS}")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cut_logs(run_dir: Path, step: int) -> None:
    """Drop what the logs say about steps after `step`; with step 0, everything."""
    text, metrics = run_dir / TEXT_LOG, run_dir / METRICS
    if step == 0:
        text.unlink(missing_ok=True)
        metrics.unlink(missing_ok=True)
        shutil.rmtree(run_dir / BOARD, ignore_errors=True)
        return
    if text.exists():
        kept = []
        for line in text.read_text(encoding="utf-8").splitlines(keepends=True):
            later = re.match(r"Step (\d+) \|", line)
            if later and int(later[1]) > step:
                break
            kept.append(line)
        _replace(text, "".join(kept))
    if metrics.exists():
        kept = [record for record in read_metrics(run_dir) if record["step"] <= step and record["kind"] != "end"]
        _replace(metrics, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _replace(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    return [_finite(member) for member in value] if isinstance(value, list | tuple) else value


def _tensorboard(run_dir: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    # Events after the resumed step are marked void. A file's name has its second: without the step in it, a run resumed
    # within one would write over what it goes on from.
    return SummaryWriter(
        str(run_dir / BOARD), purge_step=step + 1 if step else None, filename_suffix=f".from_step_{step}"
    )


def _wandb(run_dir: Path, options: Options) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: the package wandb is not installed; pip install wandb") from None
    # The name of the folder identifies the run, so that a resumed one continues its curves.
    name = run_dir.resolve().name
    settings = options.to_dict()
    run = wandb.init(project=options.wandb_project, id=name, resume="allow", dir=str(run_dir), config=settings)
    run.define_metric("*", step_metric="trainer/step")
    return run
