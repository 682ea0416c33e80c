"""What the checkpoints of both frameworks share: their names, what is stored beside the arrays, checksums, and the
words for what is wrong with one. NumPy only.

Beside the arrays a checkpoint stores one JSON object, its contents: `format`, `framework`, `model_config`, `step`,
`updates`, and the `meta` of the training loop. Where the file format does not check what it holds (orbax's does not),
`seal` adds two more fields: `checksums`, one for every array, and `checksum`, of the contents themselves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.processes import Agree
from torch_ref.spec.storage import checksum, described, first_line

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of what a checkpoint holds, in both frameworks."""
UNSEALED = "%s: written by a version without checksums; damage of its arrays would not be noticed"
NAMES = {"flax": "Flax", "torch": "torch"}


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: an earlier one may be whole."""

    def __init__(self, path: Path, why: BaseException | str) -> None:
        self.why = first_line(why)
        super().__init__(f"{path}: not a whole checkpoint ({self.why}); take an earlier one")


@contextmanager
def read_errors(path: Path, *unreadable: type[Exception]) -> Iterator[None]:
    """Turns whatever a framework raises on a damaged checkpoint into one `UserError` that names it; `unreadable` are
    errors of its own that mean no damage."""
    try:
        yield
    except UserError:
        raise
    except (PermissionError, MemoryError, *unreadable) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        raise DamagedCheckpoint(path, error) from error


@contextmanager
def read_by_all(path: Path, agree: Agree) -> Iterator[None]:
    """What one process cannot read is damaged for all: raises `DamagedCheckpoint` where the block raises `UserError`
    in another one."""
    try:
        yield
    except UserError:
        agree([1])()
        raise
    if agree([0])()[0]:
        raise DamagedCheckpoint(path, "another process cannot read it")


# ----------------------------------------------------------------------------------------------------------- names


def checkpoint_name(path: Path) -> str:
    """Of a file or folder: `step_1000` for `step_1000.pt`, and `step_1000.damaged` for one that was set aside."""
    return path.name.removesuffix(".pt")


def checkpoint_step(name: str) -> int | None:
    """The step in a checkpoint's name: 1000 for `step_1000`, 10100 for `step_final_10100`; None for other names."""
    match = re.fullmatch(r"(?:\w+_)?(\d+)", name)
    return int(match[1]) if match else None


def in_step_order(paths: Iterable[tuple[str, Path]]) -> list[tuple[int, Path]]:
    """(name, path) pairs whose name has a step, oldest first; of one step, `step_final_N` after `step_N`."""
    found = [(step, path) for name, path in paths if (step := checkpoint_step(name)) is not None]
    return sorted(found, key=lambda item: (item[0], item[1].name))


def checkpoint_framework(path: Path) -> str | None:
    """`torch` or `flax` if a path looks like a checkpoint or a weights file of that framework, whole or not."""
    if path.suffix == ".pt" and path.is_file():
        return "torch"
    if path.is_dir() and ((path / "state").is_dir() or (path / "meta").is_dir()):
        return "flax"
    return None


# -------------------------------------------------------------------------------------------------------- contents


def make_contents(framework: str, config: ModelConfig, step: int, updates: int, meta: dict) -> dict:
    """What a checkpoint stores beside its arrays. Raises TypeError if `meta` cannot be written as JSON."""
    return {
        "format": FORMAT,
        "framework": framework,
        "model_config": config.to_dict(),
        "step": step,
        "updates": updates,
        "meta": json.loads(json.dumps(meta)),
    }


def require_contents(contents: Any, framework: str, path: Path) -> None:
    """Raises `UserError` naming a checkpoint that is something else, or of another version."""
    if not isinstance(contents, dict) or contents.get("framework") != framework:
        raise UserError(f"{path}: not a training checkpoint of the {NAMES.get(framework, framework)} trainer")
    if contents.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {contents.get('format')}, this version reads {FORMAT}")
    for name, kind in {"model_config": dict, "step": int, "updates": int, "meta": dict}.items():
        if not isinstance(contents.get(name), kind):
            raise DamagedCheckpoint(path, f"its {name} is missing")


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, by their keys joined with dots."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, member in tree.items():
        yield from named_leaves(member, f"{prefix}.{key}" if prefix else key)


def leaf_at(tree: Any, keys: Iterable[str]) -> Any:
    """The member of nested dicts that a path of keys leads to; None where it leads nowhere."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array of nested dicts, by name."""
    return {name: (tuple(leaf.shape), str(leaf.dtype).removeprefix("torch.")) for name, leaf in named_leaves(tree)}


# ------------------------------------------------------------------------------------------------------- checksums


def seal(contents: dict, arrays: Iterable[tuple[str, np.ndarray]]) -> dict:
    """Contents with the checksums of the arrays stored beside them, and their own."""
    return close_seal(contents | {"checksums": {name: checksum(array) for name, array in arrays}})


def close_seal(contents: dict) -> dict:
    """Contents that have the checksums of arrays already, with their own."""
    return contents | {"checksum": _checksum_of_contents(contents)}


def _checksum_of_contents(contents: dict) -> str:
    contents = {name: value for name, value in contents.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(contents, sort_keys=True).encode())


def require_seal(contents: dict, path: Path) -> None:
    """Raises `DamagedCheckpoint` if sealed contents are not what was written. Contents that were never sealed, by an
    earlier version, are taken."""
    if not isinstance(contents, dict):
        raise DamagedCheckpoint(path, "its contents are not a JSON object")
    if "checksums" not in contents and "checksum" not in contents:
        return
    if contents.get("checksum") != _checksum_of_contents(contents):
        raise DamagedCheckpoint(path, "its contents differ from their checksum")


def require_stored(contents: dict, stored: dict[str, tuple[tuple[int, ...], str]], path: Path) -> None:
    """Raises `DamagedCheckpoint` if a checkpoint says that it holds other arrays, by name and (shape, dtype), than were
    sealed."""
    if "checksums" not in contents:
        return
    sealed = {name: known.rpartition(" ")[0] for name, known in contents["checksums"].items()}
    if sealed != {name: described(*shape_and_dtype) for name, shape_and_dtype in stored.items()}:
        raise DamagedCheckpoint(path, "what it says of its arrays is not what was written")


def require_arrays(contents: dict, arrays: Iterable[tuple[str, np.ndarray]], path: Path) -> None:
    """Raises `DamagedCheckpoint` naming the first array that is not what was sealed."""
    if "checksums" not in contents:
        log.warning(UNSEALED, path)
        return
    for name, array in arrays:
        if contents["checksums"].get(name) != checksum(array):
            raise DamagedCheckpoint(path, f"{name} differs from its checksum")
