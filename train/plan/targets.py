"""Cards as XLA's compiler wants them described, to compile for one that is not there.

The figures are what NVIDIA's driver says of a card (`nvidia-smi`, CUDA's device properties) and its data sheet; the
form is XLA's `GpuTargetConfigProto`.
"""

from __future__ import annotations

from torch_ref.spec.interface import UserError

_CARD = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""

_HOPPER = {
    "shared_per_core": 233472,
    "shared_per_block": 232448,
    "cores": 132,
    "fpus": 128,
    "clock": 1.98,
    "cache": 52428800,
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
}
_AMPERE = {
    "shared_per_core": 167936,
    "shared_per_block": 166912,
    "cores": 108,
    "fpus": 64,
    "clock": 1.41,
    "cache": 41943040,
    "capability": "major: 8",
}

TARGETS = {
    "h100": {**_HOPPER, "bandwidth": 3352320000000, "memory": 84942979072, "name": "NVIDIA H100 80GB HBM3"},
    "h200": {**_HOPPER, "bandwidth": 4800000000000, "memory": 150754820096, "name": "NVIDIA H200"},
    "a100": {**_AMPERE, "bandwidth": 2039000000000, "memory": 85174583296, "name": "NVIDIA A100-SXM4-80GB"},
    "a100-40gb": {**_AMPERE, "bandwidth": 1555000000000, "memory": 42405855232, "name": "NVIDIA A100-SXM4-40GB"},
}


def target_config(card: str) -> str:
    """XLA's description of a card, as text. Raises `UserError` for one that has none."""
    if card not in TARGETS:
        raise UserError(f"--compile --device {card}: programs are compiled for {', '.join(TARGETS)}")
    return _CARD.format(**TARGETS[card])
