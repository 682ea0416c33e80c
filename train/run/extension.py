"""Making a run longer, or shorter, than it was meant to be: when that changes none of the steps that are done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from train.run.options import Options

LENGTH = ("steps", "decay_steps")
"""Settings by which a schedule with a stable phase grows."""


def former(stored: dict[str, Any], options: Options) -> Options:
    """The options with the length that a checkpoint's `Options.to_dict()` has; without steps to trace, which may lie
    beyond it."""
    steps, decay = stored["steps"], stored.get("decay_steps", "auto") if options.lr_schedule == "wsd" else "auto"
    return dataclasses.replace(options, steps=steps, decay_steps=decay, profile_steps="")


def extends(stored: dict[str, Any], options: Options, step: int) -> bool:
    """Whether a run that has done `step` steps by the checkpoint's length is also one of the length in `options`: its
    schedule has a stable phase, and every update so far used the rate that the new schedule gives it."""
    if options.lr_schedule != "wsd" or stored.get("lr_schedule") != "wsd":
        return False
    before, now = former(stored, options).schedule, options.schedule
    return all(before(done) == now(done) for done in range(step))


def why_not(stored: dict[str, Any], options: Options, step: int, checkpoints: Path | str) -> str:
    """For the refusal of another length: what would happen to the learning rate, and what to do instead; nothing if
    the length is the same."""
    if stored["steps"] == options.steps or options.lr_schedule != stored.get("lr_schedule", "linear"):
        return ""
    before = former(stored, options)
    rates = f"from {before.schedule(max(step - 1, 0)):g} to {options.schedule(step):g} at step {step + 1}"
    if options.lr_schedule == "linear":
        return (
            f" (--lr-schedule linear falls over all of --steps: the rate would jump {rates}; more --extended-steps go "
            "on at the final rate, and --lr-schedule wsd is for runs that will be extended)"
        )
    end = min(before.stable_steps, options.stable_steps)
    return (
        f" (the decay has begun: the rate would jump {rates}; go on from where both lengths agree: --resume-from the "
        f"checkpoint of step {end} or an earlier one in {checkpoints}, with another --run-dir)"
    )
