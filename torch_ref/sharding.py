"""Where each tensor lives when several processes train one model: whole in each (`data`), or a part of it (`fsdp`).

A mesh has two axes (`expert` is Flax's alone); every process has rows of the batch of its own, whatever the shape.

- `data`: copies of the model, whose gradients are summed once a step
- `fsdp`: torch's FSDP2 (`fully_shard`) splits each parameter along its first dimension, gathers it layer by layer where
  it is used, and sums its gradient back into the parts (ZeRO-3, Rajbhandari et al. 2020)

Buffers, which are the balance biases, are small and whole everywhere. The optimizer works on the parts as plain
tensors. Without several processes each function gives back what it is given. `flax_model/sharding.py` is the
counterpart, on JAX's own arrays. FSDP and `DTensor` are imported where a model is split: that takes half a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torch_ref.processes import WAIT
from torch_ref.spec.config import MESH_AXES
from torch_ref.spec.interface import UserError
from torch_ref.spec.processes import Processes

BUCKET = 2**26
"""Bytes that are summed in one message, at most, or one tensor."""


def mesh_words(shape: Sequence[int]) -> str:
    """As `--mesh` takes it."""
    sizes = zip(MESH_AXES, shape, strict=True)
    return ",".join(f"{axis}={size}" for axis, size in sizes if axis != "expert" or size > 1)


class Mesh(NamedTuple):
    """Groups that this process belongs to; None where it would be the only one."""

    data: dist.ProcessGroup | None
    """Those that hold the same parts."""
    fsdp: DeviceMesh | None
    """Those that hold the parts of one copy."""


def make_mesh(processes: Processes, shape: tuple[int, int, int], device: torch.device) -> Mesh:
    """Processes as [data, fsdp]: neighbours, which are joined fastest, share parts. Raises `UserError` where there are
    not as many, or experts would be spread."""
    wanted = math.prod(shape)
    if shape[2] > 1:
        raise UserError(f"--mesh {mesh_words(shape)}: torch has data and fsdp; Flax alone spreads experts")
    if wanted != processes.count:
        start = f"torchrun --nproc-per-node {wanted} -m torch_ref.train"
        raise UserError(
            f"--mesh {mesh_words(shape)}: takes {wanted} processes, and there are {processes.count}; start {start}"
        )
    numbers = torch.arange(wanted).view(shape[:2])
    data, fsdp = (_own_group(processes, groups) for groups in (numbers.T, numbers))
    return Mesh(data, fsdp and DeviceMesh.from_group(fsdp, device.type, mesh_dim_names=("fsdp",)))


def _own_group(processes: Processes, groups: Tensor) -> dist.ProcessGroup | None:
    """Makes a group of each row of numbers, which all processes have to do alike."""
    if groups.shape[1] == 1:
        return None
    if groups.shape[1] == processes.count:
        return dist.group.WORLD
    made = [dist.new_group(members, timeout=timedelta(seconds=WAIT)) for members in groups.tolist()]
    return next(group for group, members in zip(made, groups.tolist(), strict=True) if processes.index in members)


def shard_model(model: nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Split the parameters of a model without values (made on `meta`) over the axis `fsdp`, and make room for them on
    the device: nowhere is it whole. Its layers are gathered one after the other."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in model.layers:
        fully_shard(block, mesh=mesh.fsdp)
    fully_shard(model, mesh=mesh.fsdp)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Shares of the objective add up: gradients are summed, where FSDP would take their mean. In float32 it
            # would ask for a product and a sum in one, which gloo lacks, even where the factor is 1.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    model.unshard()  # sets the parts up, which from then on stay where they are
    model.reshard()


def is_split(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if is_split(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, which all of them have, as `like` is split."""
    if not is_split(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def spread(part: Tensor, like: Tensor) -> Tensor:
    """The tensor that the parts of all processes make up, split as `like` is."""
    if not is_split(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which all ask for it at the same point."""
    return tensor.full_tensor() if is_split(tensor) else tensor


@torch.no_grad()
def sum_over(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor, in place, over the processes of a group, if there is one: few messages for many tensors."""
    if group is None:
        return
    bucket: list[Tensor] = []

    def send() -> None:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        bucket.clear()

    for tensor in tensors:
        if bucket and sum(each.nbytes for each in bucket) + tensor.nbytes > BUCKET:
            send()
        bucket.append(tensor)
    if bucket:
        send()
