"""The learning-rate finder: its sweep, its suggestion, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.fakes import FakeBackend, FakeData, small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.interface import UserError
from train.run.lr_finder import HIGHEST, LOWEST, SWEEP_STEPS, Sweep, find_learning_rate, suggestion, sweep
from train.shell import FAILED


def test_the_sweep_is_exponential() -> None:
    sweep = Sweep(first_step=7)
    rates = [sweep(step) for step in range(7, 7 + SWEEP_STEPS)]
    assert rates[0] == LOWEST and rates[-1] == pytest.approx(HIGHEST, rel=1e-12)
    assert np.allclose(np.diff(np.log(rates)), np.log(HIGHEST / LOWEST) / (SWEEP_STEPS - 1))


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = [Sweep(0)(step) for step in range(SWEEP_STEPS)]
    # Falls around 1e-3 by a logistic curve, climbs steeply after 1e-1.
    losses = [9 - 5 / (1 + (1e-3 / rate) ** 2) + max(0, math.log(rate / 0.1)) * 4 for rate in rates]
    # Per factor of the rate it falls fastest at 1e-3 (per unit of it, sooner); the average lags by up to 4 steps.
    assert 1e-3 < suggestion(rates, losses) < 1e-3 * (rates[4] / rates[0])
    # How fast it comes down again from a climb says nothing.
    again = [*losses[:80], *[20.0] * 10, *[6.0] * 10]
    assert suggestion(rates, again) == suggestion(rates, losses)
    with pytest.raises(UserError, match="the loss never falls"):
        suggestion(rates, [1 + rate for rate in rates])
    with pytest.raises(UserError, match="only 3 steps had a finite loss"):
        suggestion(rates[:3], losses[:3])


def test_it_leaves_no_trace_and_training_uses_the_rate(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "found", small_options(find_lr=True))
    assert stage.train() == 0
    found = float(stage.text.split("suggests --learning-rate ")[1].split(",")[0])
    assert found != stage.options.learning_rate
    assert f"learning rate up to {found:g}\n" in stage.text and stage.text.count("learning rate up to") == 1
    assert (stage.run_dir / "lr_finder.png").stat().st_size > 10_000
    assert f"learning_rate = {found}" in (stage.run_dir / "settings.toml").read_text()

    plain = Stage(tmp_path / "plain", small_options(learning_rate=found))
    assert plain.train() == 0
    assert stage.losses() == plain.losses()
    ours, theirs = stage.records("step"), plain.records("step")
    assert ours[0]["learning_rate"] == found / 3
    for name in ("learning_rate", "data_position", "tokens_seen"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]


def test_a_resumed_run_keeps_the_rate_it_found(tmp_path: Path) -> None:
    straight = Stage(tmp_path / "straight", small_options(find_lr=True))
    assert straight.train() == 0
    stage = Stage(tmp_path / "stopped", small_options(find_lr=True))

    def stop_in_training(number: int) -> None:
        if stage.run_dir.joinpath("lr_finder.png").exists():
            kill_at(2, 6)(number)

    stage.backend.before_step = stop_in_training
    assert stage.train() == 130
    assert stage.train(find_lr=True, allow_changed_settings=True, learning_rate=1e-4) == 0
    assert "Warning: --find-lr: the rate stays the" in stage.text and "that was found; leave it out" in stage.text
    assert stage.losses() == straight.losses()
    assert stage.data.given == list(range(6, 15))  # no second sweep


def test_a_sweep_ends_where_the_loss_explodes(tmp_path: Path) -> None:
    options = small_options(find_lr=True)
    backend, data, said = FakeBackend(options), FakeData(options), []
    backend.init(0)
    backend.broken_steps = {60}
    before = backend.snapshot()
    rate = find_learning_rate(backend, data, tmp_path / "sweep.png", said.append, lambda: False)
    assert LOWEST < rate < HIGHEST and len(data.given) == 60 and data.closed == 1
    after = backend.snapshot()
    assert np.array_equal(before[0], after[0]) and before[1] == after[1] == 0
    assert f"--learning-rate {rate:g}" in said[-1] and str(tmp_path / "sweep.png") in said[-1]


def test_a_sweep_ends_where_the_loss_climbs_above_its_lowest() -> None:
    """Also where it is still far below the first one."""
    options = small_options(find_lr=True)
    backend, losses = FakeBackend(options), [*np.linspace(10, 1, 50).tolist(), *[5.0] * 50]
    backend.init(0)
    step = backend.step
    backend.step = lambda *rows: dataclasses.replace(step(*rows), loss=losses[backend.steps_done - 1])
    assert sweep(backend, FakeData(options), lambda: False)[1] == losses[:51]


def test_the_state_comes_back_when_the_sweep_fails(tmp_path: Path) -> None:
    options = small_options()
    backend, data = FakeBackend(options), FakeData(options)
    backend.init(0)
    before = backend.snapshot()
    data.fails_at = 20
    with pytest.raises(UserError, match="fell under the table"):
        find_learning_rate(backend, data, tmp_path / "sweep.png", print, lambda: False)
    assert np.array_equal(before[0], backend.snapshot()[0])


def test_a_signal_ends_the_sweep_and_trains_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run", small_options(find_lr=True))
    stage.backend.before_step = kill_at(2, 6)
    assert stage.train() == 130
    assert len(stage.data.given) == 6 and stage.backend.steps_done == 0
    assert not (stage.run_dir / "checkpoints").exists() and stage.records("step") == []
    assert stage.records("end") == [{"kind": "end", "step": 0, "state": "interrupted"}]


def test_text_that_cannot_be_read_ends_the_sweep(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run", small_options(find_lr=True))
    stage.data.fails_at = 20
    assert stage.train() == FAILED
    assert stage.records("end") == [{"kind": "end", "step": 0, "state": "data error"}]


def test_a_sweep_without_a_rate_fails(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run", small_options(find_lr=True))
    stage.backend.broken_steps = {5}
    with pytest.raises(UserError, match="only 4 steps had a finite loss"):
        stage.train()
    assert stage.records("end") == [{"kind": "end", "step": 0, "state": "failed"}]


def test_a_sweep_that_cannot_be_drawn_fails(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "run", small_options(find_lr=True))
    (stage.run_dir / "lr_finder.png").mkdir(parents=True)
    with pytest.raises(UserError, match="lr_finder.png: could not be written: Is a directory"):
        stage.train()
    assert stage.records("end")[0]["state"] == "failed"
