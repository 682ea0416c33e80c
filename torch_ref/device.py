"""Where torch computes: which device, in which precision, and by which attention and expert paths.

Twins: `torch_ref/device.py`, `flax_model/device.py`.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from torch_ref.attention import ATTENTION_PATHS
from torch_ref.moe import EXPERT_PATHS
from torch_ref.sharding import mesh_words
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import host_memory_available, process_peak
from torch_ref.spec.storage import first_line


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU. A GPU asked for by number becomes this process's current one. Raises
    `UserError` where the device asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    kind = name.partition(":")[0]
    if not present.get(kind, False):
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(f"--device {name}: not available to this torch; here it can use {usable}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            # A CUDA graph records the current device's stream, on which nothing would run (pytorch #87894).
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device


def describe(device: torch.device, shape: Sequence[int] = (1, 1, 1)) -> str:
    """The device in words, for the log."""
    name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if device.type == "mps":
        name = f"Apple MPS, torch {torch.__version__}"
    processes = math.prod(shape)
    return name if processes == 1 else f"{processes} x {name}, mesh {mesh_words(shape)}, {processes} processes"


def default_dtype(device: torch.device) -> str:
    """Compute dtype of `--dtype auto`: bfloat16 on a CUDA device that has it, float32 elsewhere. NVIDIA GPUs before
    Ampere (V100, T4) compute it by float32, slowly and without the fast kernels."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device (None where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_memory_available()


def peak_memory(device: torch.device) -> int | None:
    """Bytes that tensors have held at most; on MPS, which keeps no such record, what is held now; on the CPU, of the
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return process_peak()


def sent_to_host(tensor: Tensor) -> Callable[[], list]:
    """Begin to copy a tensor to the host. What is returned waits for that copy and gives its values: not for the
    kernels that a CUDA device got after it, as `tolist` would."""
    if not tensor.is_cuda:
        return tensor.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def values() -> list:
        arrived.synchronize()
        return copy.tolist()

    return values


@contextmanager
def trace(folder: Path, device: torch.device) -> Iterator[None]:
    """Profile what is done in the block, and write `folder`/trace.json.gz."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = profile(activities=activities, record_shapes=True)
    with profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))


def resolve_compute(compute: ComputeConfig, device: torch.device) -> ComputeConfig:
    """`auto` paths replaced by the device's. Raises `UserError` on a path or dtype that does not exist there."""
    on_mps = device.type == "mps"
    if on_mps and compute.dtype == "float64":
        raise UserError("--dtype float64: MPS has no float64; use --device cpu")
    attention, moe = compute.attention, compute.moe
    if attention == "auto":
        attention = "masked" if on_mps else "sdpa"
    if moe == "auto":
        moe = "blocks" if on_mps else "grouped"
    for option, path, paths in (("attention", attention, ATTENTION_PATHS), ("moe", moe, EXPERT_PATHS)):
        if path not in paths:
            raise UserError(f"--{option} {path}: torch has {', '.join(paths)}")
    split = compute.mesh[1] > 1
    if split and compute.compile == "on":
        raise UserError(f"--compile on: layers that --mesh {mesh_words(compute.mesh)} splits run uncompiled; use off")
    compiled = compute.compile
    if compiled == "auto":
        compiled = "on" if device.type == "cuda" and not split else "off"
    return dataclasses.replace(compute, attention=attention, moe=moe, compile=compiled)
