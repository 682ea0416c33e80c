"""Several processes that train one model, as torchrun starts them: how they find each other, what they agree on, and
how they end. Where one ends in an error the others cannot go on: they end, too, and the same command goes on from the
latest checkpoint. `flax_model/processes.py` is the counterpart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import CLOSED, leave
from torch_ref.spec.processes import ALONE, Processes
from torch_ref.spec.storage import first_line

CONNECT, WAIT = 300, 3600
"""Seconds: for all processes to come; for one that is late, as while process 0 writes a sample."""
LOST = (*CLOSED, "connectFullMesh failed", "Connection was likely closed", "wait timeout", "Socket Timeout")
"""In errors of torch that tell of another process."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started several processes."""
    return int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if there are several: numbers of the host travel by gloo, tensors on
    GPUs by NCCL, each process with the GPU of its number. An error in the block is told and ends this process at once:
    what is usually tidied up then would wait for the others."""
    if not launched():
        yield ALONE
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    try:
        if device == "mps" or (device == "auto" and not on_gpu and torch.backends.mps.is_available()):
            raise UserError("--device mps: trains in one process alone; torchrun is for GPUs, or --device cpu")
        if on_gpu:
            if "LOCAL_RANK" not in os.environ:
                said = "LOCAL_RANK is not set, the number of this process on its machine; see docs/cluster.md"
                raise UserError(f"torchrun: {said}")
            number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= there:
                some = f"{there} are here; use --nproc-per-node {there}"
                raise UserError(f"torchrun: process {number} of this machine has no GPU: {some}, or --device cpu")
            torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=CONNECT))
        set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # a public one came later
        set_timeout(timedelta(seconds=WAIT))
        processes = Processes(dist.get_world_size(), dist.get_rank())
    except UserError as error:
        leave(error)
    except (ValueError, RuntimeError) as error:
        leave(UserError(f"torchrun: the processes cannot be joined: {first_line(error)}; see docs/cluster.md"))
    try:
        yield processes
        dist.destroy_process_group()
    except BaseException as error:
        leave(error, processes, LOST)


def end(code: int) -> None:
    """End one of several processes when all is done. Not by way of the interpreter: in its last moments a process that
    used gloo aborts now and then ("terminate called without an active exception", torch 2.13)."""
    if not launched():
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def agree(wishes: Sequence[int]) -> Callable[[], list[int]]:
    """The largest of each number over all processes. All must ask for it at the same point. The hosts wait for each
    other, and not for their devices."""
    numbers = torch.tensor(list(wishes), dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist


def least(number: int | None) -> int | None:
    """The smallest of a number of bytes over all processes; None if one has None."""
    if not dist.is_initialized():
        return number
    missing, most = agree([number is None, -(number or 0)])()
    return None if missing else -most
