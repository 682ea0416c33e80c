"""The work that is in a token, and what devices could do at most: for speed as a share of the hardware's."""

from __future__ import annotations

import re

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import count_active_parameters

BF16_PEAKS = {
    "NVIDIA A10": 125.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200 480GB": 989.4,
}
"""TFLOP/s of dense bfloat16 products, from the makers' data sheets, by the name that the driver gives the device. A
name that is not here, such as that of a part of a device (MIG), has no peak: none is guessed."""


def flops_per_token(config: ModelConfig, seq_len: int, backward: bool = True) -> float:
    """Model FLOPs of one token, averaged over a sequence: two for every active weight in a product (the embedding
    once, as the output layer), and attention's products with the keys a token may see; the backward pass costs twice
    the forward pass. What rematerialisation computes again does not count."""
    attention = 2 * config.num_layers * config.num_heads * (config.qk_head_dim + config.v_head_dim) * (seq_len + 1) / 2
    return (2 * count_active_parameters(config) + attention) * (3 if backward else 1)


def bf16_peak(device: str) -> float | None:
    """FLOP/s at most of what `Backend.device` names, all devices of a mesh together; None where it is not known."""
    count, name = re.fullmatch(r"(?:(\d+) x )?([^,]*)(?:,.*)?", device).groups()
    return BF16_PEAKS[name] * 1e12 * int(count or 1) if name in BF16_PEAKS else None
