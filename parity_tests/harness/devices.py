"""The rung of several devices: training on a mesh is training on one device.

JAX can make a CPU into eight devices, but only before it starts: `measure` and `survey` run `python -m
parity_tests.harness.devices`, which does the work in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np

from parity_tests.harness.cases import CONFIG, case_batch, case_values
from parity_tests.harness.measure import Measurement, relative_error
from parity_tests.harness.mutations import Mutation, first_failure
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import OptimizerConfig, StepResult, TrainingState
from torch_ref.spec.parameters import parameter_table
from train.run.schedule import Schedule

DEVICES = 8
MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2))
"""Sizes of data, fsdp and expert."""
# Which expert path and rematerialisation each mesh runs with: every one of them occurs, and where experts are split
# those that are the default of CPUs and of GPUs.
COMPUTE = (("blocks", "off"), ("dense", "layers"), ("grouped", "experts"), ("pallas", "off"), ("grouped", "experts"))
STEPS, FAULT_STEPS = 20, 1
ROWS, SEQ = 16, 24
BOUND = 1e-10
MODEL = dataclasses.replace(CONFIG, num_layers=2, n_routed_experts=8)
FAULT_MODEL = dataclasses.replace(MODEL, num_layers=1, first_k_dense=0, q_lora_rank=None)
"""Compiled once for each fault."""
SCHEDULE = Schedule(peak=0.01, warmup_steps=3, steps=STEPS, final_ratio=0.1)


def steps_on(
    model: ModelConfig, mesh: tuple[int, int, int], moe: str, remat: str, steps: int
) -> tuple[list[StepResult], dict]:
    """What each step reports, and weights and moments after the last. Every mesh takes its batch in two passes, or in
    one where time counts."""
    from flax_model.backend import FlaxBackend

    passes = 2 if steps > FAULT_STEPS else 1
    rows_per_device = max(ROWS // (passes * int(np.prod(mesh))), 1)
    optimizer = OptimizerConfig(SCHEDULE, weight_decay=0.1, micro_batch_size=rows_per_device)
    backend = FlaxBackend(model, ComputeConfig("float64", moe=moe, remat=remat, mesh=mesh), optimizer, "cpu")
    backend.load_state(TrainingState(model, {row.name: value for row, value in case_values(model)}))
    reports = [backend.step(*case_batch(model, ROWS, SEQ, seed)) for seed in range(steps)]
    state = backend.state()
    tensors = {f"weight of {name}": np.array(state.weights[name]) for name in state.weights}
    for name in (row.name for row in parameter_table(model) if row.trainable):
        tensors[f"second moment of {name}"] = np.array(state.second_moment[name])
    backend.close()
    return reports, tensors


def compare(
    case: str, got: tuple[list[StepResult], dict], expected: tuple[list[StepResult], dict]
) -> list[Measurement]:
    measurements = []

    def add(where: str, error: float, bound: float = BOUND) -> None:
        measurements.append(Measurement("devices", case, "float64", where, error, bound))

    reports, tensors = got
    for name in ("expert_counts", "balance_loss", "loss", "grad_norm"):
        ours, theirs = ([getattr(report, name) for report in run] for run in (reports, expected[0]))
        add(name.replace("_", " "), relative_error(np.stack(ours), np.stack(theirs)), 0 if "counts" in name else BOUND)
    assert tensors.keys() == expected[1].keys()
    for name, tensor in tensors.items():
        add(name, relative_error(tensor, expected[1][name]))
    return measurements


# ------------------------------------------------------------------------------------------------------ planted faults

FAULT_MESH, FAULT_COMPUTE = (2, 2, 2), ("dense", "off")
FAULTS: list[Mutation] = []


def fault(name: str, where: str) -> Callable:
    def register(plant: Callable[[], AbstractContextManager]) -> Callable:
        FAULTS.append(Mutation(name, "devices", where, plant))
        return plant

    return register


def _patch(module: str, name: str, replacement: Callable) -> AbstractContextManager:
    return mock.patch(f"flax_model.{module}.{name}", replacement)


@fault("expert counts of one device stand for all", "expert counts")
def counts_not_summed():
    from flax_model.sharding import sum_over_devices

    def summed(tree, shape):
        total = sum_over_devices(tree, shape)
        return total._replace(expert_counts=tree.expert_counts) if hasattr(tree, "expert_counts") else total

    return _patch("train_step", "sum_over_devices", summed)


@fault("targets counted on one device only", "loss")
def targets_not_summed():
    from flax_model.sharding import sum_over_devices

    return _patch(
        "train_step",
        "sum_over_devices",
        lambda tree, shape: sum_over_devices(tree, shape) if hasattr(tree, "_fields") else tree,
    )


@fault("gradients averaged after they were summed", "grad norm")
def averaged_twice():
    import jax

    from flax_model.sharding import sum_gradients

    def averaged(gradients, config, shape):
        return jax.tree.map(lambda leaf: leaf / DEVICES, sum_gradients(gradients, config, shape))

    return _patch("train_step", "sum_gradients", averaged)


@fault("gradients not summed over the copies of the model", "grad norm")
def gradients_not_summed():
    return _patch("train_step", "sum_gradients", lambda gradients, config, shape: gradients)


@fault("norm of one device's shards", "grad norm")
def norm_of_a_shard():
    from flax_model.sharding import global_norm

    return _patch(
        "train_step", "global_norm", lambda gradients, config, shape: global_norm(gradients, config, (1, 1, 1))
    )


def _swapped(shard, axis: str):
    import jax

    return jax.lax.ppermute(shard, axis, [(0, 1), (1, 0)])


@fault("two shards of each weight swapped", "expert counts")
def shards_swapped():
    from flax_model.sharding import _whole

    return _patch("sharding", "_whole", lambda shard, *where: _whole(_swapped(shard, "fsdp"), *where))


@fault("experts of two devices swapped", "loss")
def experts_swapped():
    from flax_model.expert_parallel import experts_exchanged

    def swapped(run, x, routing, *weights):
        return experts_exchanged(run, x, routing, *(_swapped(weight, "expert") for weight in weights))

    return _patch("moe", "experts_exchanged", swapped)


@fault("outputs come back in the order of experts, not of tokens", "loss")
def order_not_undone():
    import jax.numpy as jnp

    return mock.patch("flax_model.expert_parallel._back_to_tokens", lambda order: jnp.arange(len(order)))


# ------------------------------------------------------------------------------------------------- process and parent


def _work(what: str) -> list:
    """In a process with eight devices: measurements of every mesh, or by which one each fault was caught."""
    import jax

    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == DEVICES
    if what == "meshes":
        found = []
        expected = steps_on(MODEL, (1, 1, 1), "grouped", "off", STEPS)
        for mesh, (moe, remat) in zip(MESHES, COMPUTE, strict=True):
            case = f"data={mesh[0]},fsdp={mesh[1]},expert={mesh[2]}, {moe}, remat {remat}"
            found += compare(case, steps_on(MODEL, mesh, moe, remat, STEPS), expected)
        return [dataclasses.asdict(each) for each in found]
    caught = []
    expected = steps_on(FAULT_MODEL, (1, 1, 1), *FAULT_COMPUTE, FAULT_STEPS)
    for planted in FAULTS:
        with planted.plant():
            first = first_failure(
                compare(planted.name, steps_on(FAULT_MODEL, FAULT_MESH, *FAULT_COMPUTE, FAULT_STEPS), expected)
            )
        caught.append(first and dataclasses.asdict(first))
    return caught


@cache
def _in_a_process(what: str) -> list:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.harness.devices", what],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> list[Measurement]:
    """20 steps on every mesh against the same on one device: counts, losses, norms, and all weights in the end."""
    return [Measurement(**each) for each in _in_a_process("meshes")]


def survey() -> Iterator[tuple[Mutation, Measurement | None]]:
    """Every fault of this rung with what caught it."""
    for planted, caught in zip(FAULTS, _in_a_process("faults"), strict=True):
        yield planted, caught and Measurement(**caught)


if __name__ == "__main__":
    print(json.dumps(_work(sys.argv[1])))
