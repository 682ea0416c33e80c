"""Devices, the computation paths that each gets, and memory estimates."""

import dataclasses
import platform
import subprocess
import sys
from unittest.mock import Mock

import pytest

from parity_tests.support.backends import CONFIG
from torch_ref.spec import memory
from torch_ref.spec.config import PRESETS, ComputeConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import choose_remat, host_memory_available, step_bytes, step_parts
from torch_ref.spec.parameters import count_parameters

FULL = PRESETS["smol-774m"]


@pytest.fixture
def device():
    """torch_ref.device, where torch is installed."""
    pytest.importorskip("torch")
    from torch_ref import device

    return device


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

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)  # also where it is emulated
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Mock(major=8))
    dtypes = {name: device.default_dtype(torch.device(name)) for name in ("cuda", "mps", "cpu")}
    assert dtypes == {"cuda": "bfloat16", "mps": "float32", "cpu": "float32"}
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Mock(major=7))
    assert device.default_dtype(torch.device("cuda")) == "float32"


def test_a_gpu_asked_for_by_number_is_the_current_one(device, monkeypatch):
    """Streams and graphs that name no device are then on it."""
    current = Mock()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", current)
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)
    for name in ("cuda", "cpu", "cuda:1"):
        assert str(device.resolve_device(name)) == name
    assert [str(call.args[0]) for call in current.call_args_list] == ["cuda:1"]


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


def test_the_cpu_that_was_asked_for_is_taken_where_jax_has_a_gpu(monkeypatch):
    """Nothing is made on the GPU, and programs get around what XLA's CPU backend is slow at."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax_model.cpu import on_cpu
    from parity_tests.support.fakes import small_options
    from train.flax_main import build

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("flax_model.compile_cache.keep_compiled_programs", lambda platform: None)
    monkeypatch.setattr("flax_model.backend.FlaxBackend", lambda *settled: on_cpu())
    before = jax.config.jax_default_device  # that of a model that was opened in this process
    jax.config.update("jax_default_device", None)
    try:
        assert not on_cpu()
        assert build(small_options(device="cpu"))[1]
        assert jax.config.jax_default_device == jax.devices("cpu")[0]
    finally:
        jax.config.update("jax_default_device", before)


def test_remat_is_the_cheapest_that_fits():
    sizes = PRESETS["smol-774m"], "float32", 1, 2048, 1
    off, experts, layers = (step_bytes(*sizes, remat) for remat in ("off", "experts", "layers"))
    assert off > experts > layers
    choices = [choose_remat(*sizes, available) for available in (None, off, off - 1, experts - 1, 0)]
    assert choices == ["off", "off", "experts", "layers", "layers"]


def test_torch_holds_whole_gradients_between_micro_batches():
    """They are summed over processes once a step; until then no process has a part of them alone."""

    def gradients(micro_batches, framework, mesh=(1, 8, 1)):
        return step_parts(FULL, "float32", 1, 128, micro_batches, "off", mesh, framework=framework)["gradients"]

    whole = 4 * count_parameters(FULL)
    assert gradients(2, "torch") == gradients(2, "torch", (1, 1, 1)) == whole
    assert gradients(1, "torch") == gradients(1, "flax") == gradients(2, "flax") // 2 == whole // 8


@pytest.mark.parametrize(
    "sizes", [{"q_lora_rank": 512, "n_shared_experts": 0}, {"num_heads": 8, "first_k_dense": 1}], ids=str
)
def test_the_estimate_counts_what_torch_saves_of_a_layer(sizes):
    """Everything but parameters that autograd saves in a forward pass, for models that are no preset."""
    torch = pytest.importorskip("torch")
    from torch_ref.block import Block
    from torch_ref.rotary import make_rope

    config, tokens, cpu = dataclasses.replace(PRESETS["tiny"], num_layers=1, **sizes), 64, torch.device("cpu")
    block = Block(config, dense=bool(config.first_k_dense))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
    rope = make_rope(config, tokens, torch.float32, cpu)
    others = {tensor.untyped_storage().data_ptr() for tensor in (*block.state_dict().values(), *rope)}
    saved = []  # tensors themselves: what is freed could give its place to another
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(1, tokens, config.hidden_size, requires_grad=True) * 1
        block(x, rope, ComputeConfig("float32", "sdpa", "grouped"))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    held = sum(size for place, size in storages.items() if place not in others)
    parts = step_parts(config, "float32", 1, tokens, 1, "off", framework="torch")
    assert parts["activations kept for the backward pass"] == pytest.approx(held, rel=0.1)


def test_flax_makes_the_latents_of_queries_again():
    """And does not keep them: those of the layer at work alone count, before and after their norm, with gradients."""

    def parts(rank, framework):
        config = dataclasses.replace(PRESETS["tiny"], q_lora_rank=rank)
        return step_parts(config, "float32", 8, 512, 1, "off", framework=framework)

    (small, large), kept = (parts(rank, "flax") for rank in (100, 300)), "activations kept for the backward pass"
    work = "logits or the layer at work"
    assert small[kept] == large[kept] == parts(None, "flax")[kept]
    assert large[work] - small[work] > 4 * 200 * 8 * 512 * 4


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


def test_host_memory_is_limited_by_the_container_and_the_job(monkeypatch, tmp_path):
    free = host_memory_available()
    assert free is None or 2**20 < free < 2**50
    real = memory.Path

    def fake(path):
        return real(str(path).replace("/proc", f"{tmp_path}/proc").replace("/sys", f"{tmp_path}/sys"))

    monkeypatch.setattr(memory, "Path", fake)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7\n")
    (tmp_path / "sys/fs/cgroup/slurm/job_7").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:       50 kB\n")
    assert host_memory_available() == 50 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("40960\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("10960\n")
    assert host_memory_available() == 30000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_memory_available() == 50 * 1024
    (tmp_path / "sys/fs/cgroup/slurm/job_7/memory.max").write_text("20480\n")
    (tmp_path / "sys/fs/cgroup/slurm/job_7/memory.current").write_text("480\n")
    assert host_memory_available() == 20000
