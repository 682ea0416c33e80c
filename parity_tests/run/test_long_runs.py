"""What docs/long_runs.md tells: runs made longer, budgets, checkpoints by the clock, utilisation, traces."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.fakes import MODEL, small_options
from parity_tests.support.stage import Stage, kill_at
from torch_ref.spec.flops import bf16_peak, flops_per_token
from torch_ref.spec.interface import UserError
from train.run.changes import changes_since
from train.shell import COMPLETE


def test_more_extended_steps_go_on_from_a_complete_run(straight: Stage) -> None:
    assert straight.train(extended_steps=5) == COMPLETE
    assert straight.data.given == [15, 16]
    assert "step_final_17.npz" in straight.files("checkpoints")


WSD = {"lr_schedule": "wsd", "decay_steps": 4, "steps": 12, "extended_steps": 0, "keep_checkpoints": 1}


def test_a_run_with_a_stable_phase_is_extended_exactly(stage: Stage, tmp_path: Path) -> None:
    long = Stage(tmp_path / "long")
    long.train(**WSD | {"steps": 18})
    stage.train(**WSD)
    assert {"step_8.npz", "step_final_12.npz"} <= set(stage.files("checkpoints")), "the end of the stable phase is kept"
    with pytest.raises(
        UserError, match=r"--steps was 12, now 18.*decay has begun.*from 0\.01 to 0\.1 at step 13.*step 8"
    ):
        stage.train(**WSD | {"steps": 18})
    branch = Stage(tmp_path / "branch")
    branch.train(**WSD | {"steps": 18}, resume_from=stage.run_dir / "checkpoints" / "step_8.npz")
    assert "changed since the checkpoint: --steps was 12, now 18" in branch.text
    assert branch.losses() == long.losses()[8:]
    assert branch.records("step")[-1]["learning_rate"] == pytest.approx(0.01)
    assert "step_14.npz" in branch.files("checkpoints")


def test_a_refusal_says_where_earlier_checkpoints_are(tmp_path: Path) -> None:
    """Whatever `--resume-from` names: a run folder, a checkpoint in it, a neutral folder."""
    run, neutral = tmp_path / "run", tmp_path / "neutral"
    (run / "checkpoints").mkdir(parents=True)
    neutral.mkdir()
    (neutral / "state.json").touch()
    meta = {"options": small_options(**WSD).to_dict(), "data": {}}
    for checkpoint in (run, run / "checkpoints" / "step_final_12.npz", neutral):
        with pytest.raises(UserError) as refusal:
            changes_since(checkpoint, meta, small_options(**WSD | {"steps": 18}), [], {}, 12)
        where = "the former run" if checkpoint == neutral else run / "checkpoints"
        assert f"the checkpoint of step 8 or an earlier one in {where}, with" in str(refusal.value)


@pytest.mark.parametrize("profile_steps", ["", "16-17"])
def test_a_run_in_its_stable_phase_is_extended_where_it_is(stage: Stage, tmp_path: Path, profile_steps: str) -> None:
    long = Stage(tmp_path / "long")
    long.train(**WSD | {"steps": 18})
    stage.prepare(small_options(**WSD))
    stage.backend.before_step = kill_at(signal.SIGTERM, 6)
    assert stage.train() == 128 + signal.SIGTERM
    assert stage.train(**WSD | {"steps": 18}, profile_steps=profile_steps) == COMPLETE
    assert stage.losses() == long.losses()


@pytest.mark.parametrize("change", [{"steps": 18}, {"decay_steps": 2}], ids=str)
@pytest.mark.parametrize("at_step", [8, 9])
def test_a_run_is_extended_up_to_the_last_step_of_its_stable_phase(stage: Stage, change: dict, at_step: int) -> None:
    """The first step of the decay has used a rate that the longer run would not have."""
    stage.prepare(small_options(**WSD))
    stage.backend.before_step = kill_at(signal.SIGTERM, at_step)
    assert stage.train() == 128 + signal.SIGTERM
    if at_step == 8:
        assert stage.train(**WSD | change) == COMPLETE
        assert "Warning: changed since the checkpoint: --" in stage.text
    else:
        with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} was"):
            stage.train(**WSD | change)


def test_utilisation_is_a_share_of_a_known_peak(stage: Stage, straight: Stage) -> None:
    assert all("mfu" not in step for step in straight.records("step"))
    stage.backend.device = "2 x NVIDIA H100 80GB HBM3, jax 0.0, mesh data=1,fsdp=2,expert=1"
    assert stage.train() == COMPLETE
    for step in stage.records("step"):
        assert step["flops_per_second"] == pytest.approx(step["tokens_per_second"] * flops_per_token(MODEL, 8))
        assert step["mfu"] == pytest.approx(step["flops_per_second"] / 2 / 989.4e12)
        assert step["peak_memory_bytes"] == 1_500_000_000


def test_no_peak_is_guessed() -> None:
    assert bf16_peak("NVIDIA A100-SXM4-80GB, torch 2.9") == 312e12
    for device in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb, torch 2.9", "CPU (x86_64, 2 threads), torch 2.9", "Apple MPS"):
        assert bf16_peak(device) is None


def test_the_steps_asked_for_are_traced(stage: Stage, straight: Stage) -> None:
    assert stage.train(profile_steps="4-6") == COMPLETE
    trace = stage.run_dir / "profile" / "steps_4-6" / "trace.json.gz"
    assert trace.read_text() == "4 to 6"
    assert f"Profile of steps 4-6 written to: {trace} (open it at https://ui.perfetto.dev)" in stage.text
    assert stage.losses() == straight.losses()
    assert stage.train(extended_steps=5, profile_steps="4-6") == COMPLETE
    assert "--profile-steps 4-6: these steps are done already" in stage.text


def test_a_trace_ends_with_the_run(stage: Stage) -> None:
    stage.prepare(small_options(profile_steps="4-9"))
    stage.backend.before_step = kill_at(signal.SIGTERM, 6)
    assert stage.train() == 128 + signal.SIGTERM
    assert (stage.run_dir / "profile" / "steps_4-9" / "trace.json.gz").read_text() == "4 to 6"


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows what the list's one number says."""
    now = [0.0]
    monkeypatch.setattr("train.run.clock.monotonic", lambda: 60 * now[0])
    return now


