"""How much memory a training step takes, and which rematerialisation makes it fit. NumPy-free arithmetic that both
frameworks use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import count_parameters

Remat = Literal["off", "experts", "layers"]
Framework = Literal["flax", "torch"]

MARGIN = 1.1
"""Estimates are multiplied by this where something is chosen by them: better one size too small than no step."""

PROCESS_BYTES = {"flax": 1_100_000_000, "torch": 350_000_000}
"""What a process on a CPU holds besides its arrays: the interpreter, the libraries, and for Flax what compiling the
step leaves behind. Measured on Linux; it varies by a fifth."""

UNCOMPILED_EXPERTS = 400_000_000
"""So much less in Flax where no layer has experts: they are compiled for many numbers of rows."""


def step_parts(
    config: ModelConfig,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    remat: Remat,
    mesh: tuple[int, int, int] = (1, 1, 1),
    *,
    loss_chunk: int = 512,
    framework: Framework = "flax",
    on_gpu: bool = False,
) -> dict[str, int]:
    """Estimated bytes that one device holds at the peak of a training step, by part. How near it comes is measured in
    docs/plan.md.

    `dtype` is the compute dtype; parameters and what belongs to them are float32, or float64 with it. `mesh` are the
    sizes of data, fsdp and expert: a device then holds a shard, and one layer at a time as a whole. `loss_chunk` are
    the tokens whose logits exist at once. On a CPU the whole process counts, on a GPU its arrays.
    """
    c, flax = config, framework == "flax"
    wide, narrow = (8, 8) if dtype == "float64" else (4, 2 if dtype == "bfloat16" else 4)
    tokens = micro_batch_size * seq_len
    chunk = min(tokens, loss_chunk)
    # Processors without bfloat16 units: products take float32 copies of their operands (`operand` in cpu.py).
    widened = narrow < wide and not on_gpu
    operand = wide if widened else narrow
    _, fsdp, expert = mesh
    embedding = c.vocab_size * c.hidden_size
    routed_weights = 3 * c.hidden_size * c.moe_intermediate_size * c.n_routed_experts * c.num_moe_layers
    whole = count_parameters(c) - routed_weights + routed_weights // expert
    parameters = whole // fsdp
    one_layer = (whole - embedding) // c.num_layers

    # Values a token leaves behind in a layer. Where experts are on other devices, each has room for all rows that might
    # come (flax_model/expert_parallel.py).
    choices = c.num_experts_per_tok
    if expert > 1:
        choices = expert * min(choices, c.n_routed_experts // expert)
    routed = 2 * choices * c.moe_intermediate_size
    if flax:  # what `kept` in flax_model/block.py names, and the layer's input
        padded = c.qk_head_dim if dtype == "bfloat16" and on_gpu else c.v_head_dim  # cuDNN wants one head size
        attention = c.num_heads * (c.qk_head_dim + padded + wide // narrow)
        attention += c.num_kv_heads * (c.qk_head_dim + padded)
        dense, shared = 2 * c.intermediate_size, 2 * c.n_shared_experts * c.moe_intermediate_size
    else:  # what autograd saves: norms and residuals, heads before and after they are turned, both factors of SwiGLU
        attention = 6 * c.hidden_size + 2 * (c.num_heads + c.num_kv_heads) * c.qk_head_dim
        attention += (c.num_heads + c.num_kv_heads) * c.v_head_dim + 2 * c.kv_lora_rank
        dense, shared = 4 * c.intermediate_size, 4 * c.n_shared_experts * c.moe_intermediate_size
    layer_input, q_latent = c.hidden_size, c.q_lora_rank or 0
    # torch keeps the latents of queries, in and around their norm; their gradients come when those of heads are gone.
    kept_latents = 0 if flax else 3 * q_latent
    moe_layer = layer_input + attention + kept_latents + shared
    dense_layer = layer_input + attention + kept_latents + dense
    kept_routed = c.num_moe_layers * routed if remat == "off" else 0
    if remat == "layers":
        kept = c.num_layers * layer_input * narrow
    else:
        kept = c.first_k_dense * dense_layer + c.num_moe_layers * moe_layer
        # torch keeps the widened operands for the backward pass, and about half of the values in bfloat16 besides.
        kept *= wide + narrow // 2 if widened and not flax else narrow

    # Of the layer whose backward pass is at work: what it makes again, and gradients of what it kept.
    again = {"off": 0, "experts": routed, "layers": moe_layer + routed}[remat]
    rows = choices * (3 * c.moe_intermediate_size + 2 * c.hidden_size)
    # torch lets go of the experts' gradients before it comes to attention's.
    gradients_at_work = 2 * attention + 2 * shared + rows if flax else max(2 * attention, 2 * shared + rows)
    if flax:  # latents of queries before and after their norm, made again, and their gradients
        gradients_at_work += 4 * q_latent
    working = tokens * (again + gradients_at_work) * operand + one_layer * wide
    if flax and not on_gpu:  # scores of all query blocks, twice as gradients
        working += 3 * micro_batch_size * c.num_heads * seq_len * seq_len // 2 * wide
    if flax:
        logits = wide + narrow + (wide if widened else 0)
    else:  # and as much again for their exponentials
        logits = 2 * wide + (narrow if widened else 0)
    loss = chunk * c.vocab_size * logits + embedding * (narrow if narrow < wide else 0)
    loss += embedding * wide if widened else 0
    if flax or micro_batches == 1:  # the layers' gradients do not exist yet while the loss is taken
        loss -= (parameters - embedding // fsdp) * wide
    at_work = max(loss, working)
    if not flax or tokens > chunk:  # the embedding's gradient: before and after it is scaled; until the pass ends
        at_work += embedding * wide
    if flax and micro_batches > 1:  # and the sum that it is added to, before and after
        at_work += embedding * wide

    gradients = parameters * wide
    if micro_batches > 1:  # torch sums whole ones before it splits them (`begin_step` in torch_ref/backend.py)
        gradients = 2 * gradients if flax else whole * wide
    activations = tokens * (kept + kept_routed * narrow)
    if not flax and not on_gpu and remat != "off" and micro_batches == 1:
        activations = max(0, activations - gradients)  # freed blocks go back to the system: see torch_ref/cpu.py
    parts = {
        "parameters": parameters * wide,
        "optimizer moments": 2 * parameters * wide,
        "gradients": gradients,
        "activations kept for the backward pass": activations,
        "logits or the layer at work": at_work,
    }
    if widened and flax:
        parts["weights in the compute dtype"] = parameters * narrow
    if fsdp > 1:
        # The embedding and its gradient, and one layer in the forward or backward pass, with its gradient.
        parts["gathered from the other devices"] = 2 * embedding * wide + one_layer * (narrow + wide)
    if not on_gpu:
        parts["the process itself"] = PROCESS_BYTES[framework] - UNCOMPILED_EXPERTS * (flax and not c.num_moe_layers)
    return parts


def step_bytes(*sizes: Any, **more: Any) -> int:
    """Bytes to have free for a training step on one device: the sum of `step_parts`, which takes the same arguments,
    and a margin."""
    return int(MARGIN * sum(step_parts(*sizes, **more).values()))


def choose_remat(
    config: ModelConfig,
    dtype: str,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    available: int | None,
    mesh: tuple[int, int, int] = (1, 1, 1),
    **more: Any,
) -> Remat:
    """The cheapest rematerialisation whose estimated step fits `available` bytes; `layers` where none does, `off`
    where the memory is unknown (None). `more` as in `step_parts`."""
    if available is None:
        return "off"
    choices: tuple[Remat, ...] = ("off", "experts")
    for remat in choices:
        if step_bytes(config, dtype, micro_batch_size, seq_len, micro_batches, remat, mesh, **more) <= available:
            return remat
    return "layers"


def host_memory_available() -> int | None:
    """Bytes a process can still take without swapping: what Linux calls available, within the limits of a container or
    a job; elsewhere 70 % of the installed memory; None where the system does not say."""
    limits = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
        limits += _left_by_control_groups()
    except (OSError, KeyError, ValueError):
        pass
    if not limits:
        try:
            limits.append(int(0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, ValueError, AttributeError):  # Windows has no sysconf
            return None
    return min(limits)


def _left_by_control_groups() -> Iterator[int]:
    """What the control groups (version 2) that this process is in leave of their limits: a container sees its own as
    the outermost one, a job of SLURM or a unit of systemd is further in."""
    group = Path("/sys/fs/cgroup")
    for name in Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip().split("/"):
        group = group / name  # "" first: the outermost
        try:
            limit = (group / "memory.max").read_text().strip()
        except OSError:  # a machine's outermost has none
            continue
        if limit != "max":
            used = int((group / "memory.current").read_text())
            try:  # the kernel gives the file cache back when memory is asked for
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cache = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))
            except (OSError, ValueError):
                cache = 0
            yield int(limit) - used + cache


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
