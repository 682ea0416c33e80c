"""Our weights <-> a `transformers` DeepseekV3 folder, by the parameter table. NumPy only.

What differs between the two sides, besides names:

    experts       ours are stacked [experts, out, in]; on disk `transformers` has one matrix per expert and projection,
                  the one layout that both its version 4 and its version 5 load
    kv_b_proj     ours expands the latent to `num_kv_heads`; DeepseekV3 to every head, so each group's rows are
                  repeated on the way out and taken once on the way in
    lm_head       ours is the embedding. On disk it is there a second time, since vLLM and mlx-lm do not tie what they
                  load, and has to equal the embedding on the way in
    RoPE pairs    ours are (0, 1), (2, 3), ...; a folder with `rope_interleave: false` pairs the halves, and its rotary
                  rows are put in our order, which changes no score
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.huggingface_config import DEFAULTS, SIDECAR, read_config, transformers_config
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import Parameter, parameter_table
from torch_ref.spec.storage import TensorReader, TensorSpec, TensorWriter, checksum, fresh_folder, read_json, write_json
from torch_ref.spec.training_state import LazyArrays

_SEGMENTS = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "q_a_norm": "q_a_layernorm",
    "kv_a_norm": "kv_a_layernorm",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "router": "gate",
    "balance_bias": "e_score_correction_bias",
    "shared_expert": "shared_experts",
}
"""Parts of our names that `transformers` spells differently."""

_HEAD = "lm_head.weight"
_SHARD_BYTES = 5_000_000_000
_EXPERT_KEY = re.compile(r"(.*\.experts)\.(gate_proj|up_proj|down_proj)")


# Names and values


def key_of(name: str) -> str:
    """The `transformers` name of one of our rows; `kv_b_proj` and the experts need more than a new name."""
    return "model." + ".".join(_SEGMENTS.get(part, part) for part in name.split("."))


def _groups(config: ModelConfig) -> int:
    return config.num_heads // config.num_kv_heads


def exported_specs(config: ModelConfig, row: Parameter, dtype: str) -> list[TensorSpec]:
    """The tensors that one row becomes. Router weight and balance bias are at least float32: they choose experts."""
    experts = _EXPERT_KEY.fullmatch(key_of(row.name))
    if experts:
        module, projection = experts.groups()
        keys = [f"{module}.{expert}.{projection}.weight" for expert in range(row.shape[0])]
        return [TensorSpec(key, row.shape[1:], dtype) for key in keys]
    shape = row.shape
    if row.name.endswith("kv_b_proj.weight"):
        shape = (shape[0] * _groups(config), *shape[1:])
    wide = ".router." in row.name and dtype == "bfloat16"
    return [TensorSpec(key_of(row.name), shape, "float32" if wide else dtype)]


def exported_values(config: ModelConfig, row: Parameter, value: np.ndarray) -> list[np.ndarray]:
    """The values of `exported_specs`, in its order."""
    if _EXPERT_KEY.fullmatch(key_of(row.name)):
        return list(value)
    if row.name.endswith("kv_b_proj.weight"):
        per_head = value.reshape(config.num_kv_heads, -1, config.kv_lora_rank)
        return [np.repeat(per_head, _groups(config), axis=0).reshape(-1, config.kv_lora_rank)]
    return [value]


def _copied_head(config: ModelConfig, dtype: str) -> TensorSpec:
    return TensorSpec(_HEAD, (config.vocab_size, config.hidden_size), dtype)


def _empty_shared_experts(config: ModelConfig, dtype: str) -> list[TensorSpec]:
    """DeepseekV3 always builds the shared expert; with `n_shared_experts` 0 it is one of width 0."""
    if config.n_shared_experts:
        return []
    shapes = {"gate_proj": (0, config.hidden_size), "up_proj": (0, config.hidden_size)}
    shapes["down_proj"] = (config.hidden_size, 0)
    return [
        TensorSpec(f"model.layers.{layer}.mlp.shared_experts.{projection}.weight", shape, dtype)
        for layer in range(config.first_k_dense, config.num_layers)
        for projection, shape in shapes.items()
    ]


# Export


def export_folder(
    target: Path,
    config: ModelConfig,
    values: Iterable[tuple[Parameter, np.ndarray]],
    *,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    end_of_text: int = 0,
    card: str | None = None,
    add_special_tokens: bool = False,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write `target`, a folder that `transformers` loads as `DeepseekV3ForCausalLM`.

    Args:
        values: every row of the parameter table with its value, in any order; one is held at a time.
        dtype: of the file: `float32`, `bfloat16` (router weight and balance bias stay float32) or `float64`.
        tokenizer: a folder with `tokenizer.json`, which is copied; None leaves the tokenizer out.
        end_of_text: token id that ends a document: `bos`, `eos` and `pad`, as in training.
        card: text of `README.md`, the model card; None leaves it out.
        add_special_tokens: whether the tokenizer goes on adding those it does (`<s>` before a text), for a model that
            was trained with them: here none are.
        shard_bytes: a file larger than this is split, with `transformers`' index beside the parts.

    Raises:
        UserError: `target` holds something, or the model is one that DeepseekV3 cannot express.
    """
    config_json = transformers_config(config, dtype, end_of_text)
    specs = {row.name: exported_specs(config, row, dtype) for row in parameter_table(config)}
    empty = _empty_shared_experts(config, dtype)
    head = _copied_head(config, dtype)
    shards = _shards([*(spec for row in specs.values() for spec in row), *empty, head], shard_bytes)
    with fresh_folder(target) as folder:
        files = _file_names(len(shards))
        file_of = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
        with ExitStack() as stack:
            writers = {
                file: stack.enter_context(TensorWriter(folder / file, shard, {"format": "pt"}))
                for file, shard in zip(files, shards, strict=True)
            }
            for spec in empty:
                writers[file_of[spec.name]].write(spec.name, np.zeros(spec.shape, np.float32))
            for row, value in values:
                for spec, part in zip(specs[row.name], exported_values(config, row, value), strict=True):
                    writers[file_of[spec.name]].write(spec.name, part)
                if row.name == "embed_tokens.weight":
                    writers[file_of[_HEAD]].write(_HEAD, value)
        if len(files) > 1:
            total = sum(spec.nbytes for shard in shards for spec in shard)
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            write_json(folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder, end_of_text, config.max_position, add_special_tokens)
        written = TensorReader(*(folder / file for file in files))
        checksums = {name: checksum(written[name]) for name in sorted(written)}
        write_json(folder / SIDECAR, {"model": config.to_dict(), "checksums": checksums})
        generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
        write_json(folder / "generation_config.json", generation)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "config.json", config_json)


