"""What a run says about itself before its first step: the model, the machine, the data, and the disk it will need."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.parameters import count_active_parameters, count_parameters
from torch_ref.spec.storage import size_in_words
from train.data.feed import Data
from train.data.options import HELD_OUT
from train.run.options import Options


def overview(options: Options, backend: Backend, data: Data, run_dir: Path) -> str:
    """A few lines for the log."""
    compute = backend.compute
    parameters, active = count_parameters(options.model), count_active_parameters(options.model)
    tokens = options.batch_size * options.seq_len
    return (
        f"Model: {options.preset}, {parameters:,} parameters, {active:,} of them active per token\n"
        f"Device: {backend.device}; {backend.framework}, {compute.dtype}, attention {compute.attention}, "
        f"experts {compute.moe}, rematerialisation {compute.remat}\n"
        f"Data: {', '.join(options.dataset)}, tokenizer {options.tokenizer} of {data.tokenizer.vocab_size:,} tokens, "
        f"{len(data.validation[0])} validation rows\n"
        f"{own_validations(data)}"
        f"{''.join(f'Data: {note}{chr(10)}' for note in data.notes)}"
        f"Batch: {options.batch_size} x {options.seq_len} = {tokens:,} tokens a step, accumulated over "
        f"{options.micro_batches} batches\n"
        f"{disk_estimate(options, run_dir)}"
    )


def own_validations(data: Data) -> str:
    """A line for each validation dataset."""
    own = {name: validation for name, validation in data.validations.items() if name != HELD_OUT}
    return "".join(f"Validation dataset {name}: {len(rows.inputs)} rows\n" for name, (rows, _) in own.items())


class CheckpointSpace(NamedTuple):
    """The disk space of a run's checkpoints, in bytes."""

    count: int
    """Whole states at the same time, the best one not counted."""
    each: int
    best: bool
    """Whether there is a best one besides, of which two exist while it is written."""
    total: int
    """All of them, and the final weights."""


def checkpoint_space(options: Options) -> CheckpointSpace:
    """Weights and two moments for each checkpoint that the settings ask for."""
    interval, last = options.checkpoint_interval, options.total_steps
    ends = {options.steps, options.stable_steps or last, last}
    besides = {step for step in ends if step % interval or step == last}
    checkpoints = (last - 1) // interval + len(besides)
    if options.keep_checkpoints:
        # The oldest one goes when the new one is whole.
        kept = options.keep_checkpoints + (options.stable_steps is not None)
        checkpoints = min(checkpoints, kept + 1)
    best = options.eval_interval > 0 and options.validates
    weights = count_parameters(options.model) * (8 if options.dtype == "float64" else 4)
    return CheckpointSpace(checkpoints, 3 * weights, best, weights * (3 * (checkpoints + 2 * best) + 1))


def disk_estimate(options: Options, run_dir: Path) -> str:
    """The space that all checkpoints will take, weights and two moments each, and whether the disk has it."""
    space = checkpoint_space(options)
    present = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    room = shutil.disk_usage(run_dir).free + present
    estimate = f"Disk: {space_in_words(space)}; there is room for {size_in_words(room)}"
    if options.checkpoint_minutes and not options.keep_checkpoints:
        estimate += "; those of --checkpoint-minutes come on top, --keep-checkpoints N keeps only the latest N"
    if space.total > room:
        estimate += "\nWarning: that is not enough; --keep-checkpoints N keeps only the latest N"
    return estimate


def space_in_words(space: CheckpointSpace) -> str:
    best = ", the best one" if space.best else ""
    each, total = size_in_words(space.each), size_in_words(space.total)
    return f"{space.count} checkpoints of {each}{best} and the final weights take up to {total}"


def require_disk(options: Options, run_dir: Path) -> None:
    """Raises `UserError` if the disk has no room for even one more checkpoint."""
    needed = 3 * count_parameters(options.model) * (8 if options.dtype == "float64" else 4)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"--run-dir {run_dir}: no space left: a checkpoint takes {size_in_words(needed)}, there is room for "
            f"{size_in_words(free)}; make room, or choose another folder"
        )


def phase_line(options: Options, step: int) -> str:
    """What comes after `step` steps: the main or the extended phase."""
    if step >= options.steps:
        rate = options.schedule(options.steps)
        return f"Extended phase: steps {step + 1} to {options.total_steps}, learning rate {rate:g}"
    stable = options.stable_steps
    decay = f", which decays after step {stable}" if stable else ""
    return f"Main phase: steps {step + 1} to {options.steps}, learning rate up to {options.learning_rate:g}{decay}"
