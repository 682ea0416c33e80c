"""Runs with settings and interruptions drawn at random, against the same run undisturbed: numbers, texts, checkpoints
and the last word are the same, and nothing is left to do afterwards."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.kills import numbers
from parity_tests.run.test_running_ahead import AheadBackend
from parity_tests.run.test_saving import SlowDisk
from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage
from train.run import runlog
from train.shell import COMPLETE

RUNS = int(os.environ.get("RANDOM_RUNS", "40"))
"""The same ones each time; with RANDOM_RUNS=2000 in the environment so many."""


class PowerCut(BaseException):
    """What no part of the run handles."""


def drawn(draw: random.Random) -> dict:
    return {
        "steps": draw.choice([6, 12, 30]),
        "extended_steps": draw.choice([0, 3]),
        "checkpoint_interval": draw.choice([1, 3, 5, 100]),
        "eval_interval": draw.choice([1, 4, 5]),
        "sample_interval": draw.choice([0, 2, 5]),
        "patience": draw.choice([0, 1, 2, 3]),
        "min_delta": draw.choice([0.0, 0.05]),
        "keep_checkpoints": draw.choice([0, 1, 2]),
        "spike_action": draw.choice(["warn", "rollback"]),
        "spike_steps": draw.choice([1, 3]),
        "learning_rate": draw.choice([0.1, 1e-3, 1e-4]),
    }


def begin(folder: Path, settings: dict, backend: type[FakeBackend], spikes: set[int]) -> Stage:
    stage = Stage(folder, small_options(**settings))
    stage.backend = backend(stage.options)

    def before_step(step: int) -> None:
        if step in spikes:
            stage.backend._weights = stage.backend._weights * 8

    stage.backend.before_step = before_step
    return stage


def disturb(stage: Stage, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that a signal stops, or that ends with half a line written, before or after a checkpoint."""
    left = draw.randint(1, 15)

    def at_last(act: Callable[[], None], function: Callable) -> Callable:
        def counting(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                act()
            return function(*arguments, **named)

        return counting

    def stop() -> None:
        os.kill(os.getpid(), draw.choice([signal.SIGINT, signal.SIGTERM]))

    def cut() -> None:
        raise PowerCut

    where = draw.choice(["before_step", "evaluate", "generate", "save", "power at save", "power at a line"])
    with monkeypatch.context() as patch:
        if where == "power at a line":
            write = runlog._write

            def half(file, line: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    file.write(line[: len(line) // 2])
                    cut()
                write(file, line)

            patch.setattr(runlog, "_write", half)
        elif where == "power at save":
            stage.backend.save = at_last(cut, stage.backend.save)
        else:
            setattr(stage.backend, where, at_last(stop, getattr(stage.backend, where)))
        try:
            assert stage.train() in (COMPLETE, 130, 143)
        except PowerCut:
            pass


@pytest.mark.parametrize("seed", range(RUNS))
def test_whatever_happens_the_run_is_the_same(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("train.run.loop.plot_runs", lambda runs, picture: picture)
    draw = random.Random(seed)
    settings, backend = drawn(draw), draw.choice([FakeBackend, SlowDisk, AheadBackend])
    spikes = {draw.randint(1, 30) for _ in range(draw.randint(0, 2))}
    straight = begin(tmp_path / "straight", settings, backend, spikes)
    assert straight.train() == COMPLETE
    for _ in range(draw.randint(1, 4)):
        disturb(begin(tmp_path / "run", settings, backend, spikes), draw, monkeypatch)
    stage = begin(tmp_path / "run", settings, backend, spikes)
    assert stage.train() == COMPLETE
    assert numbers(stage.run_dir) == numbers(straight.run_dir)
    for kind in ("validation", "sample", "spike", "end"):
        assert stage.records(kind) == straight.records(kind)
    assert stage.files("checkpoints")[-1] == straight.files("checkpoints")[-1]
    assert stage.files("best") == straight.files("best")
    found = [np.load(each.run_dir / "deepseek_final.npy") for each in (stage, straight)]
    assert np.array_equal(*found)
    capsys.readouterr()
    assert begin(stage.run_dir, settings, backend, spikes).train() == COMPLETE
    assert "Nothing is left to do" in capsys.readouterr().out
