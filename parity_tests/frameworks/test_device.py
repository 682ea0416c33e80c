"""Devices, computation paths and their self-check, memory estimates, and placement on a mesh."""

import dataclasses
import os
import platform
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from parity_tests.support.backends import CONFIG
from torch_ref.spec import memory
from torch_ref.spec.config import PRESETS, ComputeConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import choose_remat, host_memory_available, step_bytes

FULL = PRESETS["smol-774m"]


@pytest.fixture
def device():
    """torch_ref.device, where torch is installed."""
    pytest.importorskip("torch")
    from torch_ref import device

    return device


@pytest.fixture
def self_check():
    """torch_ref.self_check, where torch is installed."""
    pytest.importorskip("torch")
    from torch_ref import self_check

    return self_check


@pytest.mark.parametrize(
    "cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_auto_takes_cuda_then_mps_then_cpu(device, monkeypatch, cuda, mps, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)  # those devices are not here to be tried
    assert device.resolve_device("auto").type == expected


@pytest.mark.parametrize("name", ["mps", "tpu", "cuda:9"])
def test_absent_torch_device_is_refused_by_name(device, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}.*cpu"):
        device.resolve_device(name)


def test_default_dtypes(device, monkeypatch):
    import torch

    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    dtypes = {name: device.default_dtype(torch.device(name)) for name in ("cuda", "mps", "cpu")}
    assert dtypes == {"cuda": "bfloat16", "mps": "float32", "cpu": "float32"}
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    assert device.default_dtype(torch.device("cuda")) == "float32"


def test_paths_of_each_device(device):
    """On MPS: an explicit mask, and expert shapes that do not depend on the routing. On CUDA layers are compiled unless
    told otherwise."""
    import torch

    paths = {}
    for name in ("mps", "cuda", "cpu"):
        compute = device.resolve_compute(ComputeConfig(), torch.device(name))
        paths[name] = compute.attention, compute.moe, compute.compile
    assert paths == {
        "mps": ("masked", "blocks", "off"),
        "cuda": ("sdpa", "grouped", "on"),
        "cpu": ("sdpa", "grouped", "off"),
    }
    assert device.resolve_compute(ComputeConfig(compile="off"), torch.device("cuda")).compile == "off"
    assert device.resolve_compute(ComputeConfig(compile="on"), torch.device("cpu")).compile == "on"
    with pytest.raises(UserError, match="--dtype float64"):
        device.resolve_compute(ComputeConfig("float64"), torch.device("mps"))
    for option in ("attention", "moe"):
        with pytest.raises(UserError, match=f"--{option} fast: .*(sdpa|grouped)"):
            device.resolve_compute(ComputeConfig(**{option: "fast"}), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_self_check_passes_what_is_right(self_check, recwarn, dtype):
    import torch

    from torch_ref.attention import ATTENTION_PATHS
    from torch_ref.moe import EXPERT_PATHS

    cpu = torch.device("cpu")
    for attention in ATTENTION_PATHS:
        assert self_check.attention_error(attention, dtype, cpu) is None
        assert self_check.attention_error(attention, dtype, cpu, between_documents=True) is None
    for moe in EXPERT_PATHS:
        assert self_check.experts_error(moe, dtype, cpu) is None
    compute = ComputeConfig(dtype, attention="masked", moe="blocks")
    assert self_check.self_checked(compute, cpu) == compute
    assert not recwarn.list


def _leaks(q, k, v, scale, _):
    """Causal by groups of 4 queries, as a fused kernel once was."""
    import torch

    seq = q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bshd->bhqs", q.float(), k.float()) * scale
    last_seen = (torch.arange(seq) // 4 * 4 + 3)[:, None]
    visible = (torch.arange(seq) <= last_seen) & (torch.arange(seq) < seq)
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqs,bshd->bqhd", probabilities, v.float()).to(q.dtype)


def _forgets_scale(q, k, v, scale, _):
    from torch_ref.attention import attend_plain

    return attend_plain(q, k, v, 1.0)


def _not_a_number(q, k, v, scale, _):
    from torch_ref.attention import attend_plain

    return attend_plain(q, k, v, scale) * float("nan")


@pytest.mark.parametrize("broken", [_leaks, _forgets_scale, _not_a_number])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_attention_is_replaced_with_a_warning(self_check, monkeypatch, broken, dtype):
    import torch

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "masked", broken)
    with pytest.warns(UserWarning, match="--attention masked is wrong.*using the slower plain"):
        settled = self_check.self_checked(ComputeConfig(dtype, attention="masked", moe="blocks"), torch.device("cpu"))
    assert (settled.attention, settled.moe) == ("plain", "blocks")


def test_attention_that_does_not_keep_to_documents_is_replaced_where_it_has_to(self_check, monkeypatch, recwarn):
    import torch

    from torch_ref.attention import attend_plain

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "masked", lambda *operands: attend_plain(*operands[:4]))
    compute, cpu = ComputeConfig(attention="masked", moe="dense"), torch.device("cpu")
    assert self_check.self_checked(compute, cpu) == compute and not recwarn.list
    with pytest.warns(UserWarning, match="--attention masked is wrong.*using the slower plain"):
        settled = self_check.self_checked(dataclasses.replace(compute, separator=0), cpu)
    assert (settled.attention, settled.separator) == ("plain", 0)


def test_wrong_experts_are_replaced_with_a_warning(self_check, monkeypatch):
    import torch

    right = self_check.EXPERT_PATHS["blocks"]

    def drops_a_choice(x, routing, gate, up, down, remat):
        weights = routing.weights.clone()
        weights[-1, 1] = 0
        return right(x, routing._replace(weights=weights), gate, up, down, remat)

    monkeypatch.setitem(self_check.EXPERT_PATHS, "blocks", drops_a_choice)
    with pytest.warns(UserWarning, match="--moe blocks is wrong.*using the slower dense"):
        settled = self_check.self_checked(ComputeConfig(attention="masked", moe="blocks"), torch.device("cpu"))
    assert (settled.attention, settled.moe) == ("masked", "dense")


def test_a_path_that_fails_is_replaced_too(self_check, monkeypatch):
    import torch

    def refuses(*_):
        raise RuntimeError("grouped_mm: not on this card")

    monkeypatch.setitem(self_check.EXPERT_PATHS, "blocks", refuses)
    with pytest.warns(UserWarning, match="--moe blocks is wrong.*not on this card; using the slower dense"):
        settled = self_check.self_checked(
            ComputeConfig("float64", attention="masked", moe="blocks"), torch.device("cpu")
        )
    assert (settled.attention, settled.moe) == ("masked", "dense")


def test_device_that_is_wrong_throughout_is_refused(self_check, monkeypatch):
    import torch

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "plain", _leaks)
    with pytest.raises(UserError, match="even --attention plain is wrong.*use --device cpu"):
        self_check.self_checked(ComputeConfig(attention="plain", moe="dense"), torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self: None)
    with pytest.raises(UserError, match="AdamW does not move the weights"):
        self_check.self_checked(ComputeConfig(attention="plain", moe="dense"), torch.device("cpu"))


