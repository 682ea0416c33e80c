"""What a compiled layer leaves as it is. A module by itself, imported while a layer is compiled: `disable` loads all of
torch's compiler, for a second, which decoding and evaluation never need."""

from __future__ import annotations

import torch

from torch_ref.grouped_experts import GroupedExperts


@torch.compiler.disable
def one_by_one(*operands):
    """The experts where the host has to know how many rows each of them has."""
    return GroupedExperts.apply(*operands)
