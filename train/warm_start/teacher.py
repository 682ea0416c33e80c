"""The model that a warm start begins from: a Llama (SmolLM2) read from a folder, a GGUF file or the Hub, checked field
by field against the model it is to become, with its tokenizer. torch and transformers are imported when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError
from train.data.sources import in_one_line
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.warm_start.attention import LlamaAttention, kept_theta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TeacherLayer:
    """Weights of one layer, [out, in]."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_attention_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


_LAYER_KEYS = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class Rotation(NamedTuple):
    """Cosines and sines of the old RoPE."""

    cos: Float[Tensor, "seq pairs"]
    sin: Float[Tensor, "seq pairs"]


class Teacher:
    """Sizes and float32 weights of a Llama."""

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        """`config` is a `LlamaConfig`, `weights` its model's state dict."""
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = head_dim_of(config)
        self.eps: float = config.rms_norm_eps
        self.theta: float = rope_theta_of(config)
        self.embedding: Tensor = weights["model.embed_tokens.weight"]
        self.norm: Tensor = weights["model.norm.weight"]
        self.layers = [
            TeacherLayer(
                **{name: weights[f"model.layers.{layer}.{key}.weight"] for name, key in _LAYER_KEYS.items()},
            )
            for layer in range(config.num_hidden_layers)
        ]

    def fingerprint(self) -> str:
        """Hash of all weights."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.embedding, self.norm, *(value for layer in self.layers for value in vars(layer).values())):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def inverse_frequencies(self) -> Float[np.ndarray, " pairs"]:
        exponent = np.arange(0, self.head_dim, 2) / self.head_dim
        return (1 / self.theta**exponent).astype(np.float32)

    def rotation(self, length: int) -> Rotation:
        import torch

        angle = np.arange(length, dtype=np.float32)[:, None] * self.inverse_frequencies()
        return Rotation(torch.from_numpy(np.cos(angle)), torch.from_numpy(np.sin(angle)))

    def attention_weights(self, layer: int) -> LlamaAttention:
        weights = self.layers[layer]
        by_head = [getattr(weights, name).numpy().reshape(-1, self.head_dim, weights.q.shape[1]) for name in "qkv"]
        o = weights.o.numpy().reshape(-1, self.heads, self.head_dim).swapaxes(0, 1)
        return LlamaAttention(*by_head, o)

    def queries_keys_values(
        self, layer: int, x: Float[Tensor, "batch seq hidden"], rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per head [batch, heads, seq, head_dim], queries and keys rotated."""
        from torch.nn import functional as F

        weights = self.layers[layer]
        q, k, v = (
            F.linear(x, getattr(weights, name).to(x.dtype)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        return _rotated(q, rotation), _rotated(k, rotation), v

    def attention(
        self, layer: int, x: Float[Tensor, "batch seq hidden"], rotation: Rotation
    ) -> Float[Tensor, "batch seq hidden"]:
        """Output of a layer's causal attention for its normed input."""
        from torch.nn import functional as F

        q, k, v = self.queries_keys_values(layer, x, rotation)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return F.linear(out.transpose(1, 2).flatten(2), self.layers[layer].o.to(x.dtype))

    def mlp(self, layer: int, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        from torch.nn import functional as F

        weights = self.layers[layer]
        gate, up, down = (getattr(weights, name).to(x.dtype) for name in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def normed(self, x: Float[Tensor, "batch seq hidden"], weight: Tensor) -> Float[Tensor, "batch seq hidden"]:
        from torch_ref.layers import rms_norm

        return rms_norm(x, weight, self.eps)

    def hidden(self, tokens: Tensor, dtype: Any = None) -> Float[Tensor, "batch seq hidden"]:
        """Hidden states after the final norm, computed in `dtype` (None: float32)."""
        rotation = self.rotation(tokens.shape[1])
        x = self.embedding[tokens.long()]
        x = x if dtype is None else x.to(dtype)
        for index, layer in enumerate(self.layers):
            x = x + self.attention(index, self.normed(x, layer.input_norm), rotation)
            x = x + self.mlp(index, self.normed(x, layer.post_attention_norm))
        return self.normed(x, self.norm)


def _rotated(x: Float[Tensor, "batch heads seq head_dim"], rotation: Rotation) -> Tensor:
    import torch

    real, imaginary = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).to(x.dtype)


def head_dim_of(config: Any) -> int | None:
    """None where a config, which is then no Llama's, has no heads."""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def rope_theta_of(config: Any) -> float:
    """transformers 5 keeps it in `rope_parameters`, 4 beside the sizes."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0))


# Reading


def read_teacher(source: str) -> tuple[Any, dict[str, Tensor], TextTokenizer]:
    """Config, float32 weights and tokenizer of a Llama: a GGUF file, a `transformers` folder or a name on the Hub.

    Raises `UserError` if it cannot be read, naming the package that is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--from {source}: {error.name} is not installed; it reads the old model") from None
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--from {source}: no such file")
        arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        if not path.exists() and (path.is_absolute() or source.count("/") != 1):
            raise UserError(f"--from {source}: no such folder, and not a name on the Hub")
        arguments = {"pretrained_model_name_or_path": source}
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=torch.float32, output_loading_info=True
        )
    except ImportError as error:
        raise UserError(f"--from {source}: {in_one_line(error)}; a GGUF file needs gguf and accelerate") from None
    except Exception as error:
        raise UserError(f"--from {source}: cannot be read: {in_one_line(error)}") from error
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.model_type == "llama":  # another is refused by that
        check_weights(source, model.config, weights, **loaded)
    return model.config, weights, _gguf_tokenizer(path) if path.suffix == ".gguf" else load_tokenizer(source)


def check_weights(
    source: str,
    config: Any,
    weights: dict[str, Tensor],
    missing_keys: Iterable[str] = (),
    unexpected_keys: Iterable[str] = (),
    **_: Any,
) -> None:
    """Raises `UserError` where `transformers` made another model of a checkpoint than was trained: it draws what is
    missing at random, leaves out what it has no place for, and unties an output layer of other values, with no more
    than a warning."""
    for key in sorted(missing_keys):
        raise UserError(f"--from {source}: {key} is missing in its weights")
    for key in sorted(unexpected_keys):
        if not key.endswith("rotary_emb.inv_freq"):  # old checkpoints hold what follows from rope_theta
            raise UserError(f"--from {source}: {key} is among its weights, which a Llama of its config does not have")
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    if config.tie_word_embeddings and not (head.shape == embedding.shape and bool((head == embedding).all())):
        raise UserError(f"--from {source}: lm_head.weight differs from the embedding, but tie_word_embeddings is True")


def _gguf_tokenizer(path: Path) -> TextTokenizer:
    """The byte-level BPE that a GGUF file carries, as a `tokenizer.json`.

    SmolLM2 splits numbers into digits before the byte-level split; GGUF says so by a name only."""
    from gguf import GGUFReader

    fields, mend = GGUFReader(path).fields, "name the model's transformers folder instead"

    def content(name: str) -> Any:
        if (found := fields.get(f"tokenizer.ggml.{name}")) is None:
            raise UserError(f"--from {path}: has no tokenizer.ggml.{name}; {mend}")
        return found.contents()

    if content("model") != "gpt2":
        raise UserError(f"--from {path}: its tokenizer is no byte-level BPE; {mend}")
    tokens, merges, kinds = map(content, ("tokens", "merges", "token_type"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits = [byte_level]
    if content("pre") == "smollm":
        splits.insert(0, {"type": "Digits", "individual_digits": True})
    control = 3
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
        },
    }
    return TextTokenizer(json.dumps(definition, ensure_ascii=False), str(path))


def check_tokenizer(own: TextTokenizer, given: TextTokenizer) -> None:
    """Raises `UserError` unless both have the same token under every id: the embedding has a row per id."""
    tokens, others = entries(own), entries(given)
    for number in sorted(tokens.keys() | others.keys()):
        if tokens.get(number) != others.get(number):
            raise UserError(
                f"--tokenizer {given.name}: entry {number} is {others.get(number)!r}, the old model's is "
                f"{tokens.get(number)!r}; leave --tokenizer out to take the old model's own"
            )


def entries(tokenizer: TextTokenizer) -> dict[int, str]:
    """Every id with its token, as the tokenizer spells it."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_str(tokenizer.definition).get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocabulary.items()}


def check_shape(source: str, old: Any, new: ModelConfig) -> None:
    """Raises `UserError` naming the first field of a teacher's config that rules it out for `new`."""
    head_dim = head_dim_of(old)
    rope_type = (getattr(old, "rope_parameters", None) or getattr(old, "rope_scaling", None) or {}).get("rope_type")
    wanted = {
        "model_type": (old.model_type, "llama"),
        "hidden_size": (getattr(old, "hidden_size", None), new.hidden_size),
        "num_hidden_layers": (getattr(old, "num_hidden_layers", None), new.num_layers),
        "num_attention_heads": (getattr(old, "num_attention_heads", None), new.num_heads),
        "num_key_value_heads": (getattr(old, "num_key_value_heads", None), new.num_kv_heads),
        "head_dim": (head_dim, new.v_head_dim),
        "intermediate_size": (getattr(old, "intermediate_size", None), new.moe_intermediate_size),
        "vocab_size": (getattr(old, "vocab_size", None), new.vocab_size),
        "hidden_act": (getattr(old, "hidden_act", None), "silu"),
        "attention_bias": (getattr(old, "attention_bias", False), False),
        "mlp_bias": (getattr(old, "mlp_bias", False), False),
        "tie_word_embeddings": (getattr(old, "tie_word_embeddings", None), True),
        "rope_type": (rope_type or "default", "default"),
    }
    for name, (is_, must) in wanted.items():
        if is_ != must:
            raise UserError(f"--from {source}: {name} is {is_}, the new model's asks {must}")
    if not np.isclose(old.rms_norm_eps, new.rms_norm_eps, rtol=1e-6):
        raise UserError(f"--from {source}: rms_norm_eps is {old.rms_norm_eps}, the new model's asks {new.rms_norm_eps}")
    theta = kept_theta(rope_theta_of(old), head_dim, new.qk_rope_head_dim)
    if theta != float(np.float32(new.rope_theta)):
        raise UserError(
            f"--from {source}: rope_theta is {rope_theta_of(old):g}, of which qk_rope_head_dim = "
            f"{new.qk_rope_head_dim} keeps base {theta!r}; the new model's rope_theta is {new.rope_theta!r}"
        )
    check_target(new, head_dim)


def check_target(new: ModelConfig, head_dim: int) -> None:
    """Raises `UserError` naming the first field of the new model that a warm start cannot fill."""
    rules = {
        "q_lora_rank": (new.q_lora_rank is None, "must be none: the old queries have no latent"),
        "first_k_dense": (new.first_k_dense == 0, "must be 0: every layer becomes a mixture of experts"),
        "qk_rope_head_dim": (new.qk_rope_head_dim <= head_dim, f"must be at most the old head_dim = {head_dim}"),
        "qk_nope_head_dim": (
            new.qk_nope_head_dim % 2 == 0 and new.qk_nope_head_dim + new.qk_rope_head_dim >= head_dim,
            f"must be even and, with qk_rope_head_dim, hold the old head_dim = {head_dim}",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{name} = {getattr(new, name)}: {rule}")