class Asked(Exception):
    """The self-check was asked for."""


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("used_by", ["training", "training within documents", "a trained model"])
def test_paths_are_checked_off_the_cpu(monkeypatch, framework, used_by):
    """There is no device here but the CPU: another's name is put in its place."""
    package = {"torch": "torch_ref", "flax": "flax_model"}[framework]
    pytest.importorskip({"torch": "torch", "flax": "jax"}[framework])
    from parity_tests.support.backends import make_backend
    from train.state.trained import open_in

    device, backend, self_check = (import_module(f"{package}.{name}") for name in ("device", "backend", "self_check"))
    elsewhere = SimpleNamespace(type="mps", platform="gpu")
    made = make_backend(framework) if used_by == "training within documents" else None
    for module in (device, backend, self_check):
        monkeypatch.setattr(module, "resolve_device", lambda name: elsewhere, raising=False)
        monkeypatch.setattr(module, "resolve_compute", lambda compute, *_: compute, raising=False)
        monkeypatch.setattr(module, "default_dtype", lambda device: "float32", raising=False)
        monkeypatch.setattr(module, "self_checked", Mock(side_effect=Asked), raising=False)
    with pytest.raises(Asked):
        if used_by == "training":
            make_backend(framework)
        elif made:
            made._device = elsewhere
            made.keep_within_documents(5)
        else:
            open_in(framework, SimpleNamespace(model_config=CONFIG), "auto", "auto")
    if made:
        assert backend.self_checked.call_args.args[0].separator == 5


def test_mps_choices_train_on_the_cpu_to_the_same_numbers(device):
    """The paths that MPS uses, run where they can be: same loss, gradients and counts as the CPU's own."""
    import numpy as np

    from parity_tests.support.backends import COMPUTE, arrays, assert_close, batch, make_backend

    results, states = [], []
    for compute in (COMPUTE, dataclasses.replace(COMPUTE, attention="masked", moe="blocks")):
        backend = make_backend("torch", compute=compute)
        backend.init(0)
        results.append(backend.step(*batch(0)))
        states.append({name: value for name, value in arrays(backend.state()).items() if name.startswith("first")})
    np.testing.assert_allclose(results[1].loss, results[0].loss, rtol=1e-6)
    np.testing.assert_array_equal(results[1].expert_counts, results[0].expert_counts)
    assert_close(states[1], states[0], 1e-5)


