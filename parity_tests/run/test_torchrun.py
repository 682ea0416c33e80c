"""Several processes of torch train as one does: the same losses, as copies or split by FSDP2, stopped together,
restarted with another number of them, and faults of communication show."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torchrun is torch's")

import torch

from parity_tests.support.backends import make_backend
from parity_tests.support.processes import OF_A_LIBRARY, OF_A_PEER, Started, differences, free_port, settings, started
from torch_ref import processes, sharding
from torch_ref.spec.processes import Processes
from train.run.runlog import read_metrics

BOUND = 1e-10
LOST = "has ended or cannot be reached"
MAIN = "import sys; from torch_ref.train import main; from torch_ref.processes import end; end(main()); sys.exit(0)"


def several(folder: Path, count: int, *argv: str, program: str = MAIN, name: str = "run"):
    """Processes of one run, with what torchrun tells each of them."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return started(
        folder / "settings.toml",
        folder / name,
        count,
        1,
        *argv,
        program=program,
        environment=lambda number: {**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    from torch_ref.train import main

    folder = tmp_path_factory.mktemp("torchrun")
    config = settings(folder)
    assert main(["--config", str(config), "--run-dir", str(folder / "straight")]) == 0
    return folder / "straight"


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    (tmp_path / "settings.toml").write_bytes((straight.parent / "settings.toml").read_bytes())
    return tmp_path


def assert_same_run(run_dir: Path, other: Path) -> None:
    worst = differences(run_dir, other)
    assert len(worst) == 4 and max(worst.values()) < BOUND, worst
    ours, theirs = (torch.load(each / "deepseek_final.pt", weights_only=True) for each in (run_dir, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=BOUND * float(theirs[name].abs().max()))


def test_two_processes_are_stopped_and_killed_and_others_go_on(folder: Path, straight: Path) -> None:
    """Split, as copies, and alone, each from the checkpoint of the one before."""
    with several(folder, 2) as run:
        run.wait_for_step(3)
        run.processes[1].send_signal(signal.SIGTERM)  # only to one that does not write
        assert run.codes() == [143, 143], run.said(0) + run.said(1)
        assert run.said(1) == "", "only process 0 says anything"
        assert "Stopped by SIGTERM after step" in run.said(0) and "mesh data=1,fsdp=2, 2 processes" in run.said(0)
    with several(folder, 2, "--mesh", "data=2") as run:
        run.wait_for_step(8)
        run.processes[1].kill()
        assert run.codes(60)[0] not in (0, None), run.said(0)
        assert run.said(0).splitlines()[-1].startswith("error: ") and run.said(0).count(LOST) == 1
        assert "Traceback" not in run.said(0)
    from torch_ref.train import main

    assert main(["--config", str(folder / "settings.toml"), "--run-dir", str(folder / "run")]) == 0
    assert_same_run(folder / "run", straight)


def test_copies_of_split_models_give_the_run_of_one(folder: Path, straight: Path) -> None:
    with several(folder, 4, "--mesh", "data=2,fsdp=2") as run:
        assert run.codes(300) == [0] * 4, run.said(0)
    assert_same_run(run.run_dir, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(4, "auto"), (4, "data=2,fsdp=2"), (4, "data=4"), (2, "fsdp=2")])
@pytest.mark.parametrize("flags", [(), ("--remat", "layers", "--document-mask")], ids=["plain", "remat, documents"])
def test_every_mesh_gives_the_run_of_one(folder: Path, straight: Path, count: int, mesh: str, flags: tuple) -> None:
    if flags:
        from torch_ref.train import main

        straight = folder / "straight"
        assert main(["--config", str(folder / "settings.toml"), "--run-dir", str(straight), *flags]) == 0
    with several(folder, count, "--mesh", mesh, *flags) as run:
        assert run.codes(300) == [0] * count, run.said(0)
        assert all(run.said(number) == "" for number in range(1, count))
    assert_same_run(run.run_dir, straight)


@pytest.mark.slow
def test_torchrun_itself(folder: Path, straight: Path) -> None:
    """As a user starts it; Ctrl-C to torchrun stops all with a checkpoint, and the same command goes on."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "torch_ref.train", "--config", str(folder / "settings.toml"), "--run-dir", str(folder / "run")]
    run = Started.__new__(Started)
    run.run_dir, run.outputs = folder / "run", [folder / "out"]
    for first in (True, False):
        with open(folder / "out", "wb") as output:
            run.processes = [
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2])
            ]
        if first:
            run.wait_for_step(4)
            run.processes[0].send_signal(signal.SIGINT)
            assert run.processes[0].wait(120) != 0
            assert "Stopped by SIGINT after step" in run.said(0), run.said(0)
    assert run.processes[0].wait(120) == 0, run.said(0)
    assert_same_run(folder / "run", straight)


FAULTS = {
    "gradients averaged": "from torch.distributed.fsdp import FSDPModule as Module; "
    "Module.set_gradient_divide_factor = lambda module, factor: None",
    "gradients of copies not summed": "backend.sum_over = lambda tensors, group: None",
    "every process trains on all rows": "backend.Processes.rows = lambda self, total: slice(0, total // self.count)",
    "norm of one process's parts": "backend.TorchBackend._global_norm = lambda self, g: backend.global_norm(g)",
}


@pytest.mark.parametrize(
    "fault", ["gradients averaged", *[pytest.param(name, marks=pytest.mark.slow) for name in list(FAULTS)[1:]]]
)
def test_a_fault_of_communication_shows(folder: Path, straight: Path, fault: str) -> None:
    program = f"from torch_ref import backend, sharding; {FAULTS[fault]}; {MAIN}"
    mesh = "data=2" if "copies" in fault else "fsdp=2"
    assert first_steps_differ(folder, straight, "--mesh", mesh, program=program) > 1e-4


def test_split_models_train_in_float32_too(folder: Path, straight: Path) -> None:
    """Gloo lacks what FSDP takes there to sum gradients. Off by float32's rounding."""
    assert first_steps_differ(folder, straight, "--mesh", "fsdp=2", "--dtype", "float32") < 1e-5


def first_steps_differ(folder: Path, straight: Path, *argv: str, program: str = MAIN) -> float:
    """By how much two processes are off in the first two steps of a run as long as its warm-up, which has the learning
    rates of the whole one."""
    with several(folder, 2, *argv, "--steps", "3", "--extended-steps", "0", program=program) as run:
        assert run.codes() == [0, 0], run.said(0)
    ours, theirs = ([r for r in read_metrics(each) if r["kind"] == "step"][:2] for each in (run.run_dir, straight))
    assert [one["learning_rate"] for one in ours] == [two["learning_rate"] for two in theirs]
    return max(
        abs(one[name] / two[name] - 1) for one, two in zip(ours, theirs, strict=True) for name in ("loss", "grad_norm")
    )


def test_all_groups_wait_for_a_process_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself a group waits half an hour, or on GPUs ten minutes, whatever that of all processes does."""
    made = []
    monkeypatch.setattr(sharding.dist, "new_group", lambda members, timeout: made.append((members, timeout)))
    sharding.make_mesh(Processes(4, 0), (2, 2, 1), torch.device("cpu"))
    wait = timedelta(seconds=processes.WAIT)
    assert made == [(members, wait) for members in ([0, 2], [1, 3], [0, 1], [2, 3])]


@pytest.mark.parametrize("package", ["torch_ref", "flax_model"])
def test_what_tells_of_another_process_and_nothing_else_is_put_down_to_it(package: str) -> None:
    pytest.importorskip({"torch_ref": "torch", "flax_model": "jax"}[package])
    lost = importlib.import_module(f"{package}.processes").LOST
    put_down = [message for message in OF_A_PEER + OF_A_LIBRARY if any(word in message for word in lost)]
    assert put_down == list(OF_A_PEER)


@pytest.mark.slow
def test_others_end_with_a_process_that_is_killed(folder: Path) -> None:
    with several(folder, 2, "--steps", "10000", "--allow-changed-settings") as run:
        run.wait_for_step(5)
        run.processes[0].kill()
        assert run.processes[1].wait(60) == 2
        assert run.said(1).startswith("error: another process ") and run.said(1).count("\n") == 1


@pytest.mark.slow
def test_a_run_of_two_goes_on_in_flax(folder: Path, straight: Path) -> None:
    jax = pytest.importorskip("jax")
    from train.flax_main import main

    with several(folder, 2) as run:
        assert run.codes() == [0, 0], run.said(0)
    argv = ["--config", str(folder / "settings.toml"), "--run-dir", str(folder / "flax"), "--mesh", "fsdp=1"]
    try:
        assert main([*argv, "--resume-from", str(run.run_dir / "checkpoints/step_3.pt")]) == 0
    finally:
        jax.config.update("jax_enable_x64", False)
    ours, theirs = (
        {r["step"]: r["loss"] for r in read_metrics(each) if r["kind"] == "step"}
        for each in (folder / "flax", straight)
    )
    assert list(ours) == list(range(4, 13))
    np.testing.assert_allclose(list(ours.values()), [theirs[step] for step in ours], rtol=1e-9)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--mesh", "data=2"],
            "--mesh data=2,fsdp=1: takes 2 processes, and there are 1; start torchrun --nproc-per-node 2",
        ),
        (["--mesh", "expert=2"], "--mesh data=1,fsdp=1,expert=2: torch has data and fsdp; Flax alone spreads experts"),
        (["--processes", "2", "--process-id", "0", "--coordinator", "a:1"], "--processes 2: is Flax's; here processes"),
    ],
)
def test_mistakes_are_one_line(folder: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    from torch_ref.train import main

    assert main(["--config", str(folder / "settings.toml"), "--run-dir", str(folder / "run"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.fixture
def process_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four, the third of its machine, which has two GPUs."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device", "on_a_mac", "said"),
    [
        (
            "auto",
            False,
            "torchrun: process 2 of this machine has no GPU: 2 are here; use --nproc-per-node 2, or --device cpu",
        ),
        (
            "cuda",
            None,
            "torchrun: LOCAL_RANK is not set, the number of this process on its machine; see docs/cluster.md",
        ),
        ("auto", True, "--device mps: trains in one process alone; torchrun is for GPUs, or --device cpu"),
        ("mps", False, "--device mps: trains in one process alone; torchrun is for GPUs, or --device cpu"),
    ],
)
def test_a_process_without_a_device_of_its_own_is_refused(
    process_3: None,
    device: str,
    on_a_mac: bool | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    if on_a_mac is None:  # started by hand, with what torch itself asks for
        monkeypatch.delenv("LOCAL_RANK")
    if on_a_mac:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: bool(on_a_mac))
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="2"), processes.joined(device):
        pass
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_how_a_process_joins_the_others(process_3: None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU of its number; whoever does not come is missed soon, and whoever is late is waited for."""
    calls: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    stand_ins = {
        "init_process_group": lambda backend, timeout: calls.extend((backend, timeout.total_seconds())),
        "set_timeout": lambda timeout: calls.append(timeout.total_seconds()),
        "get_world_size": lambda: 4,
        "get_rank": lambda: 3,
        "destroy_process_group": lambda: calls.append("end"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(processes.dist, name, stand_in, raising=False)
    with processes.joined(device) as joined:
        calls.append(joined)
    backend = [1, "cpu:gloo,cuda:nccl"] if device == "cuda" else ["gloo"]
    assert calls == [*backend, processes.CONNECT, processes.WAIT, Processes(4, 3), "end"]


def test_torchrun_says_whether_there_are_several() -> None:
    assert processes.launched({"WORLD_SIZE": "2", "RANK": "0"})
    for other in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "2"}):  # the last is not torchrun's
        assert not processes.launched(other)


def test_gradients_of_any_size_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In messages of at most `BUCKET` bytes, or one tensor, of which the models of tests fill none."""
    messages = []
    monkeypatch.setattr(sharding.dist, "all_reduce", lambda flat, group: messages.append(len(flat)) or flat.mul_(2))
    monkeypatch.setattr(sharding, "BUCKET", 4 * 10)
    tensors = [torch.arange(size, dtype=torch.float32) + size for size in (4, 6, 1, 25, 3, 2)]
    tensors[-2:] = [torch.ones(3, 2).T, torch.tensor(5.0)]
    before = [tensor.clone() for tensor in tensors]
    sharding.sum_over(iter(tensors), sharding.dist.ProcessGroup(0, 2))
    assert messages == [10, 1, 25, 7]
    assert all(torch.equal(after, 2 * tensor) for after, tensor in zip(tensors, before, strict=True))


def test_a_save_is_there_for_all_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ask each other then; one of them writes and deletes."""
    backend = make_backend("torch")
    backend.init(0)
    said: list[object] = []

    def agree(wishes: Sequence[int]) -> Callable[[], list[int]]:
        said.append((tmp_path / "step_0.pt").exists())
        return lambda: said.append("all are here") or list(wishes)

    monkeypatch.setattr(backend, "agree", agree)
    for number in (1, 0):
        backend.processes = Processes(2, number)
        path = backend.save(tmp_path, "step_0", {})
    assert said == [False, "all are here", True, "all are here"]
    for number in (1, 0):
        backend.processes = Processes(2, number)
        backend.delete(path)
        assert path.exists() == (number == 1)
