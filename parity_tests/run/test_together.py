"""What one of several processes does by itself, and what it does as the others wish."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from parity_tests.support.fakes import FakeBackend, small_options
from parity_tests.support.stage import Stage
from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import ENDED
from torch_ref.spec.processes import Processes
from train.run.launch import launch
from train.run.together import Wishes, first_by_the_writer, require_same
from train.shell import FAILED

SERVICE = (
    "E1127 14:22:55.873678   12283 coordination_service.cc:1549] Use error polling to propagate the following error\n"
)
POLLED = "E1127 14:22:55.874155   12321 coordination_service_agent.cc:289] Polled an error from coordination service.\n"
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\nThe tasks have crashed.\n"
FATAL = "F1127 14:25:18.419451   13724 client.h:80] Terminating process because the JAX distributed service failed: "
STACK = "*** Check failure stack trace: ***\n    @     0x7f5499a40634  absl::lts_20260107::SendToLog()\n"
OWN = "Warning: row 7 has no text\nerror: --seed -1: must not be negative\n"


class Peer(FakeBackend):
    """One of two processes; `other` says what the other one wishes after each of its questions."""

    processes = Processes(2, 1)
    other: Callable[[int], Sequence[int]] = staticmethod(lambda asked: ())
    asked = 0

    def agree(self, wishes: Sequence[int]) -> Callable[[], list[int]]:
        self.asked += 1
        other = list(self.other(self.asked)) + [-(2**31)] * len(wishes)
        answer = [max(pair) for pair in zip(wishes, other, strict=False)]
        return lambda: answer


def peer(stage: Stage, other: Callable[[int], Sequence[int]], ahead: bool = False) -> Peer:
    options = small_options(eval_interval=0, sample_interval=0)
    stage.prepare(options)
    stage.backend = backend = Peer(options)
    backend.other, backend.runs_ahead = other, ahead
    return backend


def test_rows_are_shared_out_once():
    parts = [Processes(4, index).rows(12) for index in range(4)]
    assert [row for part in parts for row in range(12)[part]] == list(range(12))
    with pytest.raises(ValueError, match="10 rows over 4 processes"):
        Processes(4, 1).rows(10)
    assert [Processes(4, index).writes for index in range(4)] == [True, False, False, False]


def test_only_the_first_process_writes_and_speaks(tmp_path: Path, capsys) -> None:
    stage = Stage(tmp_path / "run")
    peer(stage, lambda asked: ())
    assert stage.train() == 0
    assert capsys.readouterr() == ("", "")
    found = sorted(path.name for path in stage.run_dir.iterdir())
    assert found == ["checkpoints", "deepseek_final.npy"], "which the fakes write"


@pytest.mark.parametrize(("ahead", "stops_at"), [(False, 6), (True, 7)])
def test_a_signal_that_another_got_stops_at_the_step_that_all_know(tmp_path: Path, ahead: bool, stops_at: int) -> None:
    """Each step asks once: where the device runs ahead, the answer is read a step later."""
    stage = Stage(tmp_path / "run")
    first = 1  # the first question, whether both see the same checkpoints, is asked before all steps
    backend = peer(stage, lambda asked: Wishes(signal=15) if asked - first >= 6 else (), ahead)
    assert stage.train() == 143
    assert backend.steps_done == stops_at and stage.files("checkpoints")[-1] == f"step_{stops_at}.npz"


def test_a_checkpoint_by_the_clock_is_written_once_where_the_device_runs_ahead(tmp_path: Path) -> None:
    """It is wished for until it is there, which is one answer longer than needed."""
    stage = Stage(tmp_path / "run")
    peer(stage, lambda asked: Wishes(save=1) if asked in (7, 8) else (), ahead=True)
    assert stage.train() == 0
    assert stage.files("checkpoints") == [f"step_{step}.npz" for step in (10, 12)] + [
        "step_5.npz",
        "step_7.npz",
        "step_final_15.npz",
    ]


@pytest.mark.parametrize(
    ("wish", "code"), [({"time_is_up": 1}, 0), ({"unread": 1}, 141), ({"no_data": 1}, 2), ({"signal": 2}, 130)]
)
def test_every_wish_of_another_ends_the_run(tmp_path: Path, wish: dict, code: int) -> None:
    stage = Stage(tmp_path / "run")
    backend = peer(stage, lambda asked: Wishes(**wish) if asked >= 5 else ())
    assert stage.train() == code
    assert backend.steps_done == 4


@pytest.mark.parametrize("ahead", [False, True])
def test_a_process_without_more_text_has_rows_until_all_know(tmp_path: Path, ahead: bool, capsys) -> None:
    """Each begins the same steps: what those take that come before the answer was read before."""
    stage = Stage(tmp_path / "run")
    backend = peer(stage, lambda asked: (), ahead)
    stage.data.fails_at = 7
    assert stage.train() == FAILED
    assert backend.steps_done == 7 and stage.files("checkpoints")[-1] == "step_7.npz"
    assert capsys.readouterr().err == "error: process 1: dice: batch 7 fell under the table\n"
    stage = Stage(tmp_path / "other")
    peer(stage, lambda asked: (), ahead)
    stage.data.fails_at = 0
    with pytest.raises(UserError, match="process 1: dice: batch 0 fell under the table"):
        stage.train()
    assert capsys.readouterr().err == "", "the command says what it raises"


def test_what_must_be_the_same_is_compared():
    backend = Peer(small_options())
    require_same(backend, "settings", {"seed": 0})
    backend.other = lambda asked: (2**31 - 1, 0)
    with pytest.raises(UserError, match="the settings are not the same in all 2 processes"):
        require_same(backend, "settings", {"seed": 0})


def test_a_path_that_one_device_got_wrong_between_documents_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    """It takes a slower one there. XLA compiles programs of several processes with the others' help, if they are the
    same, and waits for it for a day."""
    backend = Peer(small_options())
    backend.processes = Processes(2, 0)
    kept: list[int] = []
    backend.keep_within_documents = kept.append
    backend.other = lambda asked: (2**31 - 1, 0) if kept else ()
    data = SimpleNamespace(identity={}, scored=[], tokenizer=SimpleNamespace(eot_id=7))
    monkeypatch.setattr("train.run.launch._open_data", lambda *_: data)
    argv = ["--preset", "tiny", "--document-mask", "--run-dir", str(tmp_path / "run")]
    assert launch(argv, "prog", "fake", lambda options: (options, backend), lambda *_: tmp_path) == FAILED
    assert kept == [7]
    assert "error: the paths of --document-mask are not the same in all 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize("writes", [True, False])
def test_the_writer_makes_things_first(writes: bool) -> None:
    order: list[object] = []
    backend = Peer(small_options())
    backend.processes = Processes(2, 0 if writes else 1)
    backend.other = lambda asked: order.append("all are here") or ()
    first_by_the_writer(backend, order.append)
    assert order == ([False, "all are here"] if writes else ["all are here", True])


def filtered(text: str) -> str:
    """What the filter lets through, as it runs."""
    program = Path(__file__).parents[2] / "flax_model/peer_errors.py"
    command = [sys.executable, "-S", program, ENDED]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=True)
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (OWN, OWN),
        ("Traceback (most recent call last):\n  File 'x'\nValueError: 3\n",) * 2,
        (SERVICE + UNHEALTHY + POLLED + FATAL + UNHEALTHY + STACK, "error: process 3 has ended"),
        (
            FATAL + "\nRPC: /xla.coordination.CoordinationService/RegisterTask\n" + STACK,
            "error: not all processes have come",
        ),
        (POLLED + FATAL + "UNAVAILABLE: Failed to send RPC\n" + STACK, "error: process 0, or another one, has ended"),
        ("I0101 00:00:00.000000    1 other.cc:3] words\n",) * 2,
    ],
)
def test_the_end_of_another_process_is_one_line(text: str, shown: str) -> None:
    said = filtered(text)
    if shown.startswith(("error: process", "error: not all")):
        assert said.startswith(shown) and said.count("\n") == 1
        # What the process says itself stays, and is not said twice.
        assert filtered(OWN + text) == OWN
        assert filtered("Warning: x\n" + text).splitlines()[0] == "Warning: x"
    else:
        assert said == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"processes": 2},
            "--processes 2: --processes N, --process-id K and --coordinator HOST:PORT are given together",
        ),
        ({"process_id": 0, "coordinator": "a:1"}, "--process-id 0: --processes N"),
        ({"processes": 0, "process_id": 0, "coordinator": "a:1"}, "--processes 0: must be at least 1"),
        ({"processes": 2, "process_id": 2, "coordinator": "a:1"}, "--process-id 2: must be from 0 to 1"),
        ({"processes": 2, "process_id": 1, "coordinator": "a"}, "--coordinator a: must be HOST:PORT"),
    ],
)
def test_settings_of_processes_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        small_options(**flags)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("package", ["torch_ref", "flax_model"])
def test_the_least_memory_of_all_processes_counts(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that does not know its own nothing is known of all."""
    pytest.importorskip({"torch_ref": "torch", "flax_model": "jax"}[package])
    module, asked = importlib.import_module(f"{package}.processes"), []
    platform = () if package == "torch_ref" else ("cpu",)
    assert module.least(7, *platform) == 7, "alone"

    def agree(wishes: Sequence[int], *_: object) -> Callable[[], list[int]]:
        asked.append(wishes)
        assert package == "torch_ref" or max(map(abs, wishes)) < 2**31, "Flax agrees in 32 bits"
        return lambda: [max(each) for each in zip(*asked, strict=True)]

    monkeypatch.setattr(module, "agree", agree)
    name, answer = ("dist.is_initialized", True) if platform == () else ("jax.process_count", 2)
    monkeypatch.setattr(f"{package}.processes.{name}", lambda: answer)
    for mine, others, least in ((70, 50, 50), (50, 70, 50), (None, 50, None), (50, None, None)):
        asked.clear()
        module.least(others and others << 30, *platform)
        assert module.least(mine and mine << 30, *platform) == (least and least << 30)


