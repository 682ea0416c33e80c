"""Several processes train as one does: the same losses, stopped together, restarted with another number of them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="processes are JAX's")

from parity_tests.support.processes import MAIN, differences, settings, started
from torch_ref.spec.storage import TensorReader
from train.run.runlog import read_metrics

BOUND = 1e-10
LOST = "has ended or cannot be reached"


def weights(run_dir: Path) -> dict[str, np.ndarray]:
    reader = TensorReader(run_dir / "deepseek_final.safetensors")
    return {name: reader[name] for name in reader}


def assert_same_run(run_dir: Path, other: Path) -> None:
    worst = differences(run_dir, other)
    assert len(worst) == 4 and max(worst.values()) < BOUND, worst
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=BOUND * np.abs(theirs[name]).max())


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with started(settings(folder), folder / "straight", 1) as run:
        assert run.codes() == [0], run.said(0)
    return run.run_dir


@pytest.fixture
def straight(straight_run: Path, tmp_path: Path) -> Path:
    """The run of one process on one device; its settings, for others, in the test's folder."""
    shutil.copy(straight_run.parent / "settings.toml", tmp_path)
    return straight_run


CHECKED = """
from flax_model.backend import FlaxBackend
from flax_model.self_check import self_checked
FlaxBackend._checked = lambda self, compute: self_checked(compute, self._device, self.model_config)
"""
"""As on GPUs."""


def test_two_processes_are_stopped_and_killed_and_one_goes_on(tmp_path: Path, straight: Path) -> None:
    config, run_dir = tmp_path / "settings.toml", tmp_path / "run"
    with started(config, run_dir, 2, program=CHECKED + MAIN) as run:
        run.wait_for_step(3)
        run.processes[1].send_signal(signal.SIGTERM)  # only to one that does not write
        assert run.codes() == [143, 143], run.said(0) + run.said(1)
        assert run.said(1) == "", "only process 0 says anything"
        assert "Stopped by SIGTERM after step" in run.said(0) and "2 processes" in run.said(0)
    with started(config, run_dir, 2) as run:
        run.wait_for_step(8)
        run.processes[1].kill()
        assert run.codes(60)[0] not in (0, None), run.said(0)
        assert run.said(0).splitlines()[-1].startswith("error: ") and run.said(0).count(LOST) == 1
    with started(config, run_dir, 1) as run:
        assert run.codes() == [0], run.said(0)
        assert "Resuming from" in run.said(0)
    assert_same_run(run_dir, straight)


LATE = """
import time
from flax_model import processes
from train.run import loop

processes.SHUTDOWN = 5
draw = loop.plot_runs
loop.plot_runs = lambda *given: (time.sleep(12), draw(*given))[1]
"""


def test_four_processes_give_the_run_of_one(tmp_path: Path, straight: Path) -> None:
    """Also where the first one is at its last files for longer than JAX waits for it."""
    with started(tmp_path / "settings.toml", tmp_path / "run", 4, program=LATE + MAIN) as run:
        assert run.codes(300) == [0] * 4, run.said(0)
        assert [run.said(number) for number in (1, 2, 3)] == [""] * 3
    assert_same_run(run.run_dir, straight)


