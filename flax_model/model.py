"""The decoder: SmolLM2's skeleton with DeepSeek-V3's attention and experts.

- tied embeddings, RMSNorm before attention and before the MLP, no biases
- Multi-head Latent Attention with grouped K/V heads and a shared rotary key (`attention.py`)
- mixture of experts with a shared expert, balanced by bias (`moe.py`); the first layers may be dense
- layers run one after the other, with gradient checkpointing or without (`block.py`)

Twins: `torch_ref/model.py`, `flax_model/model.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from flax_model.block import Block, run_layers, stacked
from flax_model.layers import RMSNorm, wide, wide_product
from flax_model.loss import cross_entropy
from flax_model.rotary import make_rope
from torch_ref.spec.config import ComputeConfig, ModelConfig


class ForwardOutput(NamedTuple):
    hidden: Float[Array, "batch seq hidden"]
    """After the final norm: what the logits are taken from."""
    balance_loss: Float[Array, " batch"]
    """Sequence balance loss of each sequence, summed over layers, before its coefficient."""
    expert_counts: Int[Array, "moe_layers experts"]
    layers: Float[Array, "layers batch seq hidden"] | None
    """The residual stream after each layer, if asked for."""


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
