"""The optimizer step of Flax as pure functions of the training state, which `FlaxBackend` compiles.

- micro-batches run inside the step by `lax.scan`
- it is written for one device and its shard of the state; the collectives are in `sharding.py`
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from flax_model.cpu import changed_if
from flax_model.model import objective
from flax_model.moe import updated_balance_bias
from flax_model.sharding import gathered_embedding, global_norm, sum_gradients, sum_over_devices
from flax_model.trees import merge
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, OptimizerConfig

State = dict[str, Any]
"""What a step changes and a checkpoint holds: `params`, `biases`, `first_moment`, `second_moment` (nested dicts with
the paths of `parameters.flax_path`), `step` and `updates` (int32)."""


class Metrics(NamedTuple):
    """What a train step reports; the fields of `StepResult` that it computes."""

    loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    applied: Array
    expert_counts: Int[Array, "moe_layers experts"]


def train_step(
    state: State,
    inputs: Int[Array, "micro_batches micro_batch seq"],
    targets: Int[Array, "micro_batches micro_batch seq"],
    rate: Float[Array, ""],
    *,
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    compute: ComputeConfig,
    optimizer: OptimizerConfig,
    decay: dict,
) -> tuple[State, Metrics]:
    """One optimizer step with learning rate `rate`; a pure function of its arguments. `decay` is a tree of bools like
    the parameters'. On a mesh of several devices it runs on each, with its shard of the state and its rows."""
    mesh = compute.mesh
    micro_batches, micro_batch, _ = inputs.shape
    target_count, sequence_count = (targets != IGNORE).sum(), micro_batches * micro_batch * math.prod(mesh)
    target_count = sum_over_devices(target_count, mesh)
    params, biases = state["params"], state["biases"]

    def share(params, inputs, targets):
        model = merge(graphdef, gathered_embedding(params, config, mesh), biases)
        return objective(model, inputs, targets, compute, target_count, sequence_count)

    # `jit`: traced once for the shapes below and the scan, which is a third of the time before compiling begins.
    gradient = jax.jit(jax.grad(share, has_aux=True), inline=True)
    if micro_batches == 1:
        gradients, parts = gradient(params, inputs[0], targets[0])
    else:

        def accumulate(total, micro):
            return jax.tree.map(jnp.add, total, gradient(params, *micro)), None

        shapes = jax.eval_shape(gradient, params, inputs[0], targets[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (gradients, parts), _ = jax.lax.scan(accumulate, zeros, (inputs, targets))

    # Shares of the objective add up, over micro-batches and over devices: nothing is averaged.
    parts = sum_over_devices(parts, mesh)
    gradients = sum_gradients(gradients, config, mesh)
    loss, balance_loss = parts.loss_sum / target_count, parts.balance_sum / sequence_count
    grad_norm = global_norm(gradients, config, mesh)
    applied = jnp.isfinite(loss) & jnp.isfinite(balance_loss) & jnp.isfinite(grad_norm)

    def update(state):
        scale = jnp.minimum(1, optimizer.grad_clip / grad_norm)
        clipped = jax.tree.map(lambda leaf: leaf * scale, gradients)
        new_biases = jax.tree.map(
            lambda bias: updated_balance_bias(bias, parts.expert_counts, config.balance_bias_rate), biases
        )
        return {**state, **adamw(state, clipped, rate, optimizer, decay), "biases": new_biases}

    # Clipping by hand keeps XLA from holding a copy of the gradients, 3 GB at 774 M parameters.
    state = changed_if(applied, update, state)
    metrics = Metrics(loss, balance_loss, grad_norm, applied, parts.expert_counts)
    return {**state, "step": state["step"] + 1}, metrics


def adamw(state: State, gradients: dict, rate: Float[Array, ""], optimizer: OptimizerConfig, decay: dict) -> State:
    """Parameters, moments and update count after an update with these gradients. optax's own `adamw` would count the
    schedule's position in updates; the loop counts steps, skipped ones included, so the rate is applied here."""
    params = state["params"]
    adam = optax.scale_by_adam(*optimizer.betas, optimizer.eps)
    moments = optax.ScaleByAdamState(state["updates"], state["first_moment"], state["second_moment"])
    updates, moments = adam.update(gradients, moments)
    weight_decay = optax.add_decayed_weights(optimizer.weight_decay, mask=decay)
    updates, _ = weight_decay.update(updates, weight_decay.init(params), params)
    return {
        "params": jax.tree.map(lambda param, update: param - rate * update, params, updates),
        "first_moment": moments.mu,
        "second_moment": moments.nu,
        "updates": moments.count,
    }


def loss_sum(
    params: dict,
    biases: dict,
    inputs: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    *,
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, ""]:
    """Sum of the next-token losses in nats, over the rows of all devices."""
    model = merge(graphdef, gathered_embedding(params, config, compute.mesh), biases)
    return sum_over_devices(objective(model, inputs, targets, compute, 1, 1)[1].loss_sum, compute.mesh)
