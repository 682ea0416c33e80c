"""The decoder: SmolLM2's skeleton with DeepSeek-V3's attention and experts.

- tied embeddings, RMSNorm before attention and before the MLP, no biases
- Multi-head Latent Attention with grouped K/V heads and a shared rotary key (`attention.py`)
- mixture of experts with a shared expert, balanced by bias (`moe.py`); the first layers may be dense
- layers run one after the other, with gradient checkpointing or without (`block.py`)

Twins: `torch_ref/model.py`, `flax_model/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ref.block import Block, run_layers
from torch_ref.layers import RMSNorm, wide, wide_product
from torch_ref.loss import cross_entropy
from torch_ref.rotary import Rope, make_rope
from torch_ref.sharding import own_part, part_of
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.parameters import Parameter


class ForwardOutput(NamedTuple):
    hidden: Float[Tensor, "batch seq hidden"]
    """After the final norm: what the logits are taken from."""
    balance_loss: Float[Tensor, " batch"]
    """Sequence balance loss of each sequence, summed over layers, before its coefficient."""
    expert_counts: Int[Tensor, "moe_layers experts"]
    layers: list[Tensor] | None
    """The residual stream after each layer, if asked for."""


class Model(nn.Module):
    """The whole decoder. Names in `state_dict()` are those of the parameter table; values are unset until
    `load_values`."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_empty(config, dtype))
            self.layers = nn.ModuleList(
                Block(config, dense=layer < config.first_k_dense) for layer in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.to(dtype)
        self._rope: tuple[tuple, Rope] | None = None

    @torch.no_grad()
    def load_values(self, values: Iterable[tuple[Parameter, np.ndarray]]) -> Model:
        """Set every tensor, from `parameters.initial_values` or an import. Raises KeyError on an unknown name."""
        tensors = dict(self.state_dict(keep_vars=True))
        for row, value in values:
            tensor = tensors.pop(row.name)
            own_part(tensor).copy_(part_of(torch.from_numpy(np.ascontiguousarray(value)), tensor))
        assert not tensors, f"no value for {sorted(tensors)}"
        return self

    def forward(
        self, tokens: Int[Tensor, "batch seq"], compute: ComputeConfig, keep_hidden: bool = False
    ) -> ForwardOutput:
        """Raises ValueError where seq is longer than the context. `compute` must be resolved (no `auto`)."""
        config = self.config
        batch, seq = tokens.shape
        if seq > config.max_position:
            raise ValueError(f"{seq} tokens do not fit the context of max_position = {config.max_position}")
        dtype = getattr(torch, compute.dtype)
        rope = self._kept_rope(seq, dtype, tokens.device)
        documents = None if compute.separator is None else document_numbers(tokens, compute.separator)
        x = F.embedding(tokens.long(), self.embed_tokens.weight).to(dtype)
        x, (reports, layers) = run_layers(self.layers, x, rope, compute, documents, keep_hidden)
        balance_loss = sum((report.balance_loss for report in reports), start=wide(x.new_zeros(batch)))
        counts = [report.expert_counts for report in reports]
        expert_counts = torch.stack(counts) if counts else tokens.new_zeros(0, config.n_routed_experts)
        return ForwardOutput(self.norm(x), balance_loss, expert_counts, layers)

    def _kept_rope(self, length: int, dtype: torch.dtype, device: torch.device) -> Rope:
        """The rotary table, kept on the device for the next forward pass of the same length."""
        key = length, dtype, device
        if self._rope is None or self._rope[0] != key:
            with torch.inference_mode(False):  # a table made in it could not be used in training
                self._rope = key, make_rope(self.config, length, dtype, device)
        return self._rope[1]

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token, float32 or wider, by the embedding (tied)."""
        return wide_product(hidden, self.embed_tokens.weight)


def _empty(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    # nn.Embedding would otherwise draw 28 M normal numbers that load_values overwrites.
    return torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)


def document_numbers(tokens: Int[Tensor, "batch seq"], separator: int) -> Int[Tensor, "batch seq"]:
    """In which document of its row each token is: a separator begins the next one, which it is the first token of."""
    return (tokens == separator).cumsum(1)


class Parts(NamedTuple):
    """What an objective is made of: sums, so that micro-batches add up."""

    loss_sum: Float[Tensor, ""]
    balance_sum: Float[Tensor, ""]
    expert_counts: Int[Tensor, "moe_layers experts"]


def objective(
    model: Model,
    inputs: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "batch seq"],
    compute: ComputeConfig,
    target_count: int | Float[Tensor, ""],
    sequence_count: int | Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], Parts]:
    """This micro-batch's share of the step's objective: mean next-token loss plus the balance loss.

    `target_count` and `sequence_count` are those of the whole step, so that the shares of its micro-batches, and
    their gradients, add up to the whole batch's, also where micro-batches score different numbers of targets.
    """
    output = model(inputs, compute)
    hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
    compiled = compute.compile == "on"
    loss_sum = cross_entropy(hidden, model.embed_tokens.weight, targets.reshape(-1), compute.loss_chunk, compiled)
    balance_sum = output.balance_loss.sum()
    total = loss_sum / target_count + model.config.balance_loss_coef * balance_sum / sequence_count
    return total, Parts(loss_sum.detach(), balance_sum.detach(), output.expert_counts)
