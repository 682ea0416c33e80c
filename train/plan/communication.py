"""What the devices of a mesh say to each other in a training step of Flax, and how long that takes at the bandwidths
of a card's data sheet.

Counted from `flax_model/sharding.py` and `flax_model/expert_parallel.py`; `--compile` lists what XLA makes of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_ref.spec.config import MESH_AXES
from torch_ref.spec.parameters import parameter_table
from train.plan.cards import Card
from train.run.options import Options


class Collective(NamedTuple):
    """Messages of one kind over one axis of the mesh, in one step."""

    name: str
    what: str
    axis: str
    bytes: float
    """Sent by one device."""
    seconds: float
    """At the bandwidth between its devices, if nothing else is sent meanwhile."""


class Layout(NamedTuple):
    """How the devices of an axis lie: how many hosts one group of them is spread over, and how many are on each."""

    size: int
    hosts: int

    @property
    def per_host(self) -> int:
        return self.size // self.hosts


def layouts(shape: tuple[int, int, int], gpus_per_host: int) -> dict[str, Layout]:
    """By axis. Devices are numbered host by host, with the experts' axis the innermost (`sharding.make_mesh`)."""
    found, stride = {}, 1
    for axis, size in zip(reversed(MESH_AXES), reversed(shape), strict=True):
        together = max(1, min(size, gpus_per_host // stride))
        found[axis] = Layout(size, -(-size // together))
        stride *= size
    return found


def gathering(whole: float, layout: Layout, card: Card) -> tuple[float, float]:
    """Bytes that each device takes in, and seconds, for `whole` bytes that are gathered (or, the other way round,
    summed and scattered) among the devices of an axis: in a host each link carries all but the device's own part;
    between hosts, the network of all a host's devices carries what the other hosts hold."""
    size, hosts = layout.size, layout.hosts
    received = whole * (size - 1) / size
    between = whole * (hosts - 1) / hosts / layout.per_host
    return received, max(received / card.link if layout.per_host > 1 else 0, between / card.network)


def exchange(held: float, layout: Layout, card: Card) -> tuple[float, float]:
    """The same where each device sends a part of what it holds to every other one."""
    size = layout.size
    sent, far = held * (size - 1) / size, held * (layout.hosts - 1) / layout.hosts
    return sent, max((sent - far) / card.link, far / card.network)


def collectives(options: Options, card: Card, gpus_per_host: int) -> list[Collective]:
    """Of one step; none on one device."""
    c, shape = options.model, options.mesh_shape
    _, fsdp, expert = shape
    places = layouts(shape, gpus_per_host)
    wide = 8 if options.dtype == "float64" else 4
    narrow = {"float64": 8, "bfloat16": 2}.get(options.dtype, 4)
    rows = [row for row in parameter_table(c) if row.trainable]
    # What a device of the fsdp axis works with: its experts, and everything else.
    held = {row.name: row.size // (expert if row.axes[0] == "experts" and len(row.shape) == 3 else 1) for row in rows}
    embedding = held["embed_tokens.weight"]
    small = sum(row.size for row in rows if len(row.shape) == 1 or "router" in row.name)
    layers = sum(held.values()) - embedding - small
    routed = sum(held[row.name] for row in rows if len(row.shape) == 3)
    micro = options.micro_batches
    found: list[Collective] = []

    def add(name: str, what: str, axis: str, times: int, bytes_and_seconds: tuple[float, float]) -> None:
        sent, seconds = bytes_and_seconds
        found.append(Collective(name, what, axis, times * sent, times * seconds))

    if fsdp > 1:
        place = places["fsdp"]
        add("all-gather", "a layer's weights, forward and backward", "fsdp", 2 * micro,
            gathering(layers * narrow, place, card))  # fmt: skip
        add("all-gather", "the embedding", "fsdp", micro, gathering(embedding * wide, place, card))
        add("reduce-scatter", "gradients", "fsdp", micro, gathering((layers + embedding) * wide, place, card))
        add("all-reduce", "gradients of norms and routers", "fsdp", 2, gathering(small * wide, place, card))
    if expert > 1:
        place = places["expert"]
        tokens = options.rows_per_pass * options.seq_len
        chosen = tokens * c.num_experts_per_tok * c.hidden_size * narrow
        # There and back; forward, again for the backward pass, and the gradients.
        add("all-to-all", "rows for experts, and their outputs", "expert", 6 * micro * c.num_moe_layers,
            exchange(chosen, place, card))  # fmt: skip
        common = (layers - routed + embedding) // fsdp + small
        add("all-reduce", "gradients of all but the experts", "expert", 2, gathering(common * wide, place, card))
    if shape[0] > 1:
        shard = (layers + embedding) // fsdp + small
        add("all-reduce", "gradients", "data", 2, gathering(shard * wide, places["data"], card))
    return found
