"""Where JAX computes: which device, in which precision, and by which attention and expert paths.

On Ampere and later GPUs JAX multiplies float32 matrices in TF32 unless told otherwise, and torch does not: set the
environment variable JAX_DEFAULT_MATMUL_PRECISION=highest where float32 runs of the two are to be compared on a GPU.
On the CPU a run repeats bit for bit; on a GPU that takes XLA_FLAGS=--xla_gpu_deterministic_ops=true.

Twins: `torch_ref/device.py`, `flax_model/device.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from flax_model import grouped_kernels
from flax_model.attention import ATTENTION_PATHS
from flax_model.moe import EXPERT_PATHS
from flax_model.sharding import MeshShape, mesh_words
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import host_memory_available, process_peak


def resolve_device(name: str) -> jax.Device:
    """The first such device of this process. `auto` is what JAX prefers: a GPU if there is one. Raises `UserError`
    where there is none."""
    if name == "auto":
        return jax.local_devices()[0]
    kind = {"cuda": "gpu"}.get(name, name)
    try:
        return jax.local_devices(backend=kind)[0]
    except RuntimeError as error:
        usable = ", ".join(sorted({"cpu", jax.default_backend()}))
        hint = "; python -m torch_ref.train trains on MPS" if name == "mps" else ""
        raise UserError(f"--device {name}: not available to this JAX; here it can use {usable}{hint}") from error


def describe(device: jax.Device, shape: MeshShape = (1, 1, 1)) -> str:
    """The device in words, for the log."""
    if device.platform == "cpu":
        name = f"CPU ({platform.machine()}, {os.cpu_count()} threads), jax {jax.__version__}"
    else:
        name = f"{device.device_kind}, jax {jax.__version__}"
    devices, processes = math.prod(shape), jax.process_count()
    several = "" if processes == 1 else f", {processes} processes"
    return name if devices == 1 else f"{devices} x {name}, mesh {mesh_words(shape)}{several}"


def default_dtype(device: jax.Device) -> str:
    """Compute dtype of `--dtype auto`: bfloat16 on a GPU that has it, float32 elsewhere."""
    return "bfloat16" if _has_bfloat16(device) else "float32"


def _has_bfloat16(device: jax.Device) -> bool:
    """NVIDIA GPUs from Ampere (8.0) on. Other makers' capabilities are names, such as gfx942."""
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.replace(".", "").isdecimal() and float(capability) >= 8


def available_memory(device: jax.Device) -> int | None:
    """Bytes that can still be taken on the device (None where it does not say)."""
    if device.platform == "cpu":
        return host_memory_available()
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def peak_memory(device: jax.Device) -> int | None:
    """Bytes that arrays have held at most on the device, of a mesh the first one; on the CPU, of the process."""
    if device.platform == "cpu":
        return process_peak()
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


@contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Profile what is done in the block, and write `folder`/plugins/profile/TIME/perfetto_trace.json.gz."""
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        yield


def resolve_compute(compute: ComputeConfig, device: jax.Device, config: ModelConfig) -> ComputeConfig:
    """`auto` paths replaced by the fastest that the device has for these sizes. Raises `UserError` on a path or dtype
    that does not exist there."""
    on_cpu = device.platform == "cpu"
    if compute.dtype == "float64" and not on_cpu:
        raise UserError("--dtype float64: only on the CPU; use --device cpu")
    attention, moe = compute.attention, compute.moe
    half_on_gpu = _has_bfloat16(device) and compute.dtype == "bfloat16"
    head_size = max(config.qk_head_dim, config.v_head_dim)
    even_heads = head_size % 8 == 0 and head_size <= 128
    has_kernels = _has_bfloat16(device) and grouped_kernels.takes(config.hidden_size, config.moe_intermediate_size)
    if attention == "auto":
        attention = "cudnn" if half_on_gpu and even_heads else "blocked"
    if moe == "auto":
        # Of the paths without kernels `dense` was the faster one on an H100.
        moe = "grouped" if on_cpu else "pallas" if has_kernels else "dense"
    for option, path, paths in (("attention", attention, ATTENTION_PATHS), ("moe", moe, EXPERT_PATHS)):
        if path not in paths:
            raise UserError(f"--{option} {path}: Flax has {', '.join(paths)}")
    if attention == "cudnn" and not half_on_gpu:
        raise UserError("--attention cudnn: needs --dtype bfloat16 and an NVIDIA GPU from 2020 on; use blocked")
    if attention == "cudnn" and not even_heads:
        raise UserError(
            f"--attention cudnn: takes heads of 8, 16, ..., 128 values, not {head_size} (--qk-nope-head-dim + "
            "--qk-rope-head-dim, or --v-head-dim); use blocked"
        )
    if moe == "pallas" and not (on_cpu or has_kernels):
        raise UserError(
            "--moe pallas: needs an NVIDIA GPU from 2020 on, and --hidden-size and --moe-intermediate-size that 16 "
            "divides; use dense"
        )
    return dataclasses.replace(compute, attention=attention, moe=moe)
