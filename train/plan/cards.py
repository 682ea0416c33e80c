"""Devices that a plan can be made for: memory, speed and how they are joined, from the makers' public data sheets.

Speeds are of dense products. NVLink and PCI Express are counted in one direction, half of what the sheets give for
both. The network is no property of a card: it is what NVIDIA's own systems have for each of them (DGX H100 and H200:
eight ConnectX-7 of 400 Gbit/s; DGX A100: eight ConnectX-6 of 200 Gbit/s; DGX B200: eight of 400), and for the PCI
Express cards an assumption; `--network-gbits` says another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from torch_ref.spec.flops import BF16_PEAKS
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import Framework, host_memory_available


@dataclass(frozen=True)
class Card:
    """One device."""

    name: str
    memory: int | None
    """Bytes; of a CPU what is free now (None where the system does not say)."""
    bandwidth: float
    """Bytes/s of its memory."""
    bf16: float
    """FLOP/s of bfloat16 products with float32 sums."""
    tf32: float
    """FLOP/s of float32 products as JAX takes them by default: on a GPU in TF32."""
    float32: float
    """FLOP/s of float32 products as torch takes them by default: in full float32."""
    link: float
    """Bytes/s in one direction to the other cards of a host."""
    network: float
    """Bytes/s in one direction to other hosts, for each card."""
    is_gpu: bool = True

    def peak(self, dtype: str, framework: Framework) -> float:
        """FLOP/s at most."""
        return self.bf16 if dtype == "bfloat16" else {"flax": self.tf32, "torch": self.float32}[framework]

    def usable(self, framework: Framework) -> int | None:
        """Bytes a framework takes at most: JAX three quarters of a GPU, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
        otherwise; torch all but what the driver needs."""
        if not self.is_gpu or self.memory is None:
            return self.memory
        return int(self.memory * {"flax": 0.75, "torch": 0.95}[framework])


def _card(
    driver_name: str,
    gigabytes: float,
    gb_per_s: float,
    tf32: float,
    float32: float,
    link: float,
    network_gbits: float,
) -> Card:
    return Card(
        driver_name,
        memory=int(gigabytes * 1e9),
        bandwidth=gb_per_s * 1e9,
        bf16=BF16_PEAKS[driver_name] * 1e12,
        tf32=tf32 * 1e12,
        float32=float32 * 1e12,
        link=link * 1e9,
        network=network_gbits / 8 * 1e9,
    )


# NVIDIA's data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU", "A100 Tensor Core GPU", "DGX B200" (a B200 as an
# eighth of the system; its float32 from "HGX B200"), "L40S", "L4" and "A10". TF32 and bfloat16 are given with sparsity
# there, twice what is here.
CARDS = {
    "h100": _card("NVIDIA H100 80GB HBM3", 80, 3350, 494.7, 67, 450, 400),
    "h200": _card("NVIDIA H200", 141, 4800, 494.7, 67, 450, 400),
    "b200": _card("NVIDIA B200", 180, 8000, 1125, 75, 900, 400),
    "a100": _card("NVIDIA A100-SXM4-80GB", 80, 2039, 156, 19.5, 300, 200),
    "a100-40gb": _card("NVIDIA A100-SXM4-40GB", 40, 1555, 156, 19.5, 300, 200),
    "h100-pcie": _card("NVIDIA H100 PCIe", 80, 2000, 378, 51, 64, 200),
    "l40s": _card("NVIDIA L40S", 48, 864, 183, 91.6, 32, 100),
    "l4": _card("NVIDIA L4", 24, 300, 60, 30.3, 32, 100),
    "a10": _card("NVIDIA A10", 24, 600, 62.5, 31.2, 32, 100),
}


def card(name: str) -> Card:
    """The card of a `--device`. Raises `UserError` on one that is not known."""
    if name == "cpu":
        return this_cpu()
    if name not in CARDS:
        raise UserError(f"--device {name}: there are {', '.join(CARDS)}, and cpu for this machine")
    return CARDS[name]


def this_cpu() -> Card:
    """This machine, with its speed measured in some hundredths of a second: the best of a few products of NumPy, and of
    a few copies."""
    a = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    multiply = _best(lambda: a @ a)
    memory = np.zeros(2**23, np.float32)
    copy = _best(memory.copy)
    speed, bandwidth = 2 * 1024**3 / multiply, 2 * memory.nbytes / copy
    return Card("this CPU", host_memory_available(), bandwidth, speed, speed, speed, bandwidth, 1e9 / 8, is_gpu=False)


def _best(function) -> float:
    """Seconds of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
