"""Checkpoints of the torch trainer: one `.pt` file, which appears only when whole and is read without unpickling code.

Its zip format has a checksum for every tensor, and one for what lies beside them; both are verified before anything is
used, since torch itself does not.

Twins: `torch_ref/checkpoint.py`, `flax_model/checkpoint.py`.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from torch_ref.spec.checkpoint import (
    DamagedCheckpoint,
    checkpoint_name,
    in_step_order,
    named_leaves,
    read_by_all,
    read_errors,
    require_contents,
    shapes,
)
from torch_ref.spec.interface import UserError
from torch_ref.spec.processes import Agree, agree_alone
from torch_ref.spec.storage import make_folder, whole_file, write_errors
from torch_ref.spec.training_state import require_tensors

SUFFIX = ".pt"


class Checkpoints:
    """Writes, finds and reads checkpoints."""

    def __init__(self, agree: Agree = agree_alone) -> None:
        self._agree = agree

    def save(self, path: Path, state: dict, contents: dict) -> None:
        """Write nested dicts of tensors and a JSON object; a checkpoint of that name is replaced. Raises `UserError`
        naming a file that cannot be written."""
        make_folder(path.parent)
        for leftover in path.parent.glob(f"*{SUFFIX}.partial"):
            leftover.unlink()
        write_tensors(path, contents | state)

    def check_saves(self) -> None:
        """Nothing: `save` returns when the file is on disk."""

    def wait(self) -> None:
        """Nothing, as `check_saves`."""

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        """Checkpoints in a folder with their steps, oldest first, whole or not."""
        files = (path for path in Path(folder).glob(f"*{SUFFIX}") if path.is_file())
        return in_step_order((checkpoint_name(path), path) for path in files)

    def read_contents(self, path: Path) -> dict:
        """A checkpoint's JSON object, and its tensors mapped from the file. Raises `UserError` naming a file that is
        absent, something else, or damaged."""
        with read_by_all(path, self._agree):
            contents = load(path)
            require_contents(contents, "torch", path)
        return contents

    def check(self, path: Path, contents: dict, expected: dict) -> None:
        """Raises `UserError` naming the first tensor that is missing, unknown, or of another shape or dtype than in
        `expected`, nested dicts of tensors."""
        with read_by_all(path, self._agree):
            require_tensors(shapes({name: contents.get(name, {}) for name in expected}), shapes(expected), path)

    def restore(self, path: Path, contents: dict, expected: dict) -> dict:
        """The tensors of a checkpoint, mapped from its file; call `check` first."""
        return {name: contents[name] for name in expected}

    def delete(self, path: Path) -> None:
        path.unlink()

    def close(self) -> None:
        """Nothing is held."""


def load(path: Path) -> Any:
    """What a `.pt` file holds, its tensors mapped from the file and all of it checked. Raises `UserError` naming a file
    that is absent, damaged, or holds other objects than tensors, numbers and texts: unpickling those could run code."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    with read_errors(path):
        if not zipfile.is_zipfile(path):
            raise DamagedCheckpoint(path, "cut short, or not a file of torch tensors")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch compresses nothing: what claims to be more than the file is a trap for whoever unpacks it.
            whole = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not whole or sum(member.file_size for member in members) > path.stat().st_size:
                raise DamagedCheckpoint(path, "its members are compressed or overlap, which torch never writes")
            if damaged := archive.testzip():
                raise DamagedCheckpoint(path, f"{damaged} differs from its checksum")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            unsafe = "cannot be read safely: it holds other objects than tensors and numbers"
            raise UserError(f"{path}: {unsafe}") from error


def write_tensors(path: Path, contents: dict) -> None:
    """`torch.save` to a file that gets its name when whole. Raises `UserError` naming a file that cannot be written."""
    needed = sum(leaf.nbytes for _, leaf in named_leaves(contents) if isinstance(leaf, torch.Tensor))
    with write_errors(path, needed), whole_file(path, needed) as file:
        torch.save(contents, file)