@pytest.mark.parametrize("option", ["--resume-from", pytest.param("--init-from", marks=pytest.mark.slow)])
def test_two_processes_begin_from_a_checkpoint_of_flax(tmp_path: Path, straight: Path, option: str) -> None:
    """What it says of its settings is read before they are joined."""
    origin = straight / "checkpoints/step_9"
    with started(tmp_path / "settings.toml", tmp_path / "run", 2, 1, option, str(origin)) as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
        assert run.said(1) == ""
    if option == "--init-from":
        assert "Starting from the weights of" in run.said(0)
        return
    ours, theirs = (
        {record["step"]: record["loss"] for record in read_metrics(each) if record["kind"] == "step"}
        for each in (run.run_dir, straight)
    )
    assert list(ours) == [10, 11, 12]
    np.testing.assert_allclose(list(ours.values()), [theirs[step] for step in ours], rtol=BOUND)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_and_devices(tmp_path: Path, straight: Path) -> None:
    config, run_dir = tmp_path / "settings.toml", tmp_path / "run"
    for step, (count, devices, mesh) in {
        2: (1, 8, "data=2,fsdp=2,expert=2"),
        4: (2, 2, "fsdp=2,expert=2"),
        6: (1, 1, "auto"),
        8: (4, 1, "expert=4"),
    }.items():
        with started(config, run_dir, count, devices, "--mesh", mesh) as run:
            run.wait_for_step(step)
            run.processes[-1].send_signal(signal.SIGTERM)
            assert run.codes(300) == [143] * count, run.said(0)
    with started(config, run_dir, 2, 1, "--mesh", "data=2") as run:
        assert run.codes(300) == [0, 0], run.said(0)
    assert_same_run(run_dir, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "what"), [(0, "SIGKILL"), (1, "SIGSTOP"), (0, "SIGSTOP")])
def test_others_end_with_a_process_that_is_gone_or_hangs(tmp_path: Path, number: int, what: str) -> None:
    with started(settings(tmp_path, steps=10_000), tmp_path / "run", 2) as run:
        run.wait_for_step(5)
        run.processes[number].send_signal(getattr(signal, what))
        other = 1 - number
        assert run.processes[other].wait(60) != 0, run.said(other)
        run.wait_for_a_word(other)
        assert run.said(other).splitlines()[-1].startswith("error: ") and run.said(other).count(LOST) == 1
        assert other == 0 or run.said(1).count("\n") == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_is_damaged_for_all(tmp_path: Path, straight: Path) -> None:
    config, run_dir = tmp_path / "settings.toml", tmp_path / "run"
    with started(config, run_dir, 2) as run:
        run.wait_for_step(7)
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.codes() == [143, 143], run.said(0)
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    (largest, *_) = sorted(newest.glob("state/ocdbt.process_1/d/*"), key=lambda path: -path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])  # of the shards of process 1
    with started(config, run_dir, 2) as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
        assert f"{newest.name}.damaged" in run.said(0) and "Resuming from" in run.said(0)
        assert run.said(1) == ""
    assert_same_run(run_dir, straight)


FAILING = """
import sys

from train.data import packing, prefetch
from train.data.corpus import DataError

made, Batch = [], packing.Batch
def batch(*fields, **named):
    made.append(1)
    if len(made) > 8 and "--process-id 1" in " ".join(sys.argv):
        raise DataError("text.jsonl: it is gone")
    return Batch(*fields, **named)
packing.Batch = batch
"""
AHEAD = """
from flax_model.backend import FlaxBackend
FlaxBackend.runs_ahead = True
"""


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_text_that_one_cannot_read_stops_all_with_a_checkpoint(tmp_path: Path, straight: Path, ahead: bool) -> None:
    config, run_dir = tmp_path / "settings.toml", tmp_path / "run"
    with started(config, run_dir, 2, program=AHEAD * ahead + FAILING + MAIN) as run:
        assert run.codes() == [2, 2], run.said(0) + run.said(1)
        assert run.said(1) == "error: process 1: text.jsonl: it is gone\n"
        assert "Stopped at step 8: another process cannot read its data" in run.said(0)
    with started(config, run_dir, 2, program=AHEAD * ahead + MAIN) as run:
        assert run.codes() == [0, 0], run.said(0)
        assert "at step 8" in run.said(0)
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_signals_stop_devices_that_run_ahead_at_one_step(tmp_path: Path, straight: Path) -> None:
    config, run_dir = tmp_path / "settings.toml", tmp_path / "run"
    with started(config, run_dir, 2, program=AHEAD + MAIN) as run:
        run.wait_for_step(4)
        run.processes[1].send_signal(signal.SIGINT)
        assert run.codes() == [130, 130], run.said(0)
    with started(config, run_dir, 2, program=AHEAD + MAIN) as run:
        assert run.codes() == [0, 0], run.said(0)
    assert_same_run(run_dir, straight)


