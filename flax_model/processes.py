"""Several processes that train one model: how they find each other, what they agree on, and how they end.

JAX's coordination service, which process 0 runs, tells each process of the others; the devices of all are then one
list, and arrays span them. Where a process ends in an error the others cannot go on: they end, too, and the same
command goes on from the latest checkpoint. `torch_ref/processes.py` is the counterpart.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import CLOSED, ENDED, leave
from torch_ref.spec.processes import ALONE, Processes
from torch_ref.spec.storage import first_line

CONNECT, SILENCE, SHUTDOWN = 300, 30, 60
"""Seconds: for all processes to come, without a sign of one until it counts as gone, and for all to end."""
LOST = (*CLOSED, "oordination service", "UNAVAILABLE:", "DEADLINE_EXCEEDED")
"""In errors of JAX that tell of another process."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher that JAX knows has started several processes: SLURM's srun, Open MPI's mpirun, or an indexed
    Job of Kubernetes."""
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1
    open_mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    return slurm or open_mpi or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()


def own_gpus(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Numbers of this process's GPUs among those that it sees; None leaves that to JAX, which takes one by the
    launcher's number of the process on its machine. Where the launcher shows each process one alone (SLURM's
    `--gpus-per-task=1`), that has number 0 whatever the process's is."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    sees_one = visible != "" and "," not in visible
    return [0] if sees_one and "JAX_LOCAL_DEVICE_IDS" not in environment else None


@contextmanager
def joined(coordinator: str | None, count: int | None, index: int | None) -> Iterator[Processes]:
    """Join the other processes; where nothing is given, those that a launcher started, if there are any. An error in
    the block, or that they do not come, is told and ends this process at once: what is usually tidied up then would
    wait for the others."""
    if count == 1 or (count is None and not launched()):
        yield ALONE
        return
    _filter_errors()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # signals are the training loop's
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            own_gpus() if count is None else None,
            cluster_detection_method=None if count is None else "deactivate",  # what is given, no launcher is asked for
            initialization_timeout=CONNECT,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SHUTDOWN,
        )
        processes = Processes(jax.process_count(), jax.process_index())
    except (ValueError, RuntimeError) as error:
        given = "as the launcher says" if count is None else f"--coordinator {coordinator} --processes {count}"
        mend = "; see docs/cluster.md for --coordinator HOST:PORT --processes N --process-id K"
        leave(UserError(f"{given}: the processes cannot be joined: {first_line(error)}{mend}"))
    try:
        yield processes
        jax.distributed.shutdown()
    except BaseException as error:
        leave(error, processes, LOST)


def _filter_errors() -> None:
    """Let what is written to standard error pass through `peer_errors.py`, which puts the end of another process, of
    which JAX's runtime tells in a page of its own before it aborts this one, in a line."""
    program = Path(__file__).with_name("peer_errors.py")
    command = [sys.executable, "-S", str(program), ENDED]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # it ends by itself, after this process


# ------------------------------------------------------------------------------------------------------------ together


@cache
def _everyone(platform: str) -> tuple[NamedSharding, Callable]:
    """One row of numbers on every device of all processes, and the largest of each number."""
    mesh = Mesh(np.array(jax.devices(platform)), ("devices",))
    rows, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    return rows, jax.jit(lambda numbers: numbers.max(0), out_shardings=same)


def agree(wishes: Sequence[int], platform: str) -> Callable[[], list[int]]:
    """The largest of each number over all processes. All must ask for it at the same point; what is returned waits for
    the devices, which answer after all that was begun before."""
    rows, largest = _everyone(platform)
    mine = np.array([wishes], np.int32)
    numbers = jax.make_array_from_callback((rows.num_devices, len(wishes)), rows, lambda _: mine)
    answer = largest(numbers)
    jax.copy_to_host_async(answer)
    return lambda: np.asarray(answer).tolist()


def least(number: int | None, platform: str) -> int | None:
    """The smallest of a number of bytes over all processes, to a MiB; None if one has None."""
    if jax.process_count() == 1:
        return number
    missing, most = agree([number is None, -((number or 0) >> 20)], platform)()
    return None if missing else -most << 20
