"""Loss spikes: a run that diverges although its numbers stay finite.

A loss is a spike when it is above `--spike-factor` times the running median, that of the last `WINDOW` losses that were
none; so is a loss that is not finite. `--spike-steps` spikes in a row are a divergence. `--spike-action` says what
is done about it: `warn`, or `rollback` to the last good checkpoint. Its weights and moments are taken, while steps and
data go on: the batches since then are skipped, as a step that is not finite is, and no step is logged twice.

All that the next decision depends on is in `Progress`, and so in every checkpoint. Only checkpoints that the unbroken
run has too, those of `--checkpoint-interval`, of rollbacks and of where it began, are good ones: an interrupted run
must go back to the same.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from statistics import median
from typing import Any

from torch_ref.spec.interface import Backend, UserError
from train.run.options import Options
from train.run.progress import Progress
from train.state.source import load_checkpoint

WINDOW = 100
"""Losses that the median is of."""
LEAST = 20
"""With fewer losses there is no median to speak of."""
ROLLBACKS = 3
"""So often a run goes back to the same weights; then it stops."""


def diverged(progress: Progress, loss: float, options: Options) -> float | None:
    """Take note of a step's loss. Returns the running median if with this step the run counts as diverged: once for
    each row of spikes."""
    known = progress.recent_losses
    middle = median(known) if len(known) >= LEAST and options.spike_factor else None
    spike = middle is not None and not loss <= options.spike_factor * middle
    progress.spikes_in_a_row = progress.spikes_in_a_row + 1 if spike else 0
    # Once it was told of a row of spikes, the run may go on at that height.
    if math.isfinite(loss) and not 0 < progress.spikes_in_a_row <= options.spike_steps:
        progress.recent_losses = [*known, loss][-WINDOW:]
    return middle if progress.spikes_in_a_row == options.spike_steps else None


def good_step(progress: Progress, step: int, interval: int) -> int:
    """The latest step, up to `step`, whose checkpoint was written before the present row of spikes; 0 if there is
    none."""
    before = step - progress.spikes_in_a_row
    return max(before // interval * interval, progress.rolled_back_at)


def begin_at(progress: Progress, step: int) -> None:
    """Let a run that begins at another's checkpoint count it as a good one, unless it is within a row of spikes: one of
    its own is then written, as after a rollback."""
    if not progress.spikes_in_a_row and progress.rolled_back_at != step:
        progress.rolled_back_at, progress.rollbacks = step, 0


def roll_back(backend: Backend, folder: Path, good: int, progress: Progress) -> bool:
    """Take weights and moments from the checkpoint of step `good` in a folder, and count on from the present step.
    Returns False, having done nothing, if it is not there. Raises `UserError` naming one that is damaged."""
    step = backend.steps_done
    path = dict(backend.find(folder)).get(good)
    if path is None:
        return False
    try:
        load_checkpoint(backend, path)
    except UserError as error:
        raise UserError(f"--spike-action rollback: {error}") from error
    backend.load_state(dataclasses.replace(backend.state(), step=step))
    progress.rollbacks = progress.rollbacks + 1 if good == progress.rolled_back_at else 1
    progress.rolled_back_at = step
    progress.spikes_in_a_row = progress.skipped_in_a_row = 0  # of weights that are gone
    return True


def in_words(values: dict[str, Any], options: Options, good: int | None) -> str:
    """The warning; `good` is the step of the weights that the run was rolled back to."""
    message = (
        f"steps {values['begun']} to {values['step']} had losses above {options.spike_factor:g} x the median "
        f"{values['median']:.4f}"
    )
    if good is not None:
        return f"{message}: weights and moments are those of step {good} again, and the batches since then are skipped"
    if options.spike_action == "rollback":
        return f"{message}, and there is no checkpoint from before them to roll back to"
    return f"{message}: the run may have diverged (--spike-action rollback takes it back)"
