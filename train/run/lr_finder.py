"""A learning rate for a model and its data, by a sweep (Smith, "Cyclical Learning Rates", 2017): the rate grows
exponentially from step to step; the loss first stands still, then falls, then climbs. Good peak rates are where it
falls fastest, well before it turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.storage import write_errors
from train.data.feed import Data

LOWEST, HIGHEST = 1e-6, 1.0
SWEEP_STEPS = 100
DIVERGED = 1.3
"""The sweep ends where the smoothed loss is this many times the lowest one."""


@dataclass(frozen=True)
class Sweep:
    """Learning rates from `LOWEST` to `HIGHEST`, equal factors apart, over `SWEEP_STEPS` steps after `first_step`."""

    first_step: int

    def __call__(self, step: Any) -> Any:
        return LOWEST * (HIGHEST / LOWEST) ** ((step - self.first_step) / (SWEEP_STEPS - 1))


def find_learning_rate(
    backend: Backend, data: Data, picture: Path | None, say: Callable[[str], None], interrupted: Callable[[], bool]
) -> float | None:
    """Sweep over the first batches of `data`, draw loss against rate into `picture`, if there is to be one, and return
    the suggested rate; None if `interrupted`.

    The backend's whole state is afterwards what it was; its schedule is not, the caller sets it. The batches are
    read by an iterator of their own, so no position moves. Raises `UserError` if the loss never falls, or if
    the picture cannot be written.
    """
    say(f"Learning-rate finder: up to {SWEEP_STEPS} steps from {LOWEST:g} to {HIGHEST:g}, then back to the start")
    before = backend.snapshot()
    try:
        rates, losses = sweep(backend, data, interrupted)
    finally:
        backend.rollback(before)
    if interrupted():
        return None
    rate = suggestion(rates, losses)
    if picture:
        with write_errors(picture):
            draw(rates, losses, rate, picture)
    say(f"Learning-rate finder: suggests --learning-rate {rate:g}, used from here on; the sweep is drawn in {picture}")
    return rate


def sweep(backend: Backend, data: Data, interrupted: Callable[[], bool]) -> tuple[list[float], list[float]]:
    """Rates and losses of the steps until the loss climbs away."""
    backend.set_schedule(Sweep(backend.steps_done))
    rates: list[float] = []
    losses: list[float] = []
    with closing(data.batches(None)) as batches:
        for batch in itertools.islice(batches, SWEEP_STEPS):
            result = backend.step(batch.inputs, batch.targets)
            if interrupted() or not math.isfinite(result.loss):
                break
            rates.append(result.learning_rate)
            losses.append(result.loss)
            curve = smoothed(losses)
            if curve[-1] > DIVERGED * curve.min():
                break
    return rates, losses


def smoothed(losses: list[float], memory: float = 0.8) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    average, curve = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = memory * average + (1 - memory) * loss
        curve.append(average / (1 - memory**count))
    return np.array(curve)


def suggestion(rates: list[float], losses: list[float]) -> float:
    """The rate, to two digits, at which the smoothed loss falls fastest per factor of the rate."""
    if len(rates) < 10:
        raise UserError(f"--find-lr: only {len(rates)} steps had a finite loss; give --learning-rate")
    curve = smoothed(losses)
    lowest = int(curve.argmin())
    slope = np.gradient(curve, np.log(rates))[: lowest + 1]
    if lowest == 0 or slope.min() >= 0:
        raise UserError("--find-lr: the loss never falls; give --learning-rate")
    return float(f"{rates[int(slope.argmin())]:.1e}")


def draw(rates: list[float], losses: list[float], rate: float, picture: Path) -> None:
    from matplotlib.figure import Figure  # see `plot.py`

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, color="#9db7d5", linewidth=1, label="loss")
    axes.plot(rates, smoothed(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    axes.axvline(rate, color="#d1495b", linewidth=1.5, linestyle="--", label=f"suggestion {rate:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per token", title="Learning-rate finder")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
