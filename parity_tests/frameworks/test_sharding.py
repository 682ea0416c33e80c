"""Placement of the Flax model's state on a mesh of devices."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from parity_tests.support.backends import CONFIG
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import UserError


def test_abstract_state_is_that_of_the_model():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    import numpy as np

    from flax_model.sharding import abstract_parameters, decay_mask, make_mesh, partition
    from flax_model.values import from_values
    from torch_ref.spec.parameters import initial_values, parameter_table

    config = dataclasses.replace(CONFIG, first_k_dense=1, num_layers=3, q_lora_rank=8)
    abstract = abstract_parameters(config, np.float32, make_mesh(jax.devices("cpu")[:1], (1, 1, 1)))
    _, *made = from_values(config, initial_values(config, 0))
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), list(trees)) for trees in (abstract, made)]
    assert shapes[0] == shapes[1]
    mask = decay_mask(config)
    assert jax.tree.structure(mask) == jax.tree.structure(abstract[0])
    sizes = jax.tree.map(lambda leaf, decays: leaf.size * decays, abstract[0], mask)
    decayed = sum(row.size for row in parameter_table(config) if row.decay)
    assert sum(jax.tree.leaves(sizes)) == decayed
    # What no dimension of can be split evenly stays whole.
    assert not any(any(partition(row, (1, 7, 1))) for row in parameter_table(CONFIG))
    assert not mask["norm"]["weight"] and mask["layers"]["mlp"]["router"]["weight"]


FOUR_DEVICES = """
import jax
import numpy as np
from flax_model.sharding import abstract_parameters, batch_sharding, make_mesh
from parity_tests.support.backends import CONFIG

devices = jax.devices()
assert len(devices) == 4
params, biases = abstract_parameters(CONFIG, np.float32, make_mesh(devices, (1, 1, 4)))
up = params["layers"]["mlp"]["experts"]["up_proj"]
value = np.arange(np.prod(up.shape), dtype=np.float32).reshape(up.shape)
placed = jax.device_put(value, up.sharding)
for shard in placed.addressable_shards:
    expert = devices.index(shard.device)
    np.testing.assert_array_equal(np.asarray(shard.data), value[:, expert : expert + 1])
assert biases["layers"]["mlp"]["router"]["balance_bias"].sharding.is_fully_replicated
assert params["norm"]["weight"].sharding.is_fully_replicated

mesh = make_mesh(devices, (1, 2, 2))
params, _ = abstract_parameters(CONFIG, np.float32, mesh)
layers, experts, ffn, hidden = up.shape
up = params["layers"]["mlp"]["experts"]["up_proj"]
assert up.sharding.shard_shape(up.shape) == (layers, experts // 2, ffn // 2, hidden)
tokens = jax.device_put(np.zeros((3, 4, 8), np.int32), batch_sharding(mesh))
assert {shard.data.shape for shard in tokens.addressable_shards} == {(3, 1, 8)}
"""


def test_no_device_of_several_processes_is_left_idle(monkeypatch):
    """One process may take some of its devices; of several, one would have none and wait for the others."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax_model.sharding import mesh_devices

    first = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda platform: [first, 1, 2, 3])
    assert mesh_devices(first, (1, 1, 1)) == [first] and mesh_devices(first, (2, 1, 1)) == [first, 1]
    for processes, shape in ((1, (8, 1, 1)), (2, (8, 1, 1)), (2, (1, 2, 1)), (2, (1, 1, 1))):
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        with pytest.raises(UserError, match=f"fsdp={shape[1]},expert=1: takes .* devices, and there are 4"):
            mesh_devices(first, shape)
    assert mesh_devices(first, (2, 2, 1)) == [first, 1, 2, 3]


def test_a_copy_of_the_state_takes_what_this_process_holds():
    """Of an array of sixteen numbers, two shards of four, one of them on two devices."""
    pytest.importorskip("flax")
    import numpy as np

    from flax_model.sharding import own_bytes

    one, other = (SimpleNamespace(index=(slice(at, at + 4),), data=np.zeros(4, np.float32)) for at in (0, 4))
    assert own_bytes({"weight": SimpleNamespace(shape=(16,), addressable_shards=[one, one, other])}) == 32


def test_gradients_of_shards_are_summed_in_float32():
    """Of a step in bfloat16, in which the weights of layers travel; the embedding travels as it is. The program is
    read, not run: the devices need not be here."""
    jax = pytest.importorskip("jax")
    import re

    import numpy as np

    from flax_model.backend import abstract_state
    from flax_model.sharding import BATCH, WHOLE, decay_mask, make_mesh, partition_specs
    from flax_model.train_step import train_step
    from flax_model.values import structure
    from parity_tests.support.backends import OPTIMIZER
    from torch_ref.spec.config import MESH_AXES

    shape, tokens = (1, 8, 1), jax.ShapeDtypeStruct((1, 8, 16), np.int32)
    compute = ComputeConfig("bfloat16", attention="blocked", moe="grouped", mesh=shape)
    state = abstract_state(CONFIG, np.dtype("float32"), make_mesh(jax.devices("cpu")[:1], (1, 1, 1)))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    params, biases = partition_specs(CONFIG, shape)
    specs = {"params": params, "biases": biases, "first_moment": params, "second_moment": params}
    specs |= {"step": WHOLE, "updates": WHOLE}
    settings = {"graphdef": structure(CONFIG), "config": CONFIG, "compute": compute, "optimizer": OPTIMIZER}
    step = partial(train_step, **settings, decay=decay_mask(CONFIG))
    axes = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)  # as a mesh of devices has them
    mesh, parts = jax.sharding.AbstractMesh(shape, MESH_AXES, axes), (specs, BATCH, BATCH, WHOLE)
    step = jax.shard_map(step, mesh=mesh, in_specs=parts, out_specs=(specs, WHOLE), check_vma=False)
    program = str(jax.make_jaxpr(step)(state, tokens, tokens, jax.ShapeDtypeStruct((), np.float32)))
    summed, gathered = (re.findall(rf":(\w+)\[\S* = {name}\[", program) for name in ("reduce_scatter", "all_gather"))
    assert summed == ["f32"] * sum("fsdp" in spec for spec in jax.tree.leaves(params))
    assert set(gathered) == {"bf16", "f32"} and gathered.count("f32") == 1


def test_four_devices_hold_an_expert_each():
    pytest.importorskip("flax")
    root = Path(__file__).parents[2]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    ended = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        cwd=root,
        env=os.environ | env,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
