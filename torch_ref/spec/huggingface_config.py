"""Model config <-> config.json of `transformers`' DeepseekV3, version 4 and version 5.

Its defaults are those of the 671B model, so our exports state every field; and a config.json that asks for something
this model does not compute is refused by the name of the field.
"""

from __future__ import annotations

from pathlib import Path

from torch_ref.spec.config import ModelConfig, SpecificationError
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import read_json

SIDECAR = "smol_deepseek.json"
"""Beside config.json in our exports: the model config, with what DeepseekV3 has no field for."""

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "max_position_embeddings": "max_position",
}
"""Sizes that a config.json must state: its field -> ours."""

DEFAULTS = {
    "q_lora_rank": 1536,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
}
"""What `transformers` takes for a field that config.json leaves out (the 671B model's values)."""

_REQUIRED = {
    "model_type": (None, "deepseek_v3"),
    "hidden_act": ("silu", "silu"),
    "n_group": (8, 1),
    "topk_group": (4, 1),
    "norm_topk_prob": (True, True),
    "scoring_func": ("sigmoid", "sigmoid"),
    "topk_method": ("noaux_tc", "noaux_tc"),
    "moe_layer_freq": (1, 1),
    "tie_word_embeddings": (False, True),
    "attention_bias": (False, False),
    "quantization_config": (None, None),
}
"""config.json field -> (the default of `transformers`, the one value our model computes)."""


def transformers_config(config: ModelConfig, dtype: str, end_of_text: int) -> dict:
    """config.json for `transformers` 4 and 5: every field whose default is the 671B model's is written out."""
    if config.num_moe_layers and config.n_routed_experts < 2:
        raise UserError("n_routed_experts = 1: DeepseekV3 in transformers needs at least 2 experts; nothing exported")
    theta = float(config.rope_theta)
    # The products over groups of rows that version 5 otherwise takes want rows of 16 bytes, in bfloat16 8 values.
    odd = config.num_moe_layers and (config.hidden_size % 8 or config.moe_intermediate_size % 8)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        # The groups are written out in kv_b_proj; a smaller number here would repeat the keys a second time.
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "first_k_dense_replace": config.first_k_dense,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        # Version 5 refuses an int in a float field.
        "routed_scaling_factor": float(config.routed_scaling_factor),
        "rms_norm_eps": float(config.rms_norm_eps),
        # Version 4 reads the first, version 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_interleave": True,
        # No head_dim: version 4 and 5 take it for the size of RoPE.
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **({"experts_implementation": "eager"} if odd else {}),
    }


def read_config(folder: Path) -> ModelConfig:
    """The model config of a `transformers` DeepseekV3 folder: exactly ours for our exports; for others K/V heads are
    the query heads, and the balance settings our defaults.

    Raises `UserError` naming the field of config.json that asks for something this model does not compute.
    """
    path = folder / "config.json"
    fields = read_json(path)
    for field, (default, needed) in _REQUIRED.items():
        if fields.get(field, default) != needed:
            raise UserError(f"{path}: {field} = {fields.get(field, default)!r}; this model only has {needed!r}")
    heads = fields.get("num_attention_heads")
    if fields.get("num_key_value_heads") not in (None, heads):
        raise UserError(
            f"{path}: num_key_value_heads = {fields['num_key_value_heads']!r}; DeepseekV3 needs it equal to "
            f"num_attention_heads = {heads!r}"
        )
    if fields.get("head_dim") not in (None, fields.get("qk_rope_head_dim")):
        raise UserError(f"{path}: head_dim = {fields['head_dim']!r} must equal qk_rope_head_dim, the size of RoPE")
    stated = {field: fields.get(field, default) for field, default in DEFAULTS.items()}
    whole_numbers = {field: fields.get(field, "missing") for field in _SIZES}
    whole_numbers["first_k_dense_replace"] = stated["first_k_dense_replace"]
    if stated["q_lora_rank"] is not None:
        whole_numbers["q_lora_rank"] = stated["q_lora_rank"]
    for field, value in whole_numbers.items():
        if type(value) is not int:
            raise UserError(f"{path}: {field} = {value!r}; must be a whole number")
    try:
        config = ModelConfig(
            **{ours: fields[theirs] for theirs, ours in _SIZES.items()},
            num_kv_heads=heads,
            q_lora_rank=stated["q_lora_rank"],
            first_k_dense=min(stated["first_k_dense_replace"], fields["num_hidden_layers"]),
            routed_scaling_factor=float(stated["routed_scaling_factor"]),
            rms_norm_eps=float(stated["rms_norm_eps"]),
            rope_theta=_rope_theta(path, fields),
        )
    except (SpecificationError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    return _with_sidecar(folder, config)


def _rope_theta(path: Path, fields: dict) -> float:
    """Base of the rotary frequencies: `rope_parameters` (version 5) or `rope_theta` (version 4)."""
    theta = fields.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path}: {name} = {rope!r}; must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {name} asks for {kind!r} frequencies; this model only has 'default'")
        if rope.get("rope_theta", theta) != theta and theta is not None:
            raise UserError(f"{path}: rope_theta = {theta!r} and {name}.rope_theta = {rope['rope_theta']!r} disagree")
        theta = rope.get("rope_theta", theta)
    return float(DEFAULTS["rope_theta"] if theta is None else theta)


def _with_sidecar(folder: Path, config: ModelConfig) -> ModelConfig:
    """The config that our export left beside config.json, if it did and config.json still says the same."""
    path = folder / SIDECAR
    if not path.exists():
        return config
    try:
        ours = ModelConfig.from_dict(read_json(path).get("model", {}))
    except (SpecificationError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    free = ("num_kv_heads", "balance_loss_coef", "balance_bias_rate")
    for name, value in config.to_dict().items():
        if name not in free and getattr(ours, name) != value:
            raise UserError(
                f"{path}: {name} = {getattr(ours, name)!r}, but config.json says {value!r}; "
                f"delete {SIDECAR} if config.json is right"
            )
    return ours