def test_a_run_stops_when_its_time_is_up_and_goes_on(stage: Stage, straight: Stage, minutes: list[float]) -> None:
    for steps in (4, 8, 12):
        stage.prepare(small_options(max_minutes=4))
        stage.backend.before_step = lambda _: minutes.__setitem__(0, minutes[0] + 1)
        assert stage.train() == COMPLETE
        assert stage.records("end") == [{"kind": "end", "step": steps, "state": "time is up"}]
        assert f"Stopped after step {steps}: --max-minutes 4 have passed; the same command goes on" in stage.text
        assert f"step_{steps}.npz" in stage.files("checkpoints")
    assert stage.train() == COMPLETE
    assert stage.losses() == straight.losses() and stage.records("end")[0]["state"] == "complete"


def test_time_that_is_up_at_the_last_step_completes_the_run(stage: Stage, minutes: list[float]) -> None:
    stage.prepare(small_options(max_minutes=15))
    stage.backend.before_step = lambda _: minutes.__setitem__(0, minutes[0] + 1)
    assert stage.train() == COMPLETE
    assert stage.records("end")[0]["state"] == "complete"


def test_checkpoints_by_the_clock(stage: Stage, straight: Stage, minutes: list[float]) -> None:
    stage.prepare(small_options(checkpoint_minutes=2, checkpoint_interval=5))
    stage.backend.before_step = lambda _: minutes.__setitem__(0, minutes[0] + 1)
    assert stage.train() == COMPLETE
    # Two minutes after the last one, whatever that was for: steps 5, 10 by their number, 12 ends the main phase.
    steps = [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [
        path.stem.removeprefix("step_final_").removeprefix("step_")
        for path in stage.backend.saves
        if path.parent.name == "checkpoints"
    ] == [str(step) for step in steps]
    assert stage.losses() == straight.losses()


@pytest.mark.parametrize("profile_steps", ["", "20-22"])
def test_a_linear_schedule_says_why_it_is_not_extended(straight: Stage, profile_steps: str) -> None:
    with pytest.raises(
        UserError, match=r"--steps was 12, now 24.*jump from 0\.01 to 0\.0\d+ at step 16; more --extended"
    ):
        straight.train(steps=24, profile_steps=profile_steps)


def test_checkpoints_from_before_the_schedules_are_linear(straight: Stage) -> None:
    path = straight.run_dir / "checkpoints" / "step_final_15.npz"
    with np.load(path) as stored:
        values = dict(stored)
    meta = json.loads(str(values["meta"]))
    for name in ("lr_schedule", "decay_steps"):
        del meta["options"][name]
    np.savez(path, **values | {"meta": json.dumps(meta)})
    assert straight.train(extended_steps=5) == COMPLETE
