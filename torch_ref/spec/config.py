"""The model's sizes: one frozen dataclass, its named presets, and the settings of a forward pass.

This is half of the specification that both frameworks implement (`parameters.py` is the other half). It imports
neither torch nor jax, so that each framework can read it without the other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

MESH_AXES = ("data", "fsdp", "expert")
"""Of every mesh of devices, in this order: copies of the model, parts of its weights, its experts."""


class SpecificationError(ValueError):
    """A model size, or a combination of sizes, that does not describe a model. The message names the field."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a SmolLM2-shaped decoder with DeepSeek-V3's latent attention and mixture of experts.

    The defaults are `smol-774m`. Embeddings are tied. Lengths are numbers of values, `max_position` is in tokens.
    """

    vocab_size: int = 49152
    """Rows of the embedding; a tokenizer may use fewer."""
    hidden_size: int = 576
    """Width of the residual stream, a token's vector between layers."""
    num_layers: int = 30
    """Number of transformer blocks, one over the other."""
    num_heads: int = 9
    """Number of query heads in each block."""
    num_kv_heads: int = 3
    """Number of K/V heads that the latent is expanded to; query head h reads h // (num_heads / num_kv_heads)."""
    kv_lora_rank: int = 72
    """Size of the latent that the cache holds: hidden_size / 8 is the "8x compression"."""
    q_lora_rank: int | None = None
    """Size of the normed latent that queries pass through; None: one projection without a latent."""
    qk_nope_head_dim: int = 64
    """Size of a query's and a key's part without position."""
    qk_rope_head_dim: int = 40
    """Size of the one rotary key that all heads share."""
    v_head_dim: int = 64
    """Size of each value head."""
    intermediate_size: int = 1536
    """Width of the dense SwiGLU in the first `first_k_dense` layers."""
    moe_intermediate_size: int = 1536
    """Width of the SwiGLU of each expert."""
    n_routed_experts: int = 8
    """Number of experts that tokens are routed to."""
    n_shared_experts: int = 1
    """Experts' worth of width that every token passes through."""
    num_experts_per_tok: int = 2
    """Number of routed experts each token passes through."""
    first_k_dense: int = 0
    """Number of leading layers with a dense SwiGLU instead of experts."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights, which sum to 1."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the block norms and the final norm; norms on latents have their own, 1e-6."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    max_position: int = 2048
    """Length of the longest input, in tokens."""
    balance_loss_coef: float = 1e-4
    """Weight of the sequence balance loss; 0 turns it off."""
    balance_bias_rate: float = 1e-3
    """How far one optimizer step moves an expert's balance bias; 0 turns it off."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_layers num_heads num_kv_heads kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size n_routed_experts "
            "num_experts_per_tok max_position"
        )
        for name in positive.split():
            self._require(
                isinstance(getattr(self, name), int) and getattr(self, name) >= 1, name, "must be an int >= 1"
            )
        for name in ("n_shared_experts", "first_k_dense"):
            self._require(
                isinstance(getattr(self, name), int) and getattr(self, name) >= 0, name, "must be an int >= 0"
            )
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            self._require(getattr(self, name) > 0, name, "must be > 0")
        for name in ("balance_loss_coef", "balance_bias_rate"):
            self._require(getattr(self, name) >= 0, name, "must be >= 0")
        self._require(
            self.q_lora_rank is None or (isinstance(self.q_lora_rank, int) and self.q_lora_rank >= 1),
            "q_lora_rank",
            "must be None or an int >= 1",
        )
        self._require(
            self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads = {self.num_heads}"
        )
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even: RoPE turns pairs")
        self._require(
            self.num_experts_per_tok <= self.n_routed_experts,
            "num_experts_per_tok",
            f"must be at most n_routed_experts = {self.n_routed_experts}",
        )
        self._require(self.first_k_dense <= self.num_layers, "first_k_dense", f"must be at most {self.num_layers}")

    def _require(self, condition: bool, field: str, rule: str) -> None:
        if not condition:
            raise SpecificationError(f"{field} = {getattr(self, field)!r}: {rule}")

    @property
    def qk_head_dim(self) -> int:
        """Values in one query or key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.first_k_dense

    @property
    def init_std(self) -> float:
        """Standard deviation of every weight matrix at the start: logits then have unit variance (tied embeddings),
        so the first loss is about ln(vocab_size) + 0.5."""
        return self.hidden_size**-0.5

    @property
    def cache_values_per_token(self) -> int:
        """Values the decoding cache holds per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The config of `to_dict`. Raises `SpecificationError` naming a field that is unknown or missing."""
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(set(values) ^ names):
            raise SpecificationError(f"{name}: {'unknown' if name in values else 'missing'} model field")
        return cls(**values)


LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on the latents: `transformers` builds them without reading the config."""

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=128,
        max_position=512,
    ),
    "small": ModelConfig(
        hidden_size=384,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        kv_lora_rank=48,
        intermediate_size=448,
        moe_intermediate_size=448,
    ),
    "smol-774m": ModelConfig(),
    # SmolLM2 has RoPE base 100000 over 64 values; the 20 highest of its 32 frequencies are those of base
    # 100000^(20/32) over 40: the nearest float32, since RoPE tables are made from one.
    "smol-774m-warm": ModelConfig(rope_theta=1333.521484375),
}
"""Named sizes. `tiny` trains on a laptop's CPU in minutes, `small` has about 50 M parameters, `smol-774m-warm` is what
`python -m train.warm_start` makes of SmolLM2-135M."""


DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class ComputeConfig:
    """How a forward pass is computed; none of it but `separator` changes what is computed, beyond rounding.

    Every field is a choice that parity is tested over.
    """

    dtype: DType = "float32"
    """Of activations and of the weights as they enter a product. Parameters stay float32 (float64 when this is)."""
    attention: str = "auto"
    """`plain` is the oracle. Flax: `blocked` (CPU default), `cudnn`. Torch: `sdpa` (default), `masked` (MPS)."""
    moe: str = "auto"
    """`dense` runs all experts on all tokens: the oracle. Flax: `grouped` (CPU default), `pallas` (NVIDIA GPUs),
    `blocks`. Torch: `grouped` (default), `blocks` (MPS)."""
    remat: Literal["off", "experts", "layers"] = "off"
    """What the backward pass computes again: nothing, the experts' activations, or whole layers."""
    scan_layers: bool = True
    """Flax only: one compiled layer run by `jax.lax.scan`, or the layers unrolled."""
    loss_chunk: int = 512
    """Tokens whose logits exist at once."""
    mesh: tuple[int, int, int] = (1, 1, 1)
    """Over how many devices, or in torch processes, the batch, the weights (`fsdp`) and in Flax the experts are spread,
    on top of each other (`sharding.py`)."""
    compile: str = "auto"
    """Torch only: whether training runs its layers and loss through `torch.compile`, and records passes on CUDA as
    graphs. `on`, `off`; `auto` is on for CUDA."""
    separator: int | None = None
    """The token that begins a document, to which attention then keeps (`document_numbers`); None: it does not. For
    training and scoring: a text that is continued is one document."""

    @property
    def param_dtype(self) -> str:
        """Of parameters, moments, accumulators, router and norm statistics."""
        return "float64" if self.dtype == "float64" else "float32"
