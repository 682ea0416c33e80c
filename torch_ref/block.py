"""One layer of the decoder, and how a row of them runs.

- as they are, or compiled; in training with gradient checkpointing of the experts' activations, or of whole layers

Twins: `torch_ref/block.py`, `flax_model/block.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_ref.attention import Attention
from torch_ref.layers import RMSNorm, SwiGLU
from torch_ref.moe import MoE, MoEOutput
from torch_ref.rotary import Rope
from torch_ref.spec.config import ComputeConfig, ModelConfig


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), where the MLP is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rope: Rope,
        compute: ComputeConfig,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], MoEOutput | None]:
        x = x + self.attention(self.input_norm(x), rope, compute.attention, documents)
        normed = self.post_attention_norm(x)
        if self.dense:
            return x + self.mlp(normed), None
        moe = self.mlp(normed, compute.moe, compute.remat == "experts")
        return x + moe.out, moe


def run_layer(
    block: Block, x: Tensor, rope: Rope, compute: ComputeConfig, documents: Tensor | None = None
) -> tuple[Tensor, MoEOutput | None]:
    """Call a block. As a function of the block it is compiled once for all layers of a kind."""
    return block(x, rope, compute, documents)


COMPILER = "inductor"
"""The backend of `torch.compile`."""


@cache
def compiled_layer() -> Callable:
    """`run_layer` compiled, for each shape anew: a layer's hundreds of small operations become a few fused kernels
    around its products. Makes nothing that was not there before the first call."""
    return torch.compile(run_layer, dynamic=False, backend=COMPILER)


def run_layers(
    blocks: Iterable[Block],
    x: Float[Tensor, "batch seq hidden"],
    rope: Rope,
    compute: ComputeConfig,
    documents: Int[Tensor, "batch seq"] | None,
    keep_hidden: bool,
) -> tuple[Float[Tensor, "batch seq hidden"], tuple[list[MoEOutput], list[Tensor] | None]]:
    """Run x through blocks. Also returns what each mixture of experts reported (its output left out) and, if asked for,
    each layer's hidden states."""
    training = torch.is_grad_enabled()
    one_layer = compiled_layer() if compute.compile == "on" and training else run_layer
    if compute.remat == "layers" and training:
        one_layer = partial(checkpoint, one_layer, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
    reports, layers = [], []
    for block in blocks:
        x, moe = one_layer(block, x, rope, compute, documents)
        if moe is not None:
            reports.append(moe._replace(out=None))
        if keep_hidden:
            layers.append(x)
    return x, (reports, layers if keep_hidden else None)