def test_flax_devices_and_paths():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax_model import device

    cpu = device.resolve_device("cpu")
    assert cpu.platform == "cpu" and "CPU" in device.describe(cpu)
    assert device.default_dtype(cpu) == "float32"
    with pytest.raises(UserError, match="--device mps.*torch_ref.train"):
        device.resolve_device("mps")
    if jax.default_backend() == "cpu":
        assert device.resolve_device("auto") == cpu
        with pytest.raises(UserError, match="--device cuda"):
            device.resolve_device("cuda")
    compute = device.resolve_compute(ComputeConfig(), cpu, CONFIG)
    assert (compute.attention, compute.moe) == ("blocked", "grouped")
    with pytest.raises(UserError, match="--attention cudnn"):
        device.resolve_compute(ComputeConfig(attention="cudnn"), cpu, CONFIG)
    with pytest.raises(UserError, match="--moe fast: Flax has .*grouped"):
        device.resolve_compute(ComputeConfig(moe="fast"), cpu, CONFIG)


def test_flax_choices_on_gpus():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax_model import device

    def gpu(capability):
        return Mock(spec=jax.Device, platform="gpu", compute_capability=capability)

    def paths(where, dtype, **sizes):
        compute = device.resolve_compute(ComputeConfig(dtype), where, dataclasses.replace(FULL, **sizes))
        return compute.attention, compute.moe

    new, old, amd = gpu("9.0"), gpu("7.5"), gpu("gfx942")
    assert [device.default_dtype(each) for each in (new, old, amd)] == ["bfloat16", "float32", "float32"]
    assert paths(new, "bfloat16") == ("cudnn", "pallas")
    assert paths(new, "float32") == ("blocked", "pallas")
    assert paths(old, "bfloat16") == paths(amd, "bfloat16") == ("blocked", "dense")
    # What the kernels do not take: heads of 12 + 8 (padded to the values' 64 they are taken), an ffn that is no
    # multiple of 16.
    heads = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    assert paths(new, "bfloat16", **heads) == ("blocked", "pallas")
    assert paths(new, "bfloat16", **heads | {"v_head_dim": 64}) == ("cudnn", "pallas")
    assert paths(new, "bfloat16", **heads | {"v_head_dim": 136}) == ("blocked", "pallas")
    assert paths(new, "bfloat16", moe_intermediate_size=1500) == ("cudnn", "dense")
    odd = dataclasses.replace(FULL, **heads, moe_intermediate_size=1500)
    with pytest.raises(UserError, match="--attention cudnn: .* not 20"):
        device.resolve_compute(ComputeConfig("bfloat16", attention="cudnn"), new, odd)
    with pytest.raises(UserError, match="--moe pallas: .*--moe-intermediate-size"):
        device.resolve_compute(ComputeConfig("bfloat16", moe="pallas"), new, odd)
    with pytest.raises(UserError, match="--dtype float64"):
        device.resolve_compute(ComputeConfig("float64"), new, FULL)


def test_remat_is_the_cheapest_that_fits():
    sizes = PRESETS["smol-774m"], "float32", 1, 2048, 1
    off, experts, layers = (step_bytes(*sizes, remat) for remat in ("off", "experts", "layers"))
    assert off > experts > layers
    choices = [choose_remat(*sizes, available) for available in (None, off, off - 1, experts - 1, 0)]
    assert choices == ["off", "off", "experts", "layers", "layers"]


def test_a_backend_that_rematerialises_returns_freed_blocks():
    """Blocks of 8 MB between others that stay: freed, they leave the process."""
    pytest.importorskip("torch")
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library's allocator")
    program = """
import sys, torch
from pathlib import Path
from parity_tests.support.backends import COMPUTE, CONFIG, OPTIMIZER
from dataclasses import replace
from torch_ref.backend import TorchBackend

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.ones(2**22)  # 16 MB, freed: the allocator would keep blocks up to this size from here on
TorchBackend(CONFIG, replace(COMPUTE, remat=sys.argv[1]), OPTIMIZER, "cpu")
blocks = [torch.ones(2**21) for _ in range(40)]
before = resident()
del blocks[::2]
print(before - resident())
"""
    returned = {
        remat: int(subprocess.run([sys.executable, "-c", program, remat], check=True, capture_output=True).stdout)
        for remat in ("off", "experts")
    }
    assert returned["experts"] > 150e6 > 20e6 > returned["off"]


def test_host_memory_is_limited_by_the_container(monkeypatch, tmp_path):
    free = host_memory_available()
    assert free is None or 2**20 < free < 2**50
    real = memory.Path

    def fake(path):
        return real(str(path).replace("/proc", f"{tmp_path}/proc").replace("/sys", f"{tmp_path}/sys"))

    monkeypatch.setattr(memory, "Path", fake)
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:       50 kB\n")
    assert host_memory_available() == 50 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("40960\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("10960\n")
    assert host_memory_available() == 30000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_memory_available() == 50 * 1024


def test_abstract_state_is_that_of_the_model():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    import numpy as np

    from flax_model.sharding import abstract_parameters, decay_mask, make_mesh
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
    mesh, parts = jax.sharding.AbstractMesh(shape, MESH_AXES), (specs, BATCH, BATCH, WHOLE)
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