def test_launchers_say_whether_there_are_several() -> None:
    pytest.importorskip("jax")
    from flax_model.processes import launched

    srun = {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}
    assert launched(srun) and launched({"OMPI_COMM_WORLD_SIZE": "4"})
    assert launched({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"})
    assert not launched({}) and not launched(srun | {"SLURM_NTASKS": "1"}) and not launched({"SLURM_NTASKS": "8"})
    assert not launched({"KUBERNETES_SERVICE_HOST": "x"}) and not launched({"OMPI_COMM_WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("visible", "taken"), [("0,1,2,3", None), (None, None), ("5", [0]), ("MIG-4f1d", [0]), ("GPU-8c,GPU-9f", None)]
)
def test_the_gpu_of_a_process_is_the_one_that_its_launcher_shows_it(monkeypatch, visible, taken) -> None:
    """JAX takes that of SLURM's number of the process on its machine, which is not there where each sees its own."""
    pytest.importorskip("flax")
    from flax_model import processes

    given: list[object] = []
    rules: dict[str, object] = {}

    def initialize(coordinator, count, index, local_device_ids, **more: object) -> None:
        given.append(local_device_ids)
        rules.update(more)
        raise RuntimeError("as far as this goes")

    def leave(error: BaseException, *_: object) -> None:
        raise error

    srun = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node7", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
    for name, value in (srun | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": visible}).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes.jax.config, "update", rules.__setitem__)
    monkeypatch.setattr(processes, "_filter_errors", lambda: None)
    monkeypatch.setattr(processes, "leave", leave)
    with pytest.raises(UserError, match="as far as this goes"), processes.joined(None, None, None):
        pass
    assert given == [taken]
    assert rules == {
        "jax_cpu_collectives_implementation": "gloo",
        "jax_enable_preemption_service": False,
        "cluster_detection_method": None,
        "initialization_timeout": processes.CONNECT,
        "heartbeat_timeout_seconds": processes.SILENCE,
        "shutdown_timeout_seconds": processes.SHUTDOWN,
    }
    with pytest.raises(UserError, match="as far as this goes"), processes.joined("a:1", 2, 1):
        pass  # what is given, no launcher is asked for, nor is its number of the GPU taken
    assert given == [taken, None] and rules["cluster_detection_method"] == "deactivate"
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2")
    assert processes.own_gpus() is None
