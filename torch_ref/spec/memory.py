"""How much memory a training step takes, and which rematerialisation makes it fit. NumPy-free arithmetic that both
frameworks use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import count_parameters

Remat = Literal["off", "experts", "layers"]

MARGIN = 1.1
"""Estimates are multiplied by this: allocators keep some memory, and buffers overlap at the peak."""


def step_bytes(
    config: ModelConfig,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    remat: Remat,
    mesh: tuple[int, int, int] = (1, 1, 1),
) -> int:
    """Estimated peak of one training step on one device: parameters, both moments, gradients, and what the backward
    pass keeps.

    `dtype` is the compute dtype; parameters and what belongs to them are float32, or float64 with it. `mesh` are the
    sizes of data, fsdp and expert: a device then holds a shard, and one layer at a time as a whole.
    """
    c = config
    wide, narrow = (8, 8) if dtype == "float64" else (4, 2 if dtype == "bfloat16" else 4)
    tokens = micro_batch_size * seq_len
    # Parameters, two moments, one gradient; and one more where gradients of several micro-batches are summed.
    _, fsdp, expert = mesh
    routed_experts = 3 * c.hidden_size * c.moe_intermediate_size * c.n_routed_experts * c.num_moe_layers
    parameters = (count_parameters(c) - routed_experts + routed_experts // expert) // fsdp
    held = parameters * wide * (5 if micro_batches > 1 else 4)

    norms_and_residuals = 8 * c.hidden_size
    attention = 4 * c.num_heads * c.qk_head_dim + 3 * c.num_heads * (c.qk_head_dim + c.v_head_dim)
    attention += 2 * (c.kv_lora_rank + c.qk_rope_head_dim)
    routed = 2 * c.num_experts_per_tok * c.moe_intermediate_size
    shared = 4 * c.n_shared_experts * c.moe_intermediate_size
    dense_layer = norms_and_residuals + attention + 4 * c.intermediate_size
    moe_layer = norms_and_residuals + attention + shared
    working = 2 * (moe_layer + 2 * routed)  # one layer's backward pass, with gradients beside the activations
    if remat == "layers":
        kept = c.num_layers * c.hidden_size
    else:
        kept = c.first_k_dense * dense_layer + c.num_moe_layers * (moe_layer + (routed if remat == "off" else 0))
    loss = 3 * min(tokens, 512) * c.vocab_size * wide + c.vocab_size * c.hidden_size * wide
    cast_weights = parameters * narrow if narrow != wide else 0
    if fsdp > 1:
        # The embedding and its gradient, and one layer in the forward or backward pass, with its gradient.
        cast_weights += 2 * (c.vocab_size * c.hidden_size * wide + (parameters * fsdp // c.num_layers) * narrow)
    return int(MARGIN * (held + tokens * (kept + working) * narrow + loss + cast_weights))


def choose_remat(
    config: ModelConfig,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    available: int | None,
    mesh: tuple[int, int, int] = (1, 1, 1),
) -> Remat:
    """The cheapest rematerialisation whose estimated step fits `available` bytes; `layers` where none does, `off`
    where the memory is unknown (None)."""
    if available is None:
        return "off"
    choices: tuple[Remat, ...] = ("off", "experts")
    for remat in choices:
        if step_bytes(config, dtype, micro_batch_size, seq_len, micro_batches, remat, mesh) <= available:
            return remat
    return "layers"


def host_memory_available() -> int | None:
    """Bytes a process can still take without swapping: what Linux calls available, within the container's limit;
    elsewhere 70 % of the installed memory; None where the system does not say."""
    limits = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            used = int((cgroup / "memory.current").read_text())
            try:  # the kernel gives the file cache back when memory is asked for
                stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
                cache = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))
            except (OSError, ValueError):
                cache = 0
            limits.append(int(limit) - used + cache)
    except (OSError, KeyError, ValueError):
        pass
    if not limits:
        try:
            limits.append(int(0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, ValueError, AttributeError):  # Windows has no sysconf
            return None
    return min(limits)


def process_peak() -> int | None:
    """Bytes of memory that this process has held at most; None where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            import resource
        except ImportError:  # Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_host_memory(needed: int, what: str) -> None:
    """Raises `UserError` where `needed` bytes are not free: better than being killed by the system half-way."""
    available = host_memory_available()
    if available is not None and needed > available:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; "
            "free some, or use a smaller --preset"
        )
