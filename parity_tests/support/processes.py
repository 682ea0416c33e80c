"""Several processes that train together on this machine, each with CPU devices of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from parity_tests.harness.quick import quick_flags
from parity_tests.support.fakes import small_options
from train.run.runlog import read_metrics

REPOSITORY = Path(__file__).parents[2]
MAIN = "import sys; from train.flax_main import main; sys.exit(main())"
STEPS, MORE = 10, 2
OF_A_PEER = (
    "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2131",
    "[gloo/transport/tcp/pair.cc:511] Read error [127.0.0.1]:2131: Connection reset by peer",
    "[gloo/transport/tcp/pair.cc:242] Write error [127.0.0.1]:2131: Broken pipe",
    "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3600000ms for recv operation to complete",
    "[gloo/transport/tcp/pair.cc:144] Application timeout caused pair closure",
    "NCCL error in: NCCLUtils.cpp:89, remote process exited or there was a network error, NCCL version 2.29.3",
    "NCCL error in: NCCLUtils.hpp:268, internal error\nLast error:\nNet : Connection closed by remote peer h<43236>",
    "NCCL communicator was aborted on rank 0.",
)
"""What gloo and NCCL say where another process ends, or hangs."""
OF_A_LIBRARY = (
    "Cannot use ReduceOp.PREMUL_SUM with Gloo",
    "[enforce fail at gloo/types.h:71] . buffers of different size",
    "NCCL error in: NCCLUtils.cpp:89, unhandled cuda error: Failed to CUDA calloc 6291456 bytes",
    "NCCL error in: ProcessGroupNCCL.cpp:1331, invalid usage: Duplicate GPU detected",
)
"""What they say of what is wrong in this process."""


def cpu_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices, which compiles quickly."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} {quick_flags()}"}


def settings(folder: Path, **changes: object) -> Path:
    """A settings file of a run in float64, and the text it names."""
    words = "the model reads a row of tokens and says which one comes next while experts share the work".split()
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 60)) + "." for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values: dict = {
        "dataset": str(folder / "text.jsonl"),
        "tokenizer": "bpe",
        "validation_fraction": 0.1,
        "dtype": "float64",
        "learning_rate": 0.01,
        "seq_len": 16,
        "batch_size": 8,
        "micro_batch_size": 1,
        "steps": STEPS,
        "extended_steps": MORE,
        "checkpoint_interval": 3,
        "device": "cpu",
    }
    file = folder / "settings.toml"
    file.write_text(small_options(**(values | changes)).to_toml())
    return file


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Started:
    """Processes of one run. `devices` is how many each has; `program` is what each runs, by default the Flax main."""

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        count: int,
        devices: int = 1,
        *argv: str,
        program: str = MAIN,
        environment: Callable[[int], Mapping[str, str]] | None = None,
    ) -> None:
        self.run_dir, self.count, port = run_dir, count, free_port()
        self.outputs = [run_dir.with_name(f"{run_dir.name}_{number}.out") for number in range(count)]
        shared = {
            **cpu_devices(devices),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(config.parent / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        self.processes = []
        for number, output in enumerate(self.outputs):
            command = [sys.executable, "-c", program, "--config", str(config), "--run-dir", str(run_dir), *argv]
            mesh = os.environ | shared
            if environment:
                mesh |= environment(number)
            elif count > 1:
                place = f"--processes {count} --process-id {number} --coordinator 127.0.0.1:{port}"
                command += place.split()
            with open(output, "wb") as file:
                self.processes.append(subprocess.Popen(command, env=mesh, stdout=file, stderr=subprocess.STDOUT))

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        log = self.run_dir / "training.logs"
        while not log.exists() or f"\nStep {step} |" not in log.read_text():
            assert time.monotonic() < end, self.said(0)
            assert self.processes[0].poll() is None, self.said(0)
            time.sleep(0.01)

    def codes(self, seconds: float = 120) -> list[int | None]:
        """Exit codes once all have ended; None of one that has not."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
        return [process.poll() for process in self.processes]

    def wait_for_a_word(self, number: int, seconds: float = 30) -> None:
        """What Flax says at its end goes through a process of its own, which may be later."""
        end = time.monotonic() + seconds
        while "\n" not in self.said(number) and time.monotonic() < end:
            time.sleep(0.01)

    def said(self, number: int) -> str:
        return self.outputs[number].read_text(errors="replace")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def started(*arguments: object, **settings: object) -> Iterator[Started]:
    run = Started(*arguments, **settings)
    try:
        yield run
    finally:
        run.end()


def differences(run_dir: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of two runs' logged numbers, by name: of all steps and validations, which must
    be the same ones. What does not come from rounding must be equal, the samples too."""
    ours, theirs = (
        [record for record in read_metrics(run) if record["kind"] in ("step", "validation", "sample")]
        for run in (run_dir, other)
    )
    places = [[(record["kind"], record["step"]) for record in records] for records in (ours, theirs)]
    assert places[0] == places[1]
    worst: dict[str, float] = {}
    for one, two in zip(ours, theirs, strict=True):
        for name in ("expert_counts", "data_position", "tokens_seen", "learning_rate", "text", "stale_validations"):
            assert one.get(name) == two.get(name), (one["kind"], one["step"], name)
        for name in ("loss", "grad_norm", "balance_loss"):
            if name in one:
                error = abs(one[name] - two[name]) / abs(two[name])
                worst[f"{one['kind']} {name}"] = max(error, worst.get(f"{one['kind']} {name}", 0))
    return worst