WRONG_ROWS = """
import jax, flax_model.backend as backend

given = backend.from_host
def first_rows(tree, sharding):
    rows = jax.local_device_count()
    return jax.tree.map(lambda leaf: given(leaf[:, :rows].repeat(2, 1) if leaf.ndim == 3 else leaf, sharding), tree)
backend.from_host = first_rows
"""


@pytest.mark.slow
def test_a_process_that_trains_on_rows_of_another_shows(tmp_path: Path, straight: Path) -> None:
    with started(tmp_path / "settings.toml", tmp_path / "run", 2, program=WRONG_ROWS + MAIN) as run:
        assert run.codes() == [0, 0], run.said(0)
    try:
        worst = differences(run.run_dir, straight)
    except AssertionError:
        return  # counts of experts differ
    assert worst["step loss"] > 1e-4


@pytest.mark.slow
def test_the_learning_rate_is_found_together(tmp_path: Path) -> None:
    config = settings(tmp_path, find_lr=True, steps=3, extended_steps=0)
    for name, count in (("one", 1), ("two", 2)):
        with started(config, tmp_path / name, count, 1, "--find-lr") as run:
            assert run.codes(300) == [0] * count, run.said(0)
            assert "Learning-rate finder: suggests" in run.said(0)
    worst = differences(tmp_path / "two", tmp_path / "one")
    assert max(worst.values()) < BOUND, worst


@pytest.mark.slow
def test_a_run_that_diverges_is_rolled_back_together(tmp_path: Path) -> None:
    """Every loss above the one before counts as a spike, so that there is something to go back for."""
    config = settings(tmp_path, spike_factor=1.001, spike_steps=1, spike_action="rollback")
    codes, soon = {}, "import train.run.spikes as spikes\nspikes.LEAST = spikes.WINDOW = 1\n"
    for name, count in (("one", 1), ("two", 2)):
        with started(config, tmp_path / name, count, program=soon + MAIN) as run:
            codes[name] = set(run.codes(300))
            assert "weights and moments are those of step" in run.said(0)
    assert codes["one"] == codes["two"] and len(codes["two"]) == 1
    worst = differences(tmp_path / "two", tmp_path / "one")
    assert max(worst.values()) < BOUND, worst


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from torch_ref.train import main

    config = settings(tmp_path, steps=6)
    with started(config, tmp_path / "run", 2) as run:
        assert run.codes() == [0, 0], run.said(0)
    resumed = tmp_path / "torch"
    argv = [
        "--config",
        str(config),
        "--run-dir",
        str(resumed),
        "--resume-from",
        str(run.run_dir / "checkpoints/step_3"),
    ]
    assert main(argv) == 0
    ours, theirs = (
        [(r["step"], r["loss"]) for r in read_metrics(each) if r["kind"] == "step"] for each in (run.run_dir, resumed)
    )
    assert [step for step, _ in theirs] == [4, 5, 6, 7, 8]
    np.testing.assert_allclose([loss for _, loss in theirs], [loss for _, loss in ours[3:]], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("settings", "sys.argv += ['--seed', str(os.getpid())]"),
        ("validation rows", "os.chdir(sys.argv[sys.argv.index('--process-id') + 1])"),
    ],
)
def test_processes_that_are_not_alike_are_refused(what: str, difference: str, tmp_path: Path, monkeypatch) -> None:
    config = settings(tmp_path, validation_dataset=("own=own.txt",))
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate((".", "0", "1")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "own.txt").write_text("the model reads a row of tokens. " * 9**number)
    with started(config, tmp_path / "run", 2, program=f"import os, sys; {difference}; {MAIN}") as run:
        assert run.codes() == [2, 2], run.said(0)
        for number in (0, 1):
            assert f"the {what} are not the same in all 2 processes" in run.said(number)
