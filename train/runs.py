"""A list of runs: `python -m train.runs [FOLDER]` shows each run folder below FOLDER (by default `runs`)."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import user_path
from train.run.guard import is_held
from train.run.overview import size_in_words
from train.run.runlog import LONGEST_LINE, METRICS, PatientConsole, best_loss, read_metrics, validation_curves
from train.shell import COMPLETE, shell


@dataclass(frozen=True)
class RunSummary:
    """One run folder. Losses are nats per token; a run that has not come so far has None."""

    folder: Path
    preset: str
    step: int
    steps: int | None
    """Of both phases."""
    loss: float | None
    best_validation: float | None
    tokens_seen: int
    size: int
    """Bytes of all its files."""
    state: str
    """complete, time is up, interrupted, diverged, data error, failed; running; or stopped: it ended without a word."""


def summarize(folder: Path) -> RunSummary:
    """Read one run folder. Raises `UserError` if it is none."""
    records = read_metrics(folder)
    steps = [record for record in records if record["kind"] == "step"]
    last = steps[-1] if steps else {"step": 0}
    judged = next(iter(validation_curves(records).values()), [])
    settings = _settings(folder)
    phases = [settings.get(name) for name in ("steps", "extended_steps")]
    planned = sum(phases) if all(isinstance(steps, int) for steps in phases) else None
    ended = records[-1].get("state", "stopped") if records and records[-1]["kind"] == "end" else "stopped"
    return RunSummary(
        folder=folder,
        preset=str(settings.get("preset", "?")),
        step=last["step"],
        steps=planned,
        loss=last.get("loss"),
        best_validation=best_loss(judged),
        tokens_seen=last.get("tokens_seen") or 0,
        size=size_of(folder),
        state="running" if is_training(folder) else ended,
    )


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    size = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a run in training renames its checkpoints, and removes old ones
                size += Path(where, name).stat().st_size
    return size


def is_training(folder: Path) -> bool:
    """Whether a process trains in the folder. Its lock is left alone: who looks must not keep a run from starting."""
    return is_held(folder, METRICS)


def _settings(folder: Path) -> dict:
    try:
        return tomllib.loads((folder / "settings.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not TOML, or not UTF-8
        return {}


def find_runs(folder: Path) -> Iterator[Path]:
    """Run folders in and below a folder, in order of their names; links are followed, and each folder is found once."""
    found, seen = [], set()
    # Unlike Path.rglob it passes over a folder that a run in training renames meanwhile.
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: os.path.islink(os.path.join(where, name)))  # by its own name, if it has one here
        found += [Path(where)] * (METRICS in files)
    yield from sorted(found)


def table_of(runs: Sequence[RunSummary], root: Path) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("preset")
    for name in ("step", "loss", "best validation", "tokens", "size"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for run in runs:
        cells = (
            str(run.folder.relative_to(root)) if run.folder != root else run.folder.resolve().name,
            run.preset,
            f"{run.step} / {run.steps}" if run.steps else str(run.step),
            _loss(run.loss),
            _loss(run.best_validation),
            f"{run.tokens_seen:,}",
            size_in_words(run.size),
            run.state,
        )
        table.add_row(*map(Text, cells))  # as a string, brackets in a name would be taken for markup
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.runs", description="List runs.")
    parser.add_argument(
        "folder", nargs="?", type=user_path, default=Path("runs"), help="The folder to look in; by default runs."
    )
    folder = parser.parse_args(argv).folder
    runs = [summarize(run) for run in find_runs(folder)]
    if not runs:
        raise UserError(f"{folder}: no run in it or below it")
    console = PatientConsole()
    console.width = LONGEST_LINE  # a terminal folds what is longer; rich would cut words short, such as the state
    console.print(table_of(runs, folder))
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
