"""What processors are slow at, and how torch gets around it there. Every value is the same either way, beyond rounding;
on other devices, and on processors without the weakness, each of these functions is the plain operation.

- `operand`, for processors without AMX, in bfloat16: products of training reach 290 instead of 130-150 GFLOP/s, and
  decoding reads a long cache in half the time
- `linear` of few rows, for processors that are not Intel's, where torch multiplies by MKL: 8 layers take 34 instead of
  46 ms a token
- `return_freed_blocks`, for glibc, in runs that rematerialise: 13.5 instead of 16.1 GB for `smol-774m`, for 3 to 7 % of
  the speed

How it was measured is in docs/performance.md.

Twins: `torch_ref/cpu.py`, `flax_model/cpu.py`.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

HALF_PRODUCTS = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
"""Whether the processor multiplies bfloat16 matrices in hardware (AMX). Without, torch takes twice as long for them as
for float32 ones."""

_NAME = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")

ONE_CORE_PRODUCTS = torch.backends.mkl.is_available() and _NAME != "" and "Intel" not in _NAME
"""Whether a product of one row keeps to one core: MKL's on processors of other makers (measured on an AMD EPYC)."""

FEW_ROWS = 32

LARGE_BLOCK = 4 * 2**20
"""Bytes; see `return_freed_blocks`."""


def operand(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` as it enters a product: bfloat16 in float32 on a processor without bfloat16 units. The values are the same,
    and the product, which sums in float32 either way, is rounded to bfloat16 after it."""
    return x.float() if x.dtype == torch.bfloat16 and x.is_cpu and not HALF_PRODUCTS else x


def linear(
    x: Float[Tensor, "*batch rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "*batch rows outputs"]:
    """x @ weight.T in their dtype. Few rows, as in decoding, cost what reading the weight costs: it stays as it is."""
    if x.shape[-2] >= FEW_ROWS:
        return F.linear(operand(x), operand(weight)).to(x.dtype)
    if ONE_CORE_PRODUCTS and x.ndim == 2 and x.is_cpu and x.dtype != torch.bfloat16:
        return split_product(x, weight, torch.get_num_threads())
    return F.linear(x, weight)


def split_product(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], parts: int
) -> Float[Tensor, "rows outputs"]:
    """x @ weight.T with the outputs in `parts` equal parts, one for each core, if they can be."""
    outputs, inputs = weight.shape
    if parts == 1 or outputs % parts:
        return F.linear(x, weight)
    by_part = torch.bmm(x.expand(parts, -1, -1), weight.view(parts, -1, inputs).mT)
    return by_part.view(1, outputs) if len(x) == 1 else by_part.transpose(0, 1).reshape(-1, outputs)


def return_freed_blocks() -> None:
    """Make the C library's allocator, if it is glibc's, hand blocks of `LARGE_BLOCK` and more back to the system when
    they are freed, from now on in this process. By default it keeps blocks of up to 32 MB once it has met such sizes;
    freed activations then leave holes that gradients do not fit into."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        ctypes.CDLL(None).mallopt(mmap_threshold, LARGE_BLOCK)
    except (AttributeError, OSError, TypeError):
        pass  # another C library
