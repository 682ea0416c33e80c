"""A training state, or weights alone, out of anything that holds one: a run folder or a checkpoint of either
framework, a neutral folder (`neutral.py`), a `transformers` folder, or a file of final weights.

What is read is a `TrainingState` whose tensors come from disk when asked for, so a state never lies in memory twice.
torch is imported for torch's own files alone, JAX for orbax checkpoints alone.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torch_ref.spec.checkpoint import checkpoint_framework, checkpoint_name, in_step_order, leaf_at, require_contents
from torch_ref.spec.config import ModelConfig, SpecificationError
from torch_ref.spec.huggingface import SIDECAR, import_folder
from torch_ref.spec.interface import Backend, TrainingState, UserError
from torch_ref.spec.parameters import flax_path, parameter_table
from torch_ref.spec.processes import Processes
from torch_ref.spec.storage import TensorReader, read_json
from torch_ref.spec.training_state import LazyArrays, require_config
from train.state.neutral import RUN, TENSORS, is_state, read_state, require_rows

KINDS = "a run folder, a checkpoint, a neutral folder, a transformers folder or a file of final weights"


@dataclass(frozen=True)
class Source:
    """What was found at a path."""

    kind: str
    """`torch`, `flax` (checkpoints), `neutral`, `transformers`, `weights`."""
    path: Path
    run: Path | None
    """Folder with the files that belong to the run: settings, tokenizer, identity of the data."""


def locate(path: Path, step: int | None = None) -> Source:
    """What a path holds; of a run folder its latest checkpoint, or that of `step`, or else its final weights.

    Raises `UserError` if it holds nothing that can be read, or no checkpoint of that step.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    source = _locate_one(path)
    if source is not None:
        if step is not None:
            raise UserError(f"--step {step}: {path} is not a run folder with several checkpoints")
        return source
    for folder in (path / "checkpoints", path):
        found = in_step_order((checkpoint_name(item), item) for item in folder.glob("*") if checkpoint_framework(item))
        if step is not None and found:
            found = [(number, item) for number, item in found if number == step]
            if not found:
                raise UserError(f"--step {step}: there is no such checkpoint in {folder}")
        if found:
            checkpoint = found[-1][1]
            return Source(checkpoint_framework(checkpoint), checkpoint, _run_of(checkpoint))
    # On drives of other systems macOS puts a file `._NAME` beside each.
    weights = [item for item in path.glob("[!.]*") if item.suffix in (".pt", ".safetensors")]
    if step is None and len(weights) == 1:
        return _locate_one(weights[0])
    raise UserError(f"{path}: nothing to read there; give {KINDS}")


