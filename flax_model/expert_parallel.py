"""Routed experts spread over devices: tokens travel to the devices that hold their experts, and their outputs back.

Every device has tokens of its own and the weights of some experts. A token's choice is a row; rows sorted by expert
are sorted by device, too. Nothing is dropped: a device has room for the rows of all devices choosing its experts.

    rows of my tokens, by expert  --exchange-->  rows for my experts  --experts-->  outputs  --exchange-->  my rows

Runs inside `jax.shard_map`, on the mesh axis `expert` (GShard, Lepikhin et al. 2021, without its capacity).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXIS = "expert"


def experts_exchanged(
    run: Callable[..., Float[Array, "received hidden"]],
    x: Float[Array, "tokens hidden"],
    routing: Any,
    gate: Float[Array, "local ffn hidden"],
    up: Float[Array, "local ffn hidden"],
    down: Float[Array, "local hidden ffn"],
) -> Float[Array, "tokens hidden"]:
    """The sum of each token's weighted experts. `run(x, routing, gate, up, down)` computes experts of one device, where
    a choice of expert `local` (one past the last) stands for none; `routing` chooses among the experts of all."""
    tokens, topk = routing.chosen.shape
    local, devices = gate.shape[0], jax.lax.axis_size(AXIS)
    flat = routing.chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = (flat[:, None] == jnp.arange(local * devices)).sum(0, dtype=jnp.int32)
    # [from, to, expert of `to`]: the same on every device, so that everybody knows every exchange.
    everyones = jax.lax.all_gather(counts, AXIS).reshape(devices, devices, local)
    sizes = everyones.sum(-1)
    received = devices * tokens * min(topk, local)  # a token picks an expert at most once

    rows = exchange(x[order // topk], sizes, received)
    # Rows arrive sender by sender, each sender's by expert.
    ends = jnp.cumsum(everyones[:, jax.lax.axis_index(AXIS)].reshape(-1))
    run_of_row = jnp.searchsorted(ends, jnp.arange(received), side="right")
    expert = jnp.where(run_of_row < devices * local, run_of_row % local, local)
    ones = jnp.ones((received, 1), routing.weights.dtype)
    out = run(rows, routing._replace(chosen=expert[:, None], weights=ones), gate, up, down)

    out = exchange(out, sizes.T, tokens * topk)[_back_to_tokens(order)].reshape(tokens, topk, -1)
    weighted = out.astype(routing.weights.dtype) * routing.weights[..., None]
    return weighted.sum(1).astype(x.dtype)


def _back_to_tokens(order: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """Where in the sorted rows each choice is."""
    return jnp.argsort(order)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(
    rows: Float[Array, "rows hidden"], sizes: Int[Array, "devices devices"], room: int
) -> Float[Array, "room hidden"]:
    """Every device's rows to the devices they are for: `sizes[i, j]` rows go from i to j, in the order of the
    receivers; they arrive in the order of the senders, and the room behind them is filled with zeros."""
    me = jax.lax.axis_index(AXIS)
    starts = jnp.cumsum(sizes, axis=1) - sizes  # where on the sender
    places = jnp.cumsum(sizes, axis=0) - sizes  # where on the receiver

    def ragged(rows):
        empty = jnp.zeros((room, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, empty, starts[me], sizes[me], places[me], sizes[:, me], axis_name=AXIS)

    def everything(rows):
        """Where XLA has no such collective (CPU): the rows of all, of which each device takes its own."""
        row = jnp.arange(room)
        sender = jnp.searchsorted(jnp.cumsum(sizes[:, me]), row, side="right")
        known = jnp.minimum(sender, len(sizes) - 1)
        taken = jax.lax.all_gather(rows, AXIS)[known, starts[known, me] + row - places[known, me]]
        return jnp.where((sender < len(sizes))[:, None], taken, 0)

    return jax.lax.platform_dependent(rows, cuda=ragged, default=everything)


def _exchange_forward(rows, sizes, room):
    return exchange(rows, sizes, room), (sizes, jnp.zeros((len(rows), 0)))


def _exchange_backward(room, saved, gradient):
    sizes, like = saved
    return exchange(gradient, sizes.T, len(like)), None


exchange.defvjp(_exchange_forward, _exchange_backward)
