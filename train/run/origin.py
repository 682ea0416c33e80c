"""Where a start of a run begins: at seeded weights, at given ones, or at a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.storage import first_line
from train.data.feed import Data
from train.run.changes import changes_since
from train.run.options import Options
from train.run.progress import Progress
from train.run.spikes import begin_at
from train.run.together import require_same
from train.state.resume import own_checkpoints, refuse_to_go_back, restore_newest
from train.state.source import read_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a start begins with, besides the backend's state."""

    said: str
    """In words."""
    learning_rate: float
    """The one that was found when the run began, or else that of the settings."""
    progress: Progress = field(default_factory=Progress)
    saved_step: int | None = None
    """The step of the run's own checkpoint that it goes on from."""
    changes: Sequence[str] = ()
    """Since the checkpoint, in words."""
    passed_over: str = ""
    """In words, if what `--resume-from` names is not what the run goes on from."""


def put_at_origin(backend: Backend, data: Data, options: Options, run_dir: Path, automatic: Sequence[str]) -> Origin:
    """Load or draw weights and optimizer state; `automatic` names the settings that `auto` chose for this device."""
    own = own_checkpoints(backend, run_dir, options.resume_from)
    require_same(backend, f"checkpoints in {run_dir}", [path.name for _, path in own])
    if own and options.resume_from:
        refuse_to_go_back(options.resume_from, own)
    if own or options.resume_from:
        return _at_checkpoint(backend, data, options, run_dir, automatic, own)
    if options.init_from:
        backend.load_state(read_start(options.init_from, options.model))
        return Origin(f"Starting from the weights of {options.init_from}", options.learning_rate)
    backend.init(options.seed)
    return Origin(f"Starting from random weights with seed {options.seed}", options.learning_rate)


def _at_checkpoint(
    backend: Backend,
    data: Data,
    options: Options,
    run_dir: Path,
    automatic: Sequence[str],
    own: list[tuple[int, Path]],
) -> Origin:
    """Go on from the newest whole checkpoint of the run's `own`, or else the one that was asked for."""
    checkpoint, meta = restore_newest(backend, run_dir, own, options.resume_from)
    step = backend.steps_done
    try:
        if options.find_lr:
            options = _with_the_rate_found(options, float(meta["options"]["learning_rate"]))
        changes = changes_since(checkpoint, meta, options, automatic, data.identity, step)
        progress = Progress.stored(meta["progress"])
        before, now = meta.get("judged_by"), data.judged_by
        if before and now and before != now:
            changes.append("the rows that decide which state is the best, which is looked for anew")
            progress.forget_best()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: what it says of its run is not as this version writes it ({first_line(error)}); take "
            "an earlier one, or its weights alone with --init-from"
        ) from error

    asked, passed_over = options.resume_from, ""
    if asked is not None and not checkpoint.resolve().is_relative_to(asked.resolve()):
        passed_over = f" (not from --resume-from {asked}: the folder has checkpoints of its own)"
    said = f"Resuming from {checkpoint} at step {step}{passed_over}"
    saved_step = step if checkpoint in [path for _, path in own] else None
    if saved_step is None and options.spike_action == "rollback":
        begin_at(progress, step)
    return Origin(said, options.learning_rate, progress, saved_step, changes, passed_over)


def _with_the_rate_found(options: Options, found: float) -> Options:
    """The options with the learning rate that `--find-lr` found when the run began."""
    if options.allow_changed_settings and found != options.learning_rate:
        log.warning("--find-lr: the rate stays the %g that was found; leave it out to change the rate", found)
    return dataclasses.replace(options, learning_rate=found)
