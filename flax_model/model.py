"""The decoder: SmolLM2's skeleton with DeepSeek-V3's attention and experts.

- tied embeddings, RMSNorm before attention and before the MLP, no biases
- Multi-head Latent Attention with grouped K/V heads and a shared rotary key (`attention.py`)
- mixture of experts with a shared expert, balanced by bias (`moe.py`); the first layers may be dense
- layers stacked and run by `lax.scan`, so one layer is compiled and not thirty; or unrolled
- gradient checkpointing of the experts' activations, or of whole layers

Twins: `torch_ref/model.py`, `flax_model/model.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from flax_model.attention import Attention
from flax_model.fused_attention import is_fused_attention
from flax_model.layers import RMSNorm, SwiGLU, wide, wide_product
from flax_model.loss import cross_entropy
from flax_model.moe import MoE, MoEOutput
from flax_model.rotary import Rope, make_rope
from flax_model.sharding import gathered_layer
from flax_model.trees import merge, split
from torch_ref.spec.config import ComputeConfig, ModelConfig


class ForwardOutput(NamedTuple):
    hidden: Float[Array, "batch seq hidden"]
    """After the final norm: what the logits are taken from."""
    balance_loss: Float[Array, " batch"]
    """Sequence balance loss of each sequence, summed over layers, before its coefficient."""
    expert_counts: Int[Array, "moe_layers experts"]
    layers: Float[Array, "layers batch seq hidden"] | None
    """The residual stream after each layer, if asked for."""


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


class Embedding(nnx.Module):
    def __init__(self, entries: int, size: int) -> None:
        self.weight = nnx.Param(jnp.zeros((entries, size)))


class Model(nnx.Module):
    """The whole decoder. Paths of its variables are those of `parameters.flax_path`; make it by `from_values`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.first_k_dense:
            self.dense_layers = stacked(Block(config, dense=True), config.first_k_dense)
        if config.num_moe_layers:
            self.layers = stacked(Block(config, dense=False), config.num_moe_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, tokens: Int[Array, "batch seq"], compute: ComputeConfig, keep_hidden: bool = False
    ) -> ForwardOutput:
        """Raises ValueError where seq is longer than the context. `compute` must be resolved (no `auto`)."""
        config = self.config
        batch, seq = tokens.shape
        if seq > config.max_position:
            raise ValueError(f"{seq} tokens do not fit the context of max_position = {config.max_position}")
        rope = make_rope(config, seq, compute.dtype)
        documents = None if compute.separator is None else document_numbers(tokens, compute.separator)
        x = self.embed_tokens.weight[...][tokens].astype(compute.dtype)
        balance_loss = wide(jnp.zeros(batch, x.dtype))
        expert_counts = jnp.zeros((0, config.n_routed_experts), jnp.int32)
        layers = []
        if config.first_k_dense:
            x, (_, hidden) = run_layers(
                self.dense_layers, "dense_layers", config, x, rope, compute, documents, keep_hidden
            )
            layers.append(hidden)
        if config.num_moe_layers:
            x, (moe, hidden) = run_layers(self.layers, "layers", config, x, rope, compute, documents, keep_hidden)
            balance_loss, expert_counts = moe.balance_loss.sum(0), moe.expert_counts
            layers.append(hidden)
        layers = jnp.concatenate(layers) if keep_hidden else None
        return ForwardOutput(self.norm(x), balance_loss, expert_counts, layers)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token, float32 or wider, by the embedding (tied)."""
        return wide_product(hidden, self.embed_tokens.weight[...])


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
    # cheaper to repeat than to write and read (3 GB less at 2048 tokens of `smol-774m`).
    kept = {"off": ("attention", "swiglu", "experts"), "experts": ("attention", "swiglu"), "layers": ()}[compute.remat]
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
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


def document_numbers(tokens: Int[Array, "batch seq"], separator: int) -> Int[Array, "batch seq"]:
    """In which document of its row each token is: a separator begins the next one, which it is the first token of."""
    return (tokens == separator).cumsum(1)


class Parts(NamedTuple):
    """What an objective is made of: sums, so that micro-batches add up."""

    loss_sum: Float[Array, ""]
    balance_sum: Float[Array, ""]
    expert_counts: Int[Array, "moe_layers experts"]


def objective(
    model: Model,
    inputs: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    compute: ComputeConfig,
    target_count: int | Int[Array, ""],
    sequence_count: int,
) -> tuple[Float[Array, ""], Parts]:
    """This micro-batch's share of the step's objective: mean next-token loss plus the balance loss.

    `target_count` and `sequence_count` are those of the whole step, so that the shares of its micro-batches, and
    their gradients, add up to the whole batch's, also where micro-batches score different numbers of targets.
    """
    output = model(inputs, compute)
    hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
    loss_sum = cross_entropy(hidden, model.embed_tokens.weight[...], targets.reshape(-1), compute.loss_chunk)
    balance_sum = output.balance_loss.sum()
    total = loss_sum / target_count + model.config.balance_loss_coef * balance_sum / sequence_count
    return total, Parts(loss_sum, balance_sum, output.expert_counts)
