"""The shell around commands: mistakes in one line, bytes that are no text, terminals, pipes; one process a folder."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import leave, no_room
from torch_ref.spec.memory import host_memory_available
from torch_ref.spec.processes import Processes
from train.run.guard import HOLDER, LOCK, exclusive
from train.shell import shell, write_any_character

REPOSITORY = Path(__file__).parents[2]


def raising(error: BaseException):
    def command(argv):
        raise error

    return shell(command)


OF_XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6442450944 bytes."
OF_TORCH = "CUDA out of memory"
OF_MPS = "MPS backend out of memory (MPS allocated: 5.50 GB, other allocations: 14.76 GB, max allowed: 20.40 GB)"
OF_THE_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
TOO_MUCH = (
    "memory does not suffice; use fewer or shorter rows at once; in training --micro-batch-size, --remat layers or "
    "--mesh fsdp=N"
)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("--prompt: is missing"), 2, "error: --prompt: is missing\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (RuntimeError(f"{OF_XLA}\nBufferAssignment: 1"), 2, f"error: {TOO_MUCH} ({OF_XLA})\n"),
        (RuntimeError(f"{OF_TORCH}. Tried to allocate 6.00 GiB."), 2, f"error: {TOO_MUCH} ({OF_TORCH})\n"),
        (RuntimeError(f"{OF_MPS}. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0."), 2, f"error: {TOO_MUCH} ({OF_MPS})\n"),
        (RuntimeError(f"err == 0. {OF_THE_CPU}. Error code 12"), 2, f"error: {TOO_MUCH} ({OF_THE_CPU})\n"),
        (MemoryError(), 2, f"error: {TOO_MUCH} (of the host)\n"),
    ],
)
def test_mistakes_are_one_line(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr("train.shell.forget_output", lambda: None)
    assert raising(error)([]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_what_a_framework_says_of_a_full_device_is_known(framework: str) -> None:
    library = pytest.importorskip(framework)
    with pytest.raises(RuntimeError) as full:
        (library.numpy if framework == "jax" else library).zeros(1 << 45)
    assert no_room(full.value).startswith(TOO_MUCH)
    with pytest.raises(RuntimeError, match="of another kind"):
        raising(RuntimeError("of another kind"))([])


def test_ctrl_c_again_while_python_winds_up_shows_no_traceback():
    program = """
import os, signal, sys, threading
from train.shell import shell

@shell
def main(argv):
    raise KeyboardInterrupt

threading._register_atexit(os.kill, os.getpid(), signal.SIGINT)
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("package", ["torch_ref", "flax_model"])
@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            2,
            "another process",
        ),
        (UserError("--dtype: no"), 2, "error: process 1: --dtype: no"),
        (RuntimeError(OF_XLA), 2, f"error: process 1: {TOO_MUCH}"),
        (OSError(11, "Resource temporarily unavailable", "text.jsonl"), 1, "BlockingIOError: "),
        (RuntimeError("cannot restore /mnt/datastore/x"), 1, "RuntimeError: "),
    ],
)
def test_an_error_of_ones_own_is_not_put_down_to_another_process(package, error, code, said, capsys, monkeypatch):
    pytest.importorskip({"torch_ref": "torch", "flax_model": "jax"}[package])
    lost = importlib.import_module(f"{package}.processes").LOST
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as ended:
        leave(error, Processes(2, 1), lost)
    assert ended.value.code == code and said in capsys.readouterr().err


