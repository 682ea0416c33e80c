"""`torch.nn.MultiheadAttention`, whose queries, keys and values are one matrix, and `nnx.MultiHeadAttention`, whose
heads are an axis of their own: all names are found."""

import torch
from flax import nnx

SIZE, HEADS = 32, 4


def torch_side():
    torch.manual_seed(0)
    x = torch.randn(2, 10, SIZE)
    module = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    return module, {"query": x, "key": x, "value": x, "need_weights": False}


def jax_side():
    module = nnx.MultiHeadAttention(HEADS, SIZE, decode=False, rngs=nnx.Rngs(0))
    x = torch_side()[1]["query"]
    return module, (x,)


FLOAT32 = ("output",)  # nnx takes the softmax in float32 whatever the dtype, torch in the dtype it is given
