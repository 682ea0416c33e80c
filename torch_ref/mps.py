"""What Apple's MPS multiplies wrongly, and how torch gets around it there. On other devices each of these functions is
the plain operation.

Where each value of a product is a sum of 32,767 terms or more, and both its sizes are 16 or more, an M1 or M2 reads
past the end of the operands and adds what it finds there (pytorch #195163, #177116; torch 2.13 in every product, later
ones still in batches of them). Two sums of training can be as long: the gradient of a hidden state runs over the
vocabulary, that of a weight over the tokens of a micro-batch.

In half precision an M5 gets `F.linear` of rows that lie in more than two axes wrong, and its gradient, each time in
another way (pytorch #180776, #181936; torch 2.12).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LONGEST_SUM = 16384
"""Terms that are summed at once."""


def sums_too_far(device: torch.device) -> bool:
    """Whether long sums can be wrong there. It depends on the chip and the version; all of MPS counts as one."""
    return device.type == "mps"


def long_product(
    left: Float[Tensor, "rows terms"], right: Float[Tensor, "terms columns"]
) -> Float[Tensor, "rows columns"]:
    """left @ right."""
    if not sums_too_far(left.device) or len(right) <= LONGEST_SUM:
        return left @ right
    parts = zip(left.split(LONGEST_SUM, dim=1), right.split(LONGEST_SUM), strict=True)
    products = [a.contiguous() @ b for a, b in parts]
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.stack(products).sum(0, dtype=wide).to(left.dtype)


def takes_two_axes(device: torch.device) -> bool:
    """Whether `F.linear` can be wrong of rows that lie in more; as above, on all of MPS."""
    return device.type == "mps"


def rows_at_once(rows: int, length: int, device: torch.device) -> int:
    """How many of a micro-batch's rows run together: all, or as large a part of it as is summed rightly."""
    if not sums_too_far(device):
        return rows
    return max(part for part in range(1, rows + 1) if part == 1 or (rows % part == 0 and part * length <= LONGEST_SUM))
