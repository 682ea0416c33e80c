"""Checkpoints of the Flax trainer, by orbax: a folder of two items, `state` (arrays) and `meta` (JSON).

orbax's `AsyncCheckpointer` is used without its `CheckpointManager`. The manager owns one folder, knows a checkpoint
by its step alone, and leaves out, without a word, a save whose step is not later than the latest one. Here the loop
names checkpoints (`step_1000`, `step_final_10100`, the best one elsewhere) and decides what is kept, and saving an
earlier step again must work. What makes saving safe is the checkpointer's: the data goes to a temporary folder, which
is renamed when whole.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_model.sharding import tree_bytes
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import host_memory_available
from torch_ref.spec.training_state import in_step_order, make_folder, require_tensors

TEMPORARY = re.compile(r".+\.orbax-checkpoint-tmp.*")
"""Names of folders that orbax is writing, or was when the process ended."""
BACKGROUND_MEMORY = 2
"""A save goes on in the background only if this many times the state's size is free: the next step then cannot reuse
the buffers that are being written, and needs room of its own."""


class Checkpoints:
    """Writes, finds and reads checkpoints. At most one save is under way at a time."""

    def __init__(self) -> None:
        self._latest: Path | None = None
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # zarr3 without compression: weights do not compress, and zstd is seven times slower than the disk.
                state=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
                meta=ocp.JsonCheckpointHandler(),
            ),
            # A folder that cannot be made then raises at once, instead of minutes later in a thread.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def save(self, path: Path, state: Any, meta: dict) -> None:
        """Write a tree of arrays and a JSON object; a checkpoint of that name is replaced. The arrays may be donated
        to a computation as soon as this returns. Raises `UserError` naming a folder that cannot be written to; errors
        of the writing itself are raised by the next call or `wait`."""
        self.wait()
        path = self._latest = Path(path).absolute()
        make_folder(path.parent)
        for leftover in path.parent.glob("*"):
            if TEMPORARY.fullmatch(leftover.name):
                shutil.rmtree(leftover)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        with self._write_errors():
            self._checkpointer.save(path, args=items, force=True)
        available = host_memory_available()
        if available is not None and available < BACKGROUND_MEMORY * tree_bytes(state):
            self.wait()

    def wait(self) -> None:
        """Block until the save under way has landed. Raises `UserError` naming it if it could not be written."""
        with self._write_errors():
            self._checkpointer.wait_until_finished()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._latest}: could not be written: {error}") from error

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        """Whole checkpoints in a folder with their steps, oldest first."""
        folders = [path for path in Path(folder).glob("*") if (path / "state").is_dir() and (path / "meta").is_dir()]
        return in_step_order((path.name, path) for path in folders)

    def read_meta(self, path: Path) -> dict:
        """A checkpoint's JSON item. Raises `UserError` naming a folder that is not a whole checkpoint."""
        self.wait()
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such checkpoint")
        with _named_errors(path):
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._checkpointer.restore(Path(path).absolute(), args=items)["meta"]

    def check(self, path: Path, abstract: Any) -> None:
        """Raises `UserError` naming the first array that is missing, unknown, or of another shape or dtype than in
        `abstract`, a tree of `jax.ShapeDtypeStruct`."""
        with _named_errors(path):
            stored = self._checkpointer.metadata(Path(path).absolute()).item_metadata["state"].tree
        require_tensors(_shapes(stored), _shapes(abstract), path)

    def restore(self, path: Path, abstract: Any) -> Any:
        """The arrays of a checkpoint, placed as `abstract` says; call `check` first. Raises `UserError` where what was
        read is not what the checkpoint promised."""
        with _named_errors(path):
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args))
            state = self._checkpointer.restore(Path(path).absolute(), args=items)["state"]
        require_tensors(_shapes(state), _shapes(abstract), path)
        return state

    def read_parts(self, path: Path, *names: str) -> dict:
        """Some of a state's trees (`params`, ...) in NumPy arrays of the stored types, for conversion: it needs neither
        the device nor the memory of the whole state."""
        with _named_errors(path):
            stored = self._checkpointer.metadata(Path(path).absolute()).item_metadata["state"].tree
            wanted = {name: stored[name] for name in names}
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            part = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            return self._checkpointer.restore(Path(path).absolute(), args=ocp.args.Composite(state=part))["state"]

    def delete(self, path: Path) -> None:
        self.wait()
        shutil.rmtree(path)

    def close(self) -> None:
        self._checkpointer.close()


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns whatever orbax raises on a damaged folder into one `UserError` that names it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: not a whole checkpoint; delete it to go on from an earlier one") from error


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }
