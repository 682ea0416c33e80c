"""One layer of the decoder, and how a row of them runs.

- stacked and by `lax.scan`, so that one layer is compiled and not thirty, or unrolled; in training with gradient
  checkpointing of the experts' activations, or of whole layers

Twins: `torch_ref/block.py`, `flax_model/block.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from flax_model.attention import Attention
from flax_model.fused_attention import is_fused_attention
from flax_model.layers import RMSNorm, SwiGLU
from flax_model.moe import MoE, MoEOutput
from flax_model.rotary import Rope
from flax_model.sharding import gathered_layer
from flax_model.trees import merge, split
from torch_ref.spec.config import ComputeConfig, ModelConfig


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), where the MLP is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        self.dense = dense
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rope: Rope,
        compute: ComputeConfig,
        documents: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], MoEOutput | None]:
        x = x + self.attention(self.input_norm(x), rope, compute.attention, documents)
        normed = self.post_attention_norm(x)
        if self.dense:
            return x + self.mlp(normed), None
        moe = self.mlp(normed, compute.moe, compute.remat == "experts")
        return x + moe.out, moe


def stacked(block: Block, layers: int) -> Block:
    """A block whose variables have room for the values of so many layers, along a first axis that `lax.scan` takes."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), state))


def run_layers(
    stacked: Block,
    name: str,
    config: ModelConfig,
    x: Float[Array, "batch seq hidden"],
    rope: Rope,
    compute: ComputeConfig,
    documents: Int[Array, "batch seq"] | None,
    keep_hidden: bool,
) -> tuple[Float[Array, "batch seq hidden"], tuple[MoEOutput | None, Array | None]]:
    """Run x through the layers of a stacked block, the model's attribute `name`. Also returns, stacked over layers,
    what each mixture of experts reported (its output left out) and, if asked for, each layer's hidden states."""
    graphdef, *state = split(stacked)

    def one_layer(x, layer):
        params, biases = layer
        params = gathered_layer(params, config, compute.mesh, compute.dtype, name)
        x, moe = merge(graphdef, params, biases)(x, rope, compute, documents)
        return x, (moe and moe._replace(out=None), x if keep_hidden else None)

    # The layer's input is kept by the scan. Of the rest, only what is dear to compute: norms, rotations and gates are
    # cheaper to repeat than to write and read (3 GB less at 2048 tokens of `smol-774m`). Routing is never repeated:
    # fused otherwise, it rounds otherwise, and one token that chooses another expert moves the rows of all that come
    # after it away from the products that were kept.
    kept = {"off": ("attention", "swiglu", "experts"), "experts": ("attention", "swiglu"), "layers": ()}[compute.remat]
    policy = jax.checkpoint_policies.save_only_these_names("routing", *kept)
    if "attention" in kept:
        policy = jax.checkpoint_policies.save_from_both_policies(policy, is_fused_attention)
    one_layer = jax.checkpoint(one_layer, policy=policy, prevent_cse=not compute.scan_layers)
    if compute.scan_layers:
        return jax.lax.scan(one_layer, x, state)
    reports = []
    for index in range(jax.tree.leaves(state)[0].shape[0]):
        x, report = one_layer(x, jax.tree.map(lambda leaf, index=index: leaf[index], state))
        reports.append(report)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)
