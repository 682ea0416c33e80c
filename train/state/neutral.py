"""The neutral form of a training state on disk, which a machine with either framework, or none, can read:

    state.json                  model config, step counters, and what the training loop stored (cursor, options, ...)
    weights.safetensors         every row of the parameter table, balance biases included, by its name
    first_moment.safetensors    the trainable rows; both moments or none
    second_moment.safetensors
    run/                        of the run it was taken from: settings, tokenizer, identity of the data, metrics

`state.json` is written last and the folder gets its name when whole. It holds a checksum of every tensor, and its own.
Tensors are written and read one at a time.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch_ref.spec.checkpoint import UNSEALED, close_seal, require_seal
from torch_ref.spec.config import ModelConfig, SpecificationError
from torch_ref.spec.interface import TrainingState, UserError
from torch_ref.spec.parameters import Parameter, parameter_table
from torch_ref.spec.storage import TensorReader, TensorSpec, TensorWriter, fresh_folder, read_json, write_json

log = logging.getLogger(__name__)

FORMAT = "smol-deepseek-state"
VERSION = 1
TENSORS = ("weights", "first_moment", "second_moment")
RUN = "run"
RUN_FILES = (
    "settings.toml",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "data.json",
    "python-docs.jsonl",
    "validation.npz",
    "metrics.jsonl",
    "training.logs",
)
"""What belongs to a run besides its checkpoints, and goes with it from one framework to the other."""


def copy_run_files(source: Path, target: Path) -> None:
    """Copy those of `RUN_FILES` that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def rows_of(config: ModelConfig, name: str) -> list[Parameter]:
    """The rows of the parameter table that one of `TENSORS` holds."""
    return [row for row in parameter_table(config) if row.trainable or name == "weights"]


def write_state(folder: Path, state: TrainingState, run: Path | None = None, dtype: str | None = None) -> None:
    """Write a training state to a new folder; its mappings are asked for one tensor at a time.

    Args:
        run: a folder whose `RUN_FILES` go along.
        dtype: of the tensors; None keeps the type they have.

    Raises:
        UserError: `folder` holds something already.
        KeyError, ValueError: `state` lacks a row of the table or has one of another shape.
    """
    tensors = [name for name in TENSORS if getattr(state, name) is not None]
    with fresh_folder(folder) as partial:
        checksums = {
            name: write_tensors(
                partial / f"{name}.safetensors", rows_of(state.model_config, name), getattr(state, name), dtype
            )
            for name in tensors
        }
        if run is not None:
            copy_run_files(run, partial / RUN)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": state.model_config.to_dict(),
            "tensors": tensors,
            "step": state.step,
            "updates": state.updates,
            "meta": state.meta,
            "checksums": checksums,
        }
        write_json(partial / "state.json", close_seal(content))


def write_tensors(
    path: Path, rows: list[Parameter], values: Mapping[str, Any], dtype: str | None = None
) -> dict[str, str]:
    """One `safetensors` file of these rows, in `dtype` or the type they have. Returns the tensors' checksums."""
    dtype = dtype or str(values[rows[0].name].dtype)
    with TensorWriter(path, [TensorSpec(row.name, row.shape, dtype) for row in rows]) as writer:
        for row in rows:
            writer.write(row.name, values[row.name])
    return writer.checksums


def is_state(folder: Path) -> bool:
    """Whether a folder is of the neutral form."""
    return (folder / "state.json").is_file()


def read_state(folder: Path) -> TrainingState:
    """The training state of a neutral folder. Its mappings read a tensor from disk each time it is asked for.

    Raises `UserError` naming the file that is missing, damaged, of another version or does not fit the model config.
    """
    folder = Path(folder)
    path = folder / "state.json"
    content = read_json(path)
    require_seal(content, path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{path}: not a {FORMAT} of version {VERSION}")
    try:
        config = ModelConfig.from_dict(content["model"])
        step, updates, meta = int(content["step"]), int(content["updates"]), dict(content["meta"])
        stored = set(content["tensors"])
        checksums = content.get("checksums", {})
        sealed = {name: dict(checksums[name]) for name in stored} if checksums else {}
    except SpecificationError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: incomplete ({error})") from error
    if stored not in ({"weights"}, set(TENSORS)):
        raise UserError(f"{path}: tensors = {sorted(stored)}; needs weights, and both moments or none")
    if not sealed:
        log.warning(UNSEALED, path)
    tensors = {
        name: _read_tensors(folder / f"{name}.safetensors", rows_of(config, name), sealed.get(name))
        for name in TENSORS
        if name in stored
    }
    return TrainingState(config, **tensors, step=step, updates=updates, meta=meta)


def _read_tensors(path: Path, rows: list[Parameter], checksums: dict[str, str] | None) -> TensorReader:
    reader = TensorReader(path, checksums=checksums)
    require_rows({name: spec.shape for name, spec in reader.specs.items()}, rows, path, "state.json")
    return reader


def require_rows(shapes: Mapping[str, tuple[int, ...]], rows: Iterable[Parameter], path: Path, asking: str) -> None:
    """Raises `UserError` naming the first tensor of a file that is not one of the rows that `asking` asks for, is
    missing, or has another shape."""
    expected = {row.name: row.shape for row in rows}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            found, asked = shapes.get(name, "missing"), expected.get(name, "no such tensor")
            raise UserError(f"{path}: {name} is {found}, {asking} asks for {asked}")
