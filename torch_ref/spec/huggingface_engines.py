"""Which engines serve an exported model, by what their loaders and kernels ask of its sizes.

The rules were read in their sources (vLLM and SGLang `models/deepseek_v2.py`, vLLM `mla_attention.py`, llama.cpp
`src/models/deepseek2.cpp` and `conversion/deepseek.py`, mlx-lm `models/deepseek_v3.py`); docs/export.md says which of
them were also run. What an engine asks of a tokenizer is not judged here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_ref.spec.config import LATENT_NORM_EPS, ModelConfig

_VLLM_CACHED_VALUES = (320, 576)
"""Latent and rotary key together, as vLLM's latent attention kernels take them."""
_LLAMA_CPP_PLAIN_QUERY_LAYERS = (26, 27)
"""Numbers of layers by which llama.cpp knows a model without a query latent; all others must have one."""


@dataclass(frozen=True)
class Engine:
    """An engine, and what it makes of a model."""

    name: str
    obstacles: tuple[str, ...] = ()
    """Why it does not load the model, or computes another one; none: it serves it."""
    notes: tuple[str, ...] = ()
    """What to set, and by how little its numbers differ."""
    tried: bool = False
    """Whether exports of every kind were run in it; otherwise it is its sources that say so."""

    def __str__(self) -> str:
        if self.obstacles:
            return f"{self.name}: no; " + "; ".join(self.obstacles)
        said_by = "" if self.tried else ", by its sources"
        return f"{self.name}: yes{said_by}" + "".join(f"; {note}" for note in self.notes)


def engines(config: ModelConfig) -> list[Engine]:
    """What each engine makes of an export of this model."""
    experts = config.num_moe_layers > 0
    no_shared = experts and config.n_shared_experts == 0
    epsilon = ()
    if config.rms_norm_eps != LATENT_NORM_EPS:
        epsilon = (f"its latent norms take epsilon {config.rms_norm_eps:g} for {LATENT_NORM_EPS:g}",)
    cached = config.cache_values_per_token
    dense_kernels = ()
    if cached not in _VLLM_CACHED_VALUES:
        wanted = " or ".join(map(str, _VLLM_CACHED_VALUES))
        dense_kernels = (f"with VLLM_MLA_DISABLE=1, as its MLA kernels cache {wanted} values a token, not {cached}",)
    plain_query = config.q_lora_rank is None and config.num_layers not in _LLAMA_CPP_PLAIN_QUERY_LAYERS
    layers = " or ".join(map(str, _LLAMA_CPP_PLAIN_QUERY_LAYERS))
    return [
        Engine("transformers 4 and 5", tried=True),
        Engine("vLLM", _if(no_shared, "n_shared_experts = 0 has no place in it"), dense_kernels + epsilon),
        Engine("SGLang", _if(no_shared, "n_shared_experts = 0 has no place in it"), epsilon),
        Engine(
            "mlx-lm",
            _if(no_shared, "n_shared_experts = 0 stops it")
            + _if(experts and config.num_experts_per_tok == 1, "num_experts_per_tok = 1: it does not scale the weight"),
            tried=True,
        ),
        Engine(
            "llama.cpp",
            _if(no_shared, "n_shared_experts = 0 has no place in it")
            + _if(plain_query, f"it needs a q_lora_rank, but for {layers} layers"),
            epsilon,
            tried=True,
        ),
    ]


def _if(condition: bool, obstacle: str) -> tuple[str, ...]:
    return (obstacle,) if condition else ()