def _shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive tensors, as many per file as fit in `limit` bytes."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors of a `tokenizer.json` that add special tokens to a text."""


def copy_tokenizer(
    source: Path, target: Path, end_of_text: int, max_position: int, add_special_tokens: bool = False
) -> None:
    """Copy a fast tokenizer, and its chat template if it has one, so that `AutoTokenizer` of version 4 and 5 opens it,
    with `end_of_text` as bos, eos and pad; but the bos of a chat template stays, which the template writes.

    Raises `UserError` if `source` has no `tokenizer.json` or no token of that id.
    """
    tokenizer = read_json(source / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        names = {number: token for token, number in vocabulary.items()}
    else:  # of a Unigram model: pieces with their scores, in the order of their ids
        names = {number: token for number, (token, _) in enumerate(vocabulary)}
    names.update((token["id"], token["content"]) for token in tokenizer.get("added_tokens", []))
    if end_of_text not in names:
        raise UserError(f"{source / 'tokenizer.json'}: no token has the end-of-text id {end_of_text}")
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").exists() else {}
    templated = "chat_template" in settings or (source / "chat_template.jinja").exists()
    begin = settings.get("bos_token")
    begin = begin.get("content") if isinstance(begin, dict) else begin
    for key in ("backend", "is_local", "local_files_only", "bos_token_id", "eos_token_id", "pad_token_id"):
        settings.pop(key, None)
    settings.update(
        # The class that both versions build from tokenizer.json alone.
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=begin if templated and begin in names.values() else names[end_of_text],
        eos_token=names[end_of_text],
        pad_token=names[end_of_text],
        model_max_length=max_position,
        # Version 4 would add the token_type_ids of BERT, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
    )
    if not add_special_tokens:
        for key in ("add_bos_token", "add_eos_token"):
            settings.pop(key, None)
    write_json(target / "tokenizer_config.json", settings)
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    processor = _without_special_tokens(tokenizer.get("post_processor"))
    if not add_special_tokens and processor != tokenizer.get("post_processor"):
        write_json(target / "tokenizer.json", tokenizer | {"post_processor": processor})


def _without_special_tokens(processor: dict | None) -> dict | None:
    """A post-processor, or one of a sequence of them, less what adds special tokens."""
    if processor is None or processor.get("type") in _ADDING:
        return None
    if processor.get("type") != "Sequence":
        return processor
    kept = [part for part in map(_without_special_tokens, processor.get("processors", [])) if part is not None]
    return processor | {"processors": kept} if kept else None


# Import


def changed_tensors(folder: Path) -> list[str]:
    """Names of the tensors of an export that are no longer those that were written, in the order of the file's header;
    none for a folder that keeps no checksums. Reading a folder does not ask for this: weights may be edited."""
    sidecar = Path(folder) / SIDECAR
    checksums = read_json(sidecar).get("checksums", {}) if sidecar.is_file() else {}
    if not checksums:
        return []
    if not isinstance(checksums, dict):
        raise UserError(f"{sidecar}: checksums is no object")
    reader = _open_weights(Path(folder))
    return [name for name in reader if checksums.get(name) != checksum(reader[name])]


def our_name(key: str) -> str:
    """The row of the parameter table that a tensor of `transformers` belongs to: the inverse of `key_of`, by expert."""
    ours = {theirs: part for part, theirs in _SEGMENTS.items()}
    parts = [ours.get(part, part) for part in key.removeprefix("model.").split(".")]
    if "experts" in parts:
        parts = parts[: parts.index("experts") + 1] + parts[-2:-1]
    return ".".join(parts)


def import_folder(folder: Path) -> tuple[ModelConfig, Mapping[str, np.ndarray]]:
    """Config and arrays, by our names, of a `transformers` DeepseekV3 folder. An array is read when asked for; 16-bit
    floats come as float32.

    Raises `UserError` naming what is missing, unexpected, of another shape, or not computed by this model; all but a
    difference between the repeated heads of a K/V group is found before the first value is read.
    """
    folder = Path(folder)
    config = read_config(folder)
    interleaved = read_json(folder / "config.json").get("rope_interleave", DEFAULTS["rope_interleave"])
    reader = _open_weights(folder)
    _check_keys(folder, config, reader)
    rows = {row.name: row for row in parameter_table(config)}
    return config, LazyArrays(rows, lambda name: _imported_value(folder, config, rows[name], reader, interleaved))


def _open_weights(folder: Path) -> TensorReader:
    if (folder / "model.safetensors").exists():
        return TensorReader(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or any(type(f) is not str or Path(f).name != f for f in weight_map.values()):
        raise UserError(f"{index}: its weight_map does not give each tensor a file of this folder")
    return TensorReader(*(folder / file for file in sorted(set(weight_map.values()))))


def _check_keys(folder: Path, config: ModelConfig, reader: TensorReader) -> None:
    """Refuse a folder whose tensors are not exactly those of the config."""
    expected = {spec.name: spec for row in parameter_table(config) for spec in exported_specs(config, row, "float32")}
    ignored = {_HEAD, *(spec.name for spec in _empty_shared_experts(config, "float32"))}
    found = {name for name in reader if name not in ignored and not name.endswith("rotary_emb.inv_freq")}
    extra_layer = f"model.layers.{config.num_layers}."
    if any(name.startswith(extra_layer) for name in found):
        raise UserError(f"{folder}: {extra_layer}*: multi-token prediction (num_nextn_predict_layers) is not supported")
    for what, names in (("missing", set(expected) - found), ("unexpected", found - set(expected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{folder}: {what} weights: {', '.join(sorted(names)[:3])}{more}")
    for name, spec in expected.items():
        if reader.specs[name].shape != spec.shape:
            raise UserError(
                f"{folder}: {name} is {list(reader.specs[name].shape)}, config.json asks {list(spec.shape)}"
            )
    if _HEAD in reader:
        if not np.array_equal(reader[_HEAD], reader["model.embed_tokens.weight"]):
            raise UserError(f"{folder}: {_HEAD} differs from the embedding, but tie_word_embeddings is true")


def _imported_value(
    folder: Path, config: ModelConfig, row: Parameter, reader: TensorReader, interleaved: bool
) -> np.ndarray:
    """One row of ours from the tensors of a folder."""
    parts = [reader[spec.name] for spec in exported_specs(config, row, "float32")]
    if _EXPERT_KEY.fullmatch(key_of(row.name)):
        return np.stack(parts)
    value = parts[0]
    projection = row.name.split(".")[-2]
    if projection == "kv_b_proj":
        heads = value.reshape(config.num_kv_heads, _groups(config), -1, config.kv_lora_rank)
        if not np.array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape)):
            raise UserError(
                f"{folder}: {row.name}: the heads of a K/V group differ, so num_kv_heads = {config.num_kv_heads} no "
                f"longer holds; delete {SIDECAR} to take num_kv_heads = {config.num_heads}"
            )
        return np.ascontiguousarray(heads[:, 0]).reshape(row.shape)
    if not interleaved and projection in ("q_proj", "q_b_proj"):
        return _pairs_from_halves(value, config.num_heads, config.qk_rope_head_dim)
    if not interleaved and projection == "kv_a_proj":
        return _pairs_from_halves(value, 1, config.qk_rope_head_dim)
    return value


def _pairs_from_halves(value: np.ndarray, heads: int, rope: int) -> np.ndarray:
    """Put the last `rope` rows of each head, where row j is turned with row j + rope / 2, in the order 2j, 2j + 1.

    Queries and keys move alike, so every score stays the same sum of the same products.
    """
    rows = value.reshape(heads, -1, value.shape[-1])
    halves = rows[:, -rope:].reshape(heads, 2, rope // 2, -1)
    pairs = halves.swapaxes(1, 2).reshape(heads, rope, -1)
    return np.concatenate([rows[:, :-rope], pairs], axis=1).reshape(value.shape)
