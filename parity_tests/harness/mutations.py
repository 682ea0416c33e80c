"""Faults planted in the torch side one at a time, to show that the ladder can fail, and where each one shows.

The faults, in the files `faults_*.py`, are those that public ports of such models have had, and those that would be
easiest to make here. Each is a context manager that patches the torch side: its weights, its functions or its
optimizer. Flax stays as it is and is computed once. A fault is caught by the first measurement beyond its bound, in the
order of the computation, which names the layer and module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import numpy as np

from parity_tests.harness import mutations, training
from parity_tests.harness.cases import TRACE_CASE, case_batch, case_values
from parity_tests.harness.ladder import compare
from parity_tests.harness.measure import Measurement, Outcome, Values, run_flax, run_torch

CASE = TRACE_CASE.at("float64")


@dataclass(frozen=True)
class Mutation:
    """A fault, and where it has to show first."""

    name: str
    rung: str
    where: str
    """A module, a parameter or a quantity; or what its name starts with, up to a dot."""
    plant: Callable[[], AbstractContextManager]

    def shows_at(self, measurement: Measurement | None) -> bool:
        """Whether this is where the fault has to show."""
        if measurement is None or measurement.rung != self.rung:
            return False
        return f"{measurement.where}.".startswith(f"{self.where}.")


MUTATIONS: list[Mutation] = []


def mutation(name: str, rung: str, where: str) -> Callable:
    """Registers a function that returns the context manager planting a fault."""

    def register(plant: Callable[[], AbstractContextManager]) -> Callable:
        MUTATIONS.append(Mutation(name, rung, where, plant))
        return plant

    return register


def torch_values() -> Values:
    """The weights torch is given: what `weights` patches."""
    return case_values(CASE.config)


def weights(change: Callable[[str, np.ndarray], np.ndarray]) -> AbstractContextManager:
    """Weights changed, by name, on their way into torch."""
    changed = [(row, change(row.name, value)) for row, value in case_values(CASE.config)]
    return mock.patch.object(mutations, "torch_values", lambda: changed)


@cache
def flax_outcome() -> Outcome:
    """What Flax makes of the case that faults are planted in."""
    return run_flax(CASE, case_values(CASE.config), *case_batch(CASE.config, CASE.rows, CASE.seq), trace=True)


@cache
def flax_steps() -> training.Steps:
    return training.injected_steps("flax", CASE.dtype)


def measure(rung: str) -> list[Measurement]:
    """The optimizer step, or all rungs before it, of torch as it now is."""
    if rung == "optimizer step":
        return training.compare_steps(CASE.dtype, training.injected_steps("torch", CASE.dtype), flax_steps())
    batch = case_batch(CASE.config, CASE.rows, CASE.seq)
    return compare(CASE, run_torch(CASE, mutations.torch_values(), *batch, trace=True), flax_outcome())


def first_failure(measurements: Iterable[Measurement]) -> Measurement | None:
    """What names the place: the first measurement beyond its bound, in the order of the computation."""
    return next((each for each in measurements if not each.passed), None)


def caught(planted: Mutation) -> Measurement | None:
    """The first measurement that a fault pushes beyond its bound; None if it goes unseen."""
    flax_outcome(), flax_steps()  # before the fault, which must not touch them
    with planted.plant():
        return first_failure(measure(planted.rung))


def survey() -> Iterator[tuple[Mutation, Measurement | None]]:
    """Every fault with what caught it."""
    from parity_tests.harness import faults_attention, faults_experts, faults_training  # noqa: F401 (they register their faults)

    for planted in MUTATIONS:
        yield planted, caught(planted)
