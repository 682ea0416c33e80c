"""The learning rate: its corner points, every step, and what a longer run shares with a shorter one."""

from __future__ import annotations

import pytest

from train.run.schedule import Schedule

FULL = Schedule(peak=0.003, warmup_steps=500, steps=10_000)


def by_hand(number: int, peak: float, warmup: int, steps: int) -> float:
    """Rate of update `number` (from 1)."""
    if number < warmup:
        return peak * number / warmup
    if number < steps:
        return peak * (1 - 0.9 * (number - warmup) / (steps - warmup))
    return peak * 0.1


def test_corner_points() -> None:
    assert FULL(0) == pytest.approx(0.003 / 500, rel=1e-15)
    assert FULL(249) == pytest.approx(0.0015, rel=1e-15)
    assert FULL(499) == 0.003 == max(FULL(step) for step in range(10_100))
    assert FULL(5249) == pytest.approx(0.003 * 0.55, rel=1e-14)
    assert FULL(9998) > FULL(9999)
    assert [FULL(step) for step in range(9999, 10_100)] == pytest.approx([0.0003] * 101, rel=1e-15)


@pytest.mark.parametrize(("warmup", "steps"), [(500, 10_000), (1, 3), (0, 5), (3, 3), (1, 1)])
def test_every_step(warmup: int, steps: int) -> None:
    schedule = Schedule(0.01, warmup, steps)
    for number in range(1, min(steps, 2000) + 4):
        assert schedule(number - 1) == pytest.approx(by_hand(number, 0.01, max(warmup, 1), steps), rel=1e-13), number


def test_a_warm_up_longer_than_the_main_phase_is_cut() -> None:
    assert [Schedule(1.0, 40, 4)(step) for step in range(6)] == [0.25, 0.5, 0.75, pytest.approx(0.1)] + [
        pytest.approx(0.1)
    ] * 2


def test_warm_up_stable_decay() -> None:
    rates = [Schedule(1.0, 4, 20, decay_steps=5)(step) for step in range(23)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:15] == [1.0] * 12
    assert rates[15:20] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1], rel=1e-14)
    assert rates[20:] == pytest.approx([0.1] * 3, rel=1e-15)


def test_a_longer_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    short, long = Schedule(0.01, 4, 20, decay_steps=5), Schedule(0.01, 4, 200, decay_steps=50)
    assert all(short(step) == long(step) for step in range(15)) and short(15) < long(15)


def test_a_decay_as_long_as_the_main_phase_is_the_linear_schedule() -> None:
    assert all(Schedule(0.01, 4, 20, decay_steps=20)(step) == Schedule(0.01, 4, 20)(step) for step in range(30))