def test_a_mistake_is_one_line_where_the_terminal_knows_ascii_alone():
    command = [sys.executable, "-m", "train.flax_main", "--num-heads", "5"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: model: num_kv_heads = 3: must divide num_heads = 5; ")


def test_bytes_that_are_no_text_are_refused_by_name(capsys):
    assert raising(AssertionError("not reached"))(["--prompt", "\udcff"]) == 2
    assert capsys.readouterr().err == "error: --prompt: not UTF-8 text, at character 1\n"


def test_what_a_terminal_cannot_show_is_escaped():
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    write_any_character(stream)
    stream.write("Gr\u00fc\u00dfe \U0001f600")
    stream.flush()
    assert written.getvalue() == rb"Gr\xfc\xdfe \U0001f600"


def test_a_closed_pipe_ends_a_command_quietly(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "train.runs", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_the_output_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    command = [sys.executable, "-m", "train.runs", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE)
    said = b"error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.skipif(os.name != "posix", reason="a shell's way to close a stream")
def test_a_stream_that_is_closed_from_the_start_is_no_files(tmp_path):
    program = """
import os, sys
from train.shell import shell

@shell
def main(argv):
    print("unheard", sys.stdin.read(), sys.stdout.isatty())
    with open(argv[0], "wb"):
        os.write(1, b"of a library")
        os.write(2, b"of a library")
    return 7

sys.exit(main())
"""
    file = tmp_path / "file"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, str(file)]
    assert subprocess.run(closed, cwd=REPOSITORY).returncode == 7
    assert file.read_bytes() == b""


def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    """The folder stands for a torch whose import is interrupted after some of its parts."""
    (tmp_path / "torch").mkdir()
    interrupted = "import sys\nsys.modules['torch.distributed'] = sys\nraise KeyboardInterrupt"
    (tmp_path / "torch" / "__init__.py").write_text(interrupted)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    command = [sys.executable, "-m", "torch_ref.train", "--preset", "tiny", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted; what was not saved is lost.\n")


# ------------------------------------------------------------------------------------------- one process a run folder


def note(pid: int, host: str | None = None) -> str:
    return json.dumps({"host": host or socket.gethostname(), "pid": pid, "since": "2026-01-01 00:00:00"})


def test_a_folder_is_left_as_it_was_found(tmp_path):
    with exclusive(tmp_path, "metrics.jsonl"):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / HOLDER).exists()


def test_a_holder_is_named(tmp_path):
    (tmp_path / HOLDER).write_text(note(os.getppid()))
    said = rf"another process is training there \(process {os.getppid()} on .*, since 2026"
    with FileLock(tmp_path / LOCK), pytest.raises(UserError, match=said):
        with exclusive(tmp_path, "metrics.jsonl"):
            pass


def test_a_note_whose_process_number_is_anothers_by_now_is_no_hindrance(tmp_path):
    """As after kill -9: the system took the lock back, and gave the number away again."""
    (tmp_path / HOLDER).write_text(note(os.getppid()))
    with exclusive(tmp_path, "metrics.jsonl"):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("left", ["", "[]", '{"host": 3}', "not JSON"])
def test_a_note_that_says_nothing_is_no_hindrance(tmp_path, left):
    (tmp_path / HOLDER).write_text(left)
    with exclusive(tmp_path, "metrics.jsonl"):
        pass


def test_a_stale_note_is_recognised(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / HOLDER).write_text(note(gone.pid))
    with exclusive(tmp_path, "metrics.jsonl"):
        pass
    # Of another machine: held as long as something is written.
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    (tmp_path / HOLDER).write_text(note(1, "elsewhere"))
    for file in (metrics, tmp_path / HOLDER):
        os.utime(file, (time.time() - 600,) * 2)  # a step, or an evaluation, may take as long
    with pytest.raises(UserError, match="elsewhere.*remove"):
        with exclusive(tmp_path, "metrics.jsonl"):
            pass
    for file in (metrics, tmp_path / HOLDER):
        os.utime(file, (0, 0))
    with exclusive(tmp_path, "metrics.jsonl"):
        pass


def test_a_file_system_without_locks_is_guarded_by_the_note(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("train.run.guard.FileLock.acquire", unsupported)
    with exclusive(tmp_path, "metrics.jsonl"):
        pass
    (tmp_path / HOLDER).write_text(note(os.getppid()))
    with pytest.raises(UserError, match="another process"):
        with exclusive(tmp_path, "metrics.jsonl"):
            pass
    # In a container that is started again the run has the number that it had before.
    (tmp_path / HOLDER).write_text(note(os.getpid()))
    with exclusive(tmp_path, "metrics.jsonl"):
        pass


# --------------------------------------------------------------------------------------------------------- platforms


def test_nothing_in_the_start_is_of_unix_alone(tmp_path):
    """Windows lacks os.sysconf, SIGHUP, /proc, fcntl and resource."""
    code = """
import os, pathlib, signal, sys
import datasets, filelock, matplotlib, numpy, pyarrow, rich, tensorboardX, tokenizers, tyro  # they know their systems
for module, names in ((os, ("sysconf", "getppid", "sched_getaffinity", "uname")), (signal, ("SIGHUP", "SIGPIPE"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None
pathlib.Path.read_text, whole = (lambda self, *a, **k: (_ for _ in ()).throw(FileNotFoundError(str(self)))
    if str(self).startswith(("/proc", "/sys")) else whole(self, *a, **k)), pathlib.Path.read_text
import train.flax_main, torch_ref.train, train.runs, train.generate, train.convert
from train.run.signals import StopSignals
from torch_ref.spec.memory import host_memory_available
with StopSignals():
    print(host_memory_available())
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


def test_the_file_cache_of_a_container_is_free_memory(monkeypatch):
    files = {
        "/proc/meminfo": "MemAvailable: 64000000 kB\n",
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": "8000000000\n",
        "/sys/fs/cgroup/memory.current": "7000000000\n",
        "/sys/fs/cgroup/memory.stat": "active_file 2000000000\ninactive_file 3500000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: files[str(self)])
    assert host_memory_available() == 8_000_000_000 - 7_000_000_000 + 5_500_000_000


def test_training_that_does_not_fit_says_which_option_makes_it_smaller(tmp_path, monkeypatch, capsys):
    backend = pytest.importorskip("torch_ref.backend")
    from torch_ref.train import main

    def full(*_):
        raise RuntimeError(f"{OF_MPS}. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0")

    monkeypatch.setattr(backend, "objective", full)
    (tmp_path / "text.txt").write_text("A word and another one. " * 400)
    flags = f"--preset tiny --dataset {tmp_path}/text.txt --seq-len 16 --steps 2 --validation-rows 0 --eval-interval 0"
    assert main([*flags.split(), "--run-dir", str(tmp_path / "run"), "--no-tensorboard"]) == 2
    said = capsys.readouterr().err
    assert f"error: {TOO_MUCH} ({OF_MPS})\n" in said and "Traceback" not in said
