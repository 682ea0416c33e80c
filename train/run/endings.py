"""How a run ends: what its log calls the state, what it says, and with which exit code."""

from __future__ import annotations

import signal
from typing import NamedTuple

from train.run.spikes import ROLLBACKS
from train.shell import COMPLETE, FAILED


class Ending(NamedTuple):
    state: str
    message: str
    code: int
    """A signal's is its number and 128: Ctrl-C 130, SIGTERM 143."""


def complete(outcome: str) -> Ending:
    return Ending("complete", f"The run is complete: {outcome}", COMPLETE)


def interrupted(step: int, number: int, why: str | None) -> Ending:
    """By a signal of this number, or by what stands for it."""
    why = why or f"by {signal.Signals(number).name}"
    return Ending("interrupted", f"Stopped {why} after step {step}; the same command goes on from there", 128 + number)


def time_is_up(step: int, minutes: float) -> Ending:
    message = f"Stopped after step {step}: --max-minutes {minutes:g} have passed; the same command goes on from there"
    return Ending("time is up", message, COMPLETE)


def not_finite(step: int, skipped: int) -> Ending:
    """Too many updates in a row were skipped."""
    return Ending(
        "diverged",
        f"Stopped at step {step}: loss or gradient was not finite in {skipped} steps in a row. The checkpoint holds "
        f"the weights of the last good step, {step - skipped}. The same command tries on with new data; a lower "
        "--learning-rate (with --allow-changed-settings) or --dtype float32 may help",
        FAILED,
    )


def spiking(step: int) -> Ending:
    """Going back again would go on for ever: the batches are not what it is that makes the run diverge."""
    return Ending(
        "diverged",
        f"Stopped at step {step}: the loss rose again after each of {ROLLBACKS} rollbacks to the same weights, which "
        "the checkpoint holds. The same command tries on with new data; a lower --learning-rate (with "
        "--allow-changed-settings) may help",
        FAILED,
    )


def without_data(step: int, error: Exception | None) -> Ending:
    why = error or "another process cannot read its data, and says why"
    return Ending("data error", f"Stopped at step {step}: {why}", FAILED)