def _locate_one(path: Path) -> Source | None:
    """The source if the path itself is one, rather than a folder of several."""
    kind = checkpoint_framework(path)
    if kind:
        return Source(kind, path, _run_of(path))
    if path.is_file():
        if path.suffix == ".safetensors":
            return Source("weights", path, path.parent)
        raise UserError(f"{path}: cannot be read; give {KINDS}")
    if is_state(path):
        return Source("neutral", path, path / RUN)
    if (path / "config.json").is_file():
        return Source("transformers", path, path)
    return None


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder that final weights lie in, or a checkpoint (in its `checkpoints` or `best`)."""
    for folder in (checkpoint.absolute().parent, checkpoint.absolute().parent.parent):
        if (folder / "settings.toml").is_file() or (folder / "tokenizer.json").is_file():
            return folder
    return None


def open_state(source: Source) -> TrainingState:
    """The training state of a source, without moments where it holds weights alone.

    Raises `UserError` naming a file that is damaged, or the framework that its format needs.
    """
    readers = {
        "torch": _read_torch,
        "flax": _read_flax,
        "neutral": read_state,
        "transformers": _read_transformers,
        "weights": _read_weights,
    }
    return readers[source.kind](source.path)


def _read_torch(path: Path) -> TrainingState:
    """A `.pt` file: a checkpoint, or the state dict of final weights. Its tensors stay in the file until asked for."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: needs torch to read; convert it to neutral form where torch is installed") from None
    from torch_ref.checkpoint import load

    stored = load(path)
    if isinstance(stored, dict) and all(isinstance(value, torch.Tensor) for value in stored.values()):
        config = _config_beside(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        require_rows(shapes, parameter_table(config), path, "the config beside it")
        for name, tensor in stored.items():
            if not tensor.is_floating_point():
                raise UserError(
                    f"{path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, not as floats"
                )
        return TrainingState(config, _torch_arrays(stored))
    require_contents(stored, "torch", path)
    return TrainingState(
        _config_of_dict(path, stored["model_config"]),
        *(_torch_arrays(stored[name]) for name in TENSORS),
        step=stored["step"],
        updates=stored["updates"],
        meta=stored["meta"],
    )


def _torch_arrays(tensors: Mapping) -> LazyArrays:
    """16-bit floats come as float32, as from `TensorReader`."""

    def fetch(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        return (tensor.float() if tensor.itemsize < 4 else tensor).numpy().copy()

    return LazyArrays(tensors, fetch)


def _read_flax(path: Path) -> TrainingState:
    """An orbax folder. Weights or one moment are in memory at a time: orbax reads the stacked layers together. Until
    they are asked for, JAX has not begun: its processes may not be joined yet."""
    try:
        import jax

        from flax_model.checkpoint import Checkpoints, load_contents
    except ImportError:
        raise UserError(f"{path}: needs JAX to read; convert it to neutral form where JAX is installed") from None

    contents = load_contents(path)
    config = _config_of_dict(path, contents["model_config"])
    rows = parameter_table(config)

    @functools.cache
    def checkpoints() -> Checkpoints:
        if "torch" in sys.modules:  # it may have the GPU, of which JAX would take three quarters, to read files
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return Checkpoints(Processes(jax.process_count(), jax.process_index()))

    @functools.lru_cache(maxsize=1)
    def trees(*names: str) -> list[dict]:
        return list(checkpoints().read_parts(path, contents, *names).values())

    def fetch(names: tuple[str, ...], name: str) -> np.ndarray:
        keys, layer = flax_path(config, name)
        for tree in trees(*names):
            leaf = leaf_at(tree, keys)
            if leaf is not None:
                return np.array(leaf if layer is None else leaf[layer])
        raise UserError(f"{path}: {name} is missing")

    def arrays(rows: Iterable, *names: str) -> LazyArrays:
        return LazyArrays([row.name for row in rows], functools.partial(fetch, names))

    trainable = [row for row in rows if row.trainable]
    return TrainingState(
        config,
        arrays(rows, "params", "biases"),
        arrays(trainable, "first_moment"),
        arrays(trainable, "second_moment"),
        step=contents["step"],
        updates=contents["updates"],
        meta=contents["meta"],
    )


def _read_transformers(path: Path) -> TrainingState:
    config, values = import_folder(path)
    return TrainingState(config, values)


def _read_weights(path: Path) -> TrainingState:
    config, reader = _config_beside(path), TensorReader(path)
    shapes = {name: spec.shape for name, spec in reader.specs.items()}
    require_rows(shapes, parameter_table(config), path, "the config beside it")
    return TrainingState(config, reader)


def _config_of_dict(path: Path, values: dict) -> ModelConfig:
    try:
        return ModelConfig.from_dict(values)
    except (SpecificationError, TypeError) as error:
        raise UserError(f"{path}: made by another version: {error}") from error


def _config_beside(path: Path) -> ModelConfig:
    """The model config of a weights file, which holds none: of the settings, or our extra file, in its folder."""
    sidecar, settings = path.parent / SIDECAR, path.parent / "settings.toml"
    if sidecar.is_file():
        return _config_of_dict(sidecar, read_json(sidecar).get("model", {}))
    if not settings.is_file():
        raise UserError(f"{path}: {settings.name} or {sidecar.name} must lie beside it, for the model's sizes")
    try:
        # TOML has no null: a field that is left out is None.
        return ModelConfig(**({"q_lora_rank": None} | tomllib.loads(settings.read_text(encoding="utf-8"))["model"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{settings}: cannot be read as settings ({error})") from error


# What the training loop calls


def load_checkpoint(backend: Backend, path: Path) -> dict:
    """Load a whole training state into `backend`: its own checkpoint, the other framework's, a run folder's latest or
    a neutral folder. Returns the `meta` that the loop stored.

    Raises `UserError` if the source is weights alone, or of another model.
    """
    path = Path(path)
    if any(path == own for _, own in backend.find(path.parent)):
        return backend.restore(path)
    source = locate(path)
    if source.kind == backend.framework:
        return backend.restore(source.path)
    state = open_state(source)
    if state.first_moment is None or not state.meta:
        raise UserError(f"{path}: holds weights, not a training state to resume; use --init-from {path}")
    require_config(state.model_config.to_dict(), backend.model_config, source.path)
    backend.load_state(state)
    return state.meta


def read_start(path: Path, config: ModelConfig) -> TrainingState:
    """The weights at a path, with their balance bias, for a run of `config` that starts at step 0.

    Raises `UserError` naming the model field that differs. The balance settings may: they shape training alone.
    """
    state = open_state(locate(path))
    stored = dataclasses.replace(
        state.model_config, balance_loss_coef=config.balance_loss_coef, balance_bias_rate=config.balance_bias_rate
    )
    require_config(stored.to_dict(), config, Path(path))
    return TrainingState(config, state.weights)


def settings_of(path: Path) -> dict:
    """The settings that a training state was made with, by name; without what `auto` chose for its device. Empty where
    none are stored."""
    meta = open_state(locate(path)).meta
    stored = meta.get("options", {}) if isinstance(meta, dict) else {}
    automatic = meta.get("automatic", ["dtype"]) if stored else []  # earlier versions did not note it
    return {name: value for name, value in stored.items() if value is not None and name not in automatic}


def config_of(path: Path) -> ModelConfig:
    """The model config of whatever lies at a path."""
    return open_state(locate(path)).model_config
